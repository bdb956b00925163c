"""What callbacks tell the user once: there is nothing to see, nowhere to draw, or weights are not finite."""

from collections.abc import Mapping
from weakref import WeakKeyDictionary

from pytorch_lightning import Trainer
from pytorch_lightning.utilities import rank_zero_warn
from torch import nn

from dyn_lightning.callbacks.pictures import step_of, takes_pictures, writers
from dyn_lightning.protocols import Routed, named_layers

_said: WeakKeyDictionary[Trainer, set[str]] = WeakKeyDictionary()


def say_once(trainer: Trainer, text: str) -> None:
    """Warn once a trainer, whatever the number of callbacks that say it."""
    said = _said.setdefault(trainer, set())
    if text not in said:
        said.add(text)
        rank_zero_warn(text)


def say_without_routed_layers(trainer: Trainer, model: nn.Module) -> None:
    """Say once if there is nothing to see."""
    if not dict(named_layers(model, Routed)):
        say_once(trainer, "the model has no routed layer (routers()): there is no routing to show")


def say_without_pictures(trainer: Trainer) -> None:
    """Say once if there is nowhere to draw."""
    if not takes_pictures(trainer):
        have = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "no logger"
        say_once(
            trainer, f"no pictures are drawn, since no logger takes them (there is {have}): add a TensorBoardLogger"
        )


def say_without_tensorboard(trainer: Trainer) -> None:
    """Say once if pictures are drawn, but there is no TensorBoard."""
    if takes_pictures(trainer) and not writers(trainer):
        say_once(trainer, "histograms, the projector and the layout of the scalars need a TensorBoardLogger")


class NotFinite:
    """Names the layers whose routing weights are NaN or infinite, once each, and ends the training if that is wanted.

    Args:
        stop: end the training after the step.
    """

    def __init__(self, stop: bool) -> None:
        self.stop = stop
        self.begin()

    def begin(self) -> None:
        """Forget which layers were named."""
        self._told: set[str] = set()

    def __call__(self, trainer: Trainer, counts: Mapping[str, int]) -> None:
        """Look at how many are not finite by layer; the counts are the same on every rank."""
        new = {layer: count for layer, count in counts.items() if count and layer not in self._told}
        self._told.update(new)
        stopping = self.stop and any(counts.values())
        if new:
            which = ", ".join(f"{layer} ({count})" for layer, count in new.items())
            end = ": the training ends here" if stopping else ""
            rank_zero_warn(f"routing weights are NaN or infinite at step {step_of(trainer)} in {which}{end}")
        trainer.should_stop = trainer.should_stop or stopping
