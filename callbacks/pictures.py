"""Where pictures go, and when they are drawn."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from matplotlib.figure import Figure
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.tensorboard.writer import SummaryWriter

from dyn_lightning.analysis.figures import pixels

# While a network trains, the pictures of one callback take about this part of the time, and the first of them are
# expected to take so many seconds.
SHARE, FIRST_SECONDS = 0.005, 1.0


class Pictures:
    """Draws now, or remembers what to draw until the end of the training.

    Args:
        every: draw one of so many times; infinity draws at the end alone, None as often as takes 0.5 % of the time.
    """

    def __init__(self, every: float | None) -> None:
        self.every = every
        self.begin()

    def begin(self) -> None:
        """Start the clock, at the beginning of a training."""
        self._offered = 0
        self._draw: Callable[[], None] | None = None
        self._start = time.monotonic()
        self._spent, self._takes = 0.0, FIRST_SECONDS

    def offer(self, trainer: Trainer, draw: Callable[[], None]) -> None:
        """Take what is to be drawn, in the place of what was not drawn so far; outside of a training it is drawn now.

        Only the first process draws, and only if a logger takes pictures.
        """
        if not trainer.is_global_zero or not takes_pictures(trainer):
            return
        self._draw = draw
        self._offered += 1
        enough_time = self._spent + self._takes <= SHARE * (time.monotonic() - self._start)
        due = enough_time if self.every is None else self._offered % self.every == 0
        if due or trainer.state.fn != TrainerFn.FITTING:
            self.end()

    def end(self) -> None:
        """Draw what was not drawn so far."""
        draw, self._draw = self._draw, None
        if draw is not None:
            start = time.monotonic()
            with _nothing_else_collected(), forgiving():
                draw()
            self._takes = time.monotonic() - start
            self._spent += self._takes


@contextmanager
def _nothing_else_collected() -> Iterator[None]:
    """Let garbage collection look at what drawing makes alone: it makes so much that torch's would be looked at too."""
    if gc.get_freeze_count():  # what a user set aside would come back with the rest
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.collect()
        gc.unfreeze()


@contextmanager
def forgiving() -> Iterator[None]:
    """Let a picture that cannot be drawn be a warning: it is not worth a training."""
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"a picture could not be drawn: {type(error).__name__}: {error}")


def step_of(trainer: Trainer) -> int:
    """Give the step that Lightning logs scalars with."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def writers(trainer: Trainer) -> list[SummaryWriter]:
    """Give TensorBoard's writers."""
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def takes_pictures(trainer: Trainer) -> bool:
    """Say whether a logger takes pictures: TensorBoard's, and those with ``log_image(key, images, step=...)``."""
    return any(isinstance(logger, TensorBoardLogger) or hasattr(logger, "log_image") for logger in trainer.loggers)


def log_image(trainer: Trainer, tag: str, image: np.ndarray, step: int) -> None:
    """Give a picture to each logger that takes them.

    Args:
        trainer: of the run.
        tag: the picture's name.
        image: ``(H, W, 3)``, bytes.
        step: the training step that it belongs to.
    """
    for writer in writers(trainer):
        writer.add_image(tag, image, step, dataformats="HWC")
    for logger in trainer.loggers:
        if hasattr(logger, "log_image"):
            logger.log_image(key=tag, images=[image], step=step)


def log_figure(trainer: Trainer, tag: str, draw: Callable[[], Figure], step: int) -> None:
    """Draw a figure, and give it to each logger that takes pictures."""
    with forgiving():
        log_image(trainer, tag, pixels(draw()), step)
