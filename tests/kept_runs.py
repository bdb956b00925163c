"""The files of benchmarks' runs that are kept."""

import json
from typing import Any

from tests.command_line import ROOT

RESULTS = ROOT / "experiments/benchmarks/results"
# Of whole networks with memory kept. On Intel's those with depthwise convolutions were measured anew at 224 px: what a
# later file has counts.
NETWORKS = {
    "other": [
        *("networks_x05_224", "networks_224_depthwise", "networks_resnet18_224", "networks_resnet50_224"),
        *("networks_224_forward_depthwise", "networks_224_forward_resnets"),
        *("networks_one_depthwise", "networks_one_resnets", "networks_32"),
    ],
    "intel": [
        *("networks_224_forward", "networks_224", "networks_32", "networks_one"),
        *("networks_224_forward_depthwise", "networks_224_depthwise"),
    ],
}


def networks(processor: str, names: list[str]) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Read what was measured, by network, size and job."""
    found = {}
    for name in names:
        for result in json.loads((RESULTS / processor / f"{name}.json").read_text())["results"]["networks"]:
            found[result["network"], result["size"], result["job"]] = result
    return found
