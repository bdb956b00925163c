"""What the observers cost: ``python -m experiments.benchmarks.observers``.

The quickstart with and without the default set of observers (the temperature is annealed in both), the whole process
and the part of it that trains and tests; and the validation of 10,000 images of 32 px by a ResNet-20, 18 of its layers
dynamic, with and without RoutingReport, whose figures are drawn each time; freed memory is kept, as by the commands.
Interleaved, median of several rounds.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import TensorBoardLogger

from dyn_lightning.allocator import keep_freed_memory
from dyn_lightning.callbacks import RoutingReport
from dyn_lightning.classifier import ImageClassifier
from dyn_lightning.data import Synthetic
from dyn_lightning.routing import named_routers
from experiments.benchmarks.timing import in_turn, versions

QUICKSTART = Path(__file__).parents[1] / "quickstart.yaml"
ANNEALING = '[{"class_path": "TemperatureAnnealing", "init_args": {"start": 30, "end": 1, "epochs": 3}}]'
ROUNDS = 7


def quickstart() -> tuple[dict[str, float], dict[str, float]]:
    """Time the whole process, and the part that trains and tests; gives milliseconds."""
    training: dict[str, list[float]] = {"true": [], "false": []}

    def measure(observe: str) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            options = ["--trainer.callbacks", ANNEALING, "--observe", observe, "--trainer.enable_progress_bar", "false"]
            command = [sys.executable, "-m", "dyn_lightning.fit", "--config", str(QUICKSTART), *options]
            start = time.perf_counter()
            subprocess.run(command, cwd=folder, check=True, capture_output=True)
            took = 1e3 * (time.perf_counter() - start)
            record = Path(folder) / "runs" / "quickstart" / "version_0" / "run.json"
            training[observe].append(1e3 * json.loads(record.read_text())["seconds"])
            return [took]

    process = in_turn(measure, [*training], ROUNDS)
    return process, {name: round(statistics.median(times), 4) for name, times in training.items()}


def validation() -> dict[str, float]:
    """Time the validation of 10,000 images; gives milliseconds."""
    keep_freed_memory()
    data = Synthetic(num_images=100_000, num_classes=10, image_size=32, batch_size=128)
    model = ImageClassifier("cifar_resnet", {"depth": 20}, conv="dynamic", num_classes=10, channels=3, image_size=32)
    assert (len(data.val_set), len(named_routers(model))) == (10_000, 18)  # type: ignore[arg-type]

    def measure(name: str) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(
                accelerator="cpu",
                callbacks=[RoutingReport()] if name == "with" else [],
                logger=TensorBoardLogger(folder),
                enable_progress_bar=False,
            )
            start = time.perf_counter()
            trainer.validate(model, data, verbose=False)
            return [1e3 * (time.perf_counter() - start)]

    measure("with")  # warm up
    return in_turn(measure, ["with", "without"], ROUNDS)


def main() -> None:
    """Print the results, then everything as JSON."""
    torch.manual_seed(0)
    results = {"validation": validation()}
    results["process"], results["training"] = quickstart()
    for name, times in results.items():
        on, off = times.values()
        print(f"{name:10}  with {on / 1e3:6.2f} s  without {off / 1e3:6.2f} s  overhead {100 * (on / off - 1):+.1f} %")
    print(json.dumps(results | {"rounds": ROUNDS, "versions": versions()}))


if __name__ == "__main__":
    main()
