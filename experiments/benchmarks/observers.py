"""What the observers cost: ``python -m experiments.benchmarks.observers``.

The quickstart with and without the default set of observers (the temperature is annealed in both), the whole process
and the part of it that trains and tests; and the validation of 10,000 images of 32 px by a ResNet-20, 18 of its layers
dynamic, with and without RoutingReport, whose figures are drawn each time; freed memory is kept, as by the commands.
Two processes in slices of half a second, median of several rounds.

Two processes may differ in more than the observers, as in where their tensors lie in memory. So Lightning's profiler
also counts the time in the observers' own methods, beside the time without them.
"""

import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import TensorBoardLogger

from dyn_lightning.allocator import keep_freed_memory
from dyn_lightning.callbacks import RoutingReport
from dyn_lightning.classifier import ImageClassifier
from dyn_lightning.data import Synthetic
from dyn_lightning.routing import named_routers
from experiments.benchmarks.timing import in_slices, versions

QUICKSTART = Path(__file__).parents[1] / "quickstart.yaml"
ANNEALING = '[{"class_path": "TemperatureAnnealing", "init_args": {"start": 30, "end": 1, "epochs": 3}}]'
RECORD = Path("runs/quickstart/version_0/run.json")  # is there when the quickstart begins to train
PROFILED = ["SimpleProfiler", "--trainer.profiler.dirpath", ".", "--trainer.profiler.filename", "hooks"]
HOOKS = re.compile(r"\[Callback](?:Routing|Expert|Scalar).*\|\s*(\S+)\s*\|$", re.MULTILINE)  # the seconds in them
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
READY = Path("ready")  # is there when the validation begins
ROUNDS = 9


def quickstart(observe: bool) -> list[str]:
    """Give the command of the quickstart."""
    options = ["--trainer.callbacks", ANNEALING, "--observe", str(observe).lower()]
    return ["dyn_lightning.fit", "--config", str(QUICKSTART), "--trainer.enable_progress_bar", "false", *options]


def validation(observe: bool) -> list[str]:
    """Give the command of the validation."""
    return [__spec__.name, "validate", str(observe)]


def validate(observe: bool) -> None:
    """Validate 10,000 images, after a first time to warm up."""
    torch.manual_seed(0)
    keep_freed_memory()
    data = Synthetic(num_images=100_000, num_classes=10, image_size=32, batch_size=128)
    model = ImageClassifier("cifar_resnet", {"depth": 20}, conv="dynamic", num_classes=10, channels=3, image_size=32)
    assert (len(data.val_set), len(named_routers(model))) == (10_000, 18)  # type: ignore[arg-type]
    for folder in ("warm_up", "counted"):
        trainer = Trainer(
            accelerator="cpu",
            callbacks=[RoutingReport()] if observe else [],
            logger=TensorBoardLogger(folder),
            enable_progress_bar=False,
        )
        trainer.validate(model, data, verbose=False)
        READY.touch()


def measure(command: Callable[[bool], list[str]], begins: Path, first: bool) -> dict[bool, tuple[float, float]]:
    """Give the seconds with and without observers, of the whole process and from when ``begins`` is there."""
    with tempfile.TemporaryDirectory() as parent, ExitStack() as stack:
        folders = {observe: Path(parent) / str(observe) for observe in (first, not first)}
        processes = {}
        for observe, folder in folders.items():
            folder.mkdir()
            arguments = [sys.executable, "-m", *command(observe)]
            nothing = subprocess.DEVNULL
            process = subprocess.Popen(arguments, cwd=folder, env=ENVIRONMENT, stdout=nothing, stderr=nothing)
            processes[observe] = stack.enter_context(process)
        return in_slices(processes, {observe: folder / begins for observe, folder in folders.items()})


def seconds_in_hooks() -> float:
    """Give the seconds in the observers' hooks while the quickstart trains."""
    with tempfile.TemporaryDirectory() as folder:
        options = ["--trainer.profiler", *PROFILED, "--trainer.profiler.extended", "false"]
        arguments = [sys.executable, "-m", *quickstart(True), *options]
        subprocess.run(arguments, cwd=folder, env=ENVIRONMENT, check=True, capture_output=True)
        found = HOOKS.findall(Path(folder, "fit-hooks.txt").read_text())
        assert found
        return sum(map(float, found))


def main() -> None:
    """Print the results, then everything as JSON."""
    results = {}
    print(f"{'median seconds':32}{'with':>8}{'without':>8}{'overhead':>10}{'least':>10}{'most':>10}")
    for name, command, begins in (("validation", validation, READY), ("quickstart", quickstart, RECORD)):
        rounds = [measure(command, begins, first=turn % 2 == 0) for turn in range(ROUNDS)]
        for index, part in enumerate(("whole process", "from the first step on")):
            on, off = ([seconds[observe][index] for seconds in rounds] for observe in (True, False))
            over = [100 * (with_ / without - 1) for with_, without in zip(on, off, strict=True)]
            medians = (statistics.median(on), statistics.median(off))
            percents = "".join(f"{percent:+8.1f} %" for percent in (statistics.median(over), min(over), max(over)))
            print(f"{f'{name}, {part}':32}" + "".join(f"{median:8.2f}" for median in medians) + percents, flush=True)
            results[f"{name}, {part}"] = {"with": on, "without": off}
    inside = [seconds_in_hooks() for _ in range(ROUNDS)]
    seconds = statistics.median(inside)
    of = statistics.median(results["quickstart, from the first step on"]["without"])
    print(f"{'quickstart, in their methods':32}{seconds:8.2f}{of:8.2f}{100 * seconds / of:+8.1f} %")
    results["quickstart, in their methods"] = {"with": inside}
    print(json.dumps(results | {"rounds": ROUNDS, "versions": versions()}))


if __name__ == "__main__":
    if sys.argv[1:2] == ["validate"]:
        validate(sys.argv[2] == "True")
    else:
        main()
