"""What happens when routing weights are NaN or infinite."""

from collections.abc import Mapping

from pytorch_lightning import Trainer
from pytorch_lightning.utilities import rank_zero_warn

from dyn_lightning.callbacks.pictures import step_of


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
