"""The files of benchmarks' runs that are kept."""

import json
from typing import Any

from tests.command_line import ROOT

RESULTS = ROOT / "experiments/benchmarks/results"
# Of whole networks with memory kept. Those with depthwise convolutions were measured anew, on Intel's at 224 px: what a
# later file has counts. On the other processor MobileNetV2 x0.5, with more rounds, and ResNet-50, of a day before, have
# files of their own.
NETWORKS = {
    "other": [
        *("networks_224_forward", "networks_224", "networks_x05_224"),
        *("networks_resnet50_224_forward", "networks_resnet50_224", "networks_32", "networks_one"),
        *("networks_x05_224_depthwise", "networks_224_depthwise"),
        *("networks_224_forward_depthwise", "networks_one_depthwise"),
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
