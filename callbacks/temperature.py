"""Softmax temperature over the course of training, as in Dynamic Convolution (arXiv 1912.03458)."""

import math
from collections.abc import Callable, Iterator
from typing import Any

from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn
from torch.optim.swa_utils import AveragedModel

from dyn_lightning.protocols import Annealed
from dyn_lightning.routing import check_temperature

# How far the temperature has come from start to end at progress p in [0, 1].
SCHEDULES: dict[str, Callable[[float, float, float], float]] = {
    "linear": lambda start, end, p: start + (end - start) * p,
    "cosine": lambda start, end, p: end + (start - end) * (1 + math.cos(math.pi * p)) / 2,
    "exponential": lambda start, end, p: start * (end / start) ** p,
    "constant": lambda start, end, p: start,
}


class TemperatureAnnealing(Callback):
    """Sets the temperature of all Annealed layers before each training step, and logs it as ``temperature``.

    The temperature is a function of the global step alone, the same on every rank, so a resumed run cannot drift. In a
    weight average (``WeightAveraging`` and its kin) it is the live value, not an average of earlier ones.

    Args:
        start: temperature of the first step.
        end: temperature after ``epochs``, and from then on.
        epochs: length of the descent; the paper takes 10. Fractions are allowed.
        schedule: ``"linear"`` as in the paper, ``"cosine"``, ``"exponential"``, or ``"constant"`` (always ``start``).

    Raises:
        ValueError: a temperature or length that is not above 0, or an unknown schedule.

    Example:
        >>> TemperatureAnnealing(start=30, end=1, epochs=10).temperature(progress=0.5)
        15.5
    """

    def __init__(self, start: float = 30.0, end: float = 1.0, epochs: float = 10, schedule: str = "linear") -> None:
        check_temperature(start, "start")
        check_temperature(end, "end")
        if not 0 < epochs < math.inf:
            raise ValueError(f"epochs={epochs} must be above 0")
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule={schedule!r} does not exist, choose one of {list(SCHEDULES)}")
        self.start = start
        self.end = end
        self.epochs = epochs
        self.schedule = schedule
        self._layers: list[Annealed] = []

    def temperature(self, progress: float) -> float:
        """Give the temperature when this part of ``epochs`` is over (1: all, more: after it)."""
        return SCHEDULES[self.schedule](self.start, self.end, min(1.0, progress))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look for layers to anneal."""
        models = (pl_module, *_averages(trainer))
        self._layers = [module for model in models for module in model.modules() if isinstance(module, Annealed)]
        if not self._layers:
            rank_zero_warn("TemperatureAnnealing found no layer with a temperature (set_temperature) in the model")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse data without a length."""
        if not math.isfinite(trainer.num_training_batches):
            raise ValueError(
                "TemperatureAnnealing counts in epochs, and the training loader has no length: "
                "give the trainer limit_train_batches"
            )

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Set and log the temperature of this step."""
        pl_module.log("temperature", self._set(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Set the temperature that belongs to the weights after this step, for validation and checkpoints."""
        self._set(trainer)

    def _set(self, trainer: Trainer) -> float:
        steps = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches) * self.epochs
        value = self.temperature(trainer.global_step / steps)
        for layer in self._layers:
            layer.set_temperature(value)
        return value


def _averages(trainer: Trainer) -> Iterator[nn.Module]:
    """Find the averaged copies of the model that other callbacks keep."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        yield from (value for value in vars(callback).values() if isinstance(value, AveragedModel))
