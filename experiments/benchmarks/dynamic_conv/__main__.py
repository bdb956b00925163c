"""How fast is the per-sample convolution?

    python -m experiments.benchmarks.dynamic_conv [layers] [networks] [growth] [modes] --out FOLDER

Question: what do dynamic convolutions cost beside static ones, by each method, by the one that is chosen, and by timm's
``CondConv2d``, the public peer that puts the batch into the groups of one convolution?

Side by side in one run, interleaved, medians. ``layers``: each layer shape of MobileNetV2, ResNet-18, ResNet-50 and
EfficientNet-B0 at 224 and 32 px (forward and backward pass of a batch of 32, forward pass of 32 and of 1; no router, no
optimizer). ``networks``: these networks whole (training step with SGD of a batch of 32, forward pass of 32 and of 1).
Both with the peak memory of tensors. ``growth``: the training step of ResNet-18 at 32 px over K and the batch, and
what explains it. ``modes``: single layers, and training steps of networks, in channels_last, in bfloat16 and compiled.
``layers`` takes a quarter of an hour on two cores, ``growth`` and ``modes`` some minutes, ``networks`` the longest.
Prints tables, draws a plot of each of the first three parts into ``--out``, and ends with one line of JSON.
"""

import argparse
import json
from pathlib import Path

import torch

from dyn_lightning.allocator import is_freed_memory_kept
from dyn_lightning.per_sample.processor import is_intel, processor_name
from dyn_lightning.record import git_state
from experiments.benchmarks.dynamic_conv.growth import growth
from experiments.benchmarks.dynamic_conv.layers import JOBS as LAYER_JOBS
from experiments.benchmarks.dynamic_conv.layers import ROUNDS_OF_ONE, SIZES, Shape, layers, shapes
from experiments.benchmarks.dynamic_conv.modes import ROUNDS_OF_LAYERS, modes
from experiments.benchmarks.dynamic_conv.networks import JOBS, NETWORKS, networks, prepare
from experiments.benchmarks.dynamic_conv.plots import draw
from experiments.benchmarks.timing import versions

PARTS = {"layers": layers, "networks": networks, "growth": growth, "modes": modes}


def main(arguments: list[str] | None = None) -> None:
    """Print the tables, draw the plots and keep the results after each part, then print everything as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.benchmarks.dynamic_conv",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("parts", nargs="*", default=[], help=f"of {', '.join(PARTS)}; all if none is named")
    parser.add_argument(
        "--rounds",
        type=count,
        default=5,
        help=f"repetitions (layers: of one image {ROUNDS_OF_ONE} times as many, modes: of layers {ROUNDS_OF_LAYERS})",
    )
    parser.add_argument("--passes", type=count, default=1, help="over all layers, of which the median is given as well")
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of all but modes")
    parser.add_argument("--kernels", type=count, default=4, help="K; growth has its own")
    parser.add_argument("--batch", type=count, default=32, help="of layers, networks and modes")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=[*NETWORKS], help="of networks")
    jobs = [*LAYER_JOBS, *JOBS]
    parser.add_argument("--jobs", nargs="+", choices=dict.fromkeys(jobs), default=jobs, help="of layers and networks")
    parser.add_argument("--sizes", nargs="+", type=count, default=SIZES, help="of the networks' images, in pixels")
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shape,
        help="of layers, as in,out,kernel,stride,padding,groups,map; all if none is named",
    )
    parser.add_argument("--channels_last", action="store_true", help="of all but modes")
    parser.add_argument("--compiled", action="store_true", help="by torch.compile; of networks and growth")
    parser.add_argument("--out", type=Path, help="folder for the plots and the JSON")
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.parts) - set(PARTS))
    if unknown:
        parser.error(f"parts {unknown} do not exist, choose of {[*PARTS]}")
    options.threads = torch.get_num_threads()
    prepare(options)
    names = ("dtype", "batch", "kernels", "rounds", "passes", "channels_last", "compiled")
    settings = {name: getattr(options, name) for name in names}
    options.dtype = getattr(torch, options.dtype)
    torch.manual_seed(0)
    state = git_state() or {"commit": "", "diff": ""}
    code = {"commit": state["commit"], "changed": bool(state["diff"])}
    measured = {"benchmark": "dynamic_conv", **settings, **versions(options.device), **code}
    measured |= {"processor": processor_name(), "intel": is_intel(), "keeps_freed_memory": is_freed_memory_kept()}
    measured["results"] = {}
    for part in options.parts or PARTS:
        measured["results"][part] = PARTS[part](options)
        if options.out:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "dynamic_conv.json").write_text(json.dumps(measured) + "\n")
            draw(measured, options.out)
    print(json.dumps(measured))


def count(text: str) -> int:
    """Parse a whole number above 0."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def shape(text: str) -> Shape:
    """Parse the shape of one of the networks' layers."""
    found = tuple(int(number) for number in text.split(","))
    if found not in shapes():
        raise argparse.ArgumentTypeError(f"{text!r} is no layer's shape in {', '.join(NETWORKS)}")
    return found  # type: ignore[return-value]


def device(text: str) -> torch.device:
    """Parse a device that is there."""
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from error
    if found.type not in ("cpu", "cuda") or (found.type == "cuda" and not torch.cuda.is_available()):
        raise argparse.ArgumentTypeError(f"{text!r} is not here, or cannot be timed: choose cpu or cuda")
    return torch.device("cuda", found.index or 0) if found.type == "cuda" else found


if __name__ == "__main__":
    main()
