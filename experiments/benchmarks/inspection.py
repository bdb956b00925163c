"""What tests under changed routing cost: ``python -m experiments.benchmarks.inspection``.

A ResNet-20, 18 of its layers dynamic, on 2,000 images of 32 px: Lightning's plain test, and the five aggregation modes
with one draw each, of which each is a forward pass. Interleaved, median of several rounds.
"""

import json
import time

import torch
from pytorch_lightning import Trainer

from dyn_lightning.ablation.inspection import ALL_MODES, Inspection, WholeBatches
from dyn_lightning.classifier import ImageClassifier
from dyn_lightning.data import Synthetic
from dyn_lightning.routing import replaced
from experiments.benchmarks.timing import in_turn, medians, versions

ROUNDS = 5


def main() -> None:
    """Print the times and their ratio, then everything as JSON."""
    torch.manual_seed(0)
    data = Synthetic(num_images=20_000, num_classes=10, image_size=32, batch_size=128)
    model = ImageClassifier("cifar_resnet", {"depth": 20}, conv="dynamic", num_classes=10, channels=3, image_size=32)

    def measure(name: str) -> list[float]:
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, use_distributed_sampler=False)
        start = time.perf_counter()
        if name == "plain":
            trainer.test(model, data, verbose=False)
        else:
            inspection = Inspection(model, ALL_MODES, draws=1)
            with replaced(model, inspection.change):
                trainer.test(inspection, WholeBatches(data.test_dataloader()), verbose=False)
        return [1e3 * (time.perf_counter() - start)]

    measure("five modes")  # warm up
    times = medians(in_turn(measure, ["plain", "five modes"], ROUNDS))
    for name, took in times.items():
        print(f"{name:10}  {took / 1e3:6.2f} s")
    print(f"five modes / plain: {times['five modes'] / times['plain']:.2f}")
    print(json.dumps({"times": times, "rounds": ROUNDS, "versions": versions()}))


if __name__ == "__main__":
    main()
