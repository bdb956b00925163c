"""Where pictures go, and when they are drawn."""

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from weakref import WeakSet

import numpy as np
from matplotlib.figure import Figure
from pytorch_lightning import Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.trainer.states import TrainerFn
from pytorch_lightning.utilities import rank_zero_warn
from torch.utils.tensorboard.writer import SummaryWriter

from dyn_lightning.analysis.figures import pixels

# While a network trains, the pictures of one callback take at most this part of the time, and are expected to take so
# many seconds at first.
SHARE, FIRST_SECONDS = 0.005, 1.0


class Pictures:
    """Draws now, or remembers what to draw until the end of the training.

    Args:
        every: draw each so-manieth time; None draws as often as takes at most 0.5 % of the training's time.
    """

    def __init__(self, every: int | None) -> None:
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
            try:
                with _no_collection():
                    draw()
            except Exception as error:  # a picture is not worth a training
                rank_zero_warn(f"a picture could not be drawn: {type(error).__name__}: {error}")
            self._takes = time.monotonic() - start
            self._spent += self._takes


@contextmanager
def _no_collection() -> Iterator[None]:
    """Let garbage wait: drawing makes so many small objects that all of torch's would be gone through repeatedly."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def step_of(trainer: Trainer) -> int:
    """Give the step that Lightning logs with: that of the last training batch; outside of a training, of the next."""
    return max(0, trainer.global_step - (trainer.state.fn == TrainerFn.FITTING))


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


def log_figure(trainer: Trainer, tag: str, figure: Figure, step: int) -> None:
    """Draw a figure, and give it to each logger that takes pictures."""
    log_image(trainer, tag, pixels(figure), step)


_told: WeakSet[Trainer] = WeakSet()


def warn_without_pictures(trainer: Trainer) -> None:
    """Say once, whatever the number of callbacks, if no logger takes pictures."""
    if not takes_pictures(trainer) and trainer not in _told:
        _told.add(trainer)
        have = ", ".join(type(logger).__name__ for logger in trainer.loggers) or "no logger"
        rank_zero_warn(f"no pictures are drawn, since no logger takes them (there is {have}): add a TensorBoardLogger")
