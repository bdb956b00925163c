"""What the routing weights of an evaluation say about each layer, in scalars and figures."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from statistics import fmean

from pytorch_lightning import LightningModule, Trainer

from dyn_lightning.analysis import figures
from dyn_lightning.analysis.statistics import DEAD_BELOW, LayerStatistics, layer_statistics, similarity
from dyn_lightning.callbacks.batches import class_names
from dyn_lightning.callbacks.notices import NotFinite
from dyn_lightning.callbacks.pictures import log_figure, step_of
from dyn_lightning.callbacks.routing_observer import RoutingObserver, Seen

# The scalars of a layer.
KINDS: dict[str, Callable[[LayerStatistics], float]] = {
    "entropy": lambda each: each.relative_entropy,
    "entropy_bits": lambda each: each.entropy,
    "largest": lambda each: each.largest,
    "balance": lambda each: each.balance,
    "dead": lambda each: len(each.dead),
    "classes": lambda each: each.explained,
    "not_finite_images": lambda each: each.not_finite,
}


class RoutingReport(RoutingObserver):
    """Logs, after each evaluation, how the layers route images.

    Scalars: ``routing_images`` (how many were looked at), and of each layer, as ``routing_entropy/LAYER`` and so on,
    ``routing_entropy`` (over log2 K: 1 where all kernels are equal, 0 where one has all), ``routing_entropy_bits``,
    ``routing_largest`` (share of an image's largest kernel), ``routing_balance`` (part of the kernels in use),
    ``routing_dead`` (kernels that no image uses), ``routing_classes`` (how much of the variance the classes explain;
    where there are labels) and ``routing_not_finite_images``; see ``LayerStatistics``. Without a layer's name each is
    the mean over the layers, which callbacks like EarlyStopping can monitor, also without a logger. Figures:
    ``routing_report/depth`` (entropy, difference between classes and load of the kernels), ``similarity`` and
    ``classes``. All begin with ``test_`` where it is the test that is reported.

    While a network trains, drawing takes about 0.5 % of the time; the last evaluation is always drawn, at the end.
    Scalars go to all loggers, figures to TensorBoard's and those with ``log_image(key, images, step)``.

    Args:
        max_images: how many are looked at, at equal distances (see ``RoutingObserver``, also for the memory).
        split: the evaluation to report: ``"val"`` or ``"test"``.
        every_n_evaluations: draw after every so many evaluations instead, whatever it takes.
        dead_below: a kernel is dead if no image gives it more than this part of an equal share, 1 / K.
        stop_when_not_finite: whether NaN or infinite routing weights end the training, else it goes on.

    Raises:
        ValueError: a count below 1, an unknown split, or a ``dead_below`` that is not from 0 to 1.
    """

    def __init__(
        self,
        max_images: int = 10_000,
        split: str = "val",
        every_n_evaluations: int | None = None,
        dead_below: float = DEAD_BELOW,
        stop_when_not_finite: bool = False,
    ) -> None:
        super().__init__(max_images, split, every_n_evaluations)
        if not 0 <= dead_below <= 1:
            raise ValueError(f"dead_below={dead_below} must be from 0 to 1, a part of an equal share")
        self.dead_below = dead_below
        self._not_finite = NotFinite(stop_when_not_finite)

    def wanted(self, trainer: Trainer) -> bool:
        """The means can be monitored even without a logger."""
        return True

    def finish(self, trainer: Trainer, pl_module: LightningModule, seen: Seen) -> None:
        """Log the scalars, and draw if it is time."""
        names = class_names(trainer)
        count = 0 if seen.labels is None else max(len(names), int(seen.labels.max()) + 1)
        layers = {
            name: layer_statistics(weights, seen.labels, count, self.dead_below)
            for name, weights in seen.weights.items()
        }
        images = len(next(iter(seen.weights.values())))
        scalars = {f"{self.prefix}routing_{kind}": _by_layer(layers, kind) for kind in KINDS}
        means = {tag: fmean(values.values()) for tag, values in scalars.items() if values}
        # They are the same on every rank, so the mean over the ranks is the value.
        pl_module.log_dict({f"{self.prefix}routing_images": float(images), **means}, sync_dist=True)
        each = {f"{tag}/{name}": value for tag, values in scalars.items() for name, value in values.items()}
        for logger in trainer.loggers if trainer.is_global_zero else []:
            logger.log_metrics(each, step=step_of(trainer))  # by pl_module.log they would take longer than all the rest
        self._not_finite(trainer, {name: each.not_finite for name, each in layers.items()})
        self.pictures.offer(trainer, partial(self._draw, trainer, step_of(trainer), layers, seen))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin anew."""
        super().on_fit_start(trainer, pl_module)
        self._not_finite.begin()

    def _draw(self, trainer: Trainer, step: int, layers: dict[str, LayerStatistics], seen: Seen) -> None:
        names, report = list(layers), f"{self.prefix}routing_report"
        log_figure(trainer, f"{report}/depth", lambda: figures.depth(layers), step)
        if len(names) > 1:
            matrix = similarity(seen.weights)
            log_figure(trainer, f"{report}/similarity", lambda: figures.similarity(matrix, names), step)
        if all(len(each.class_means) for each in layers.values()):
            named = class_names(trainer)
            log_figure(trainer, f"{report}/classes", lambda: figures.classes(layers, named), step)


def _by_layer(layers: Mapping[str, LayerStatistics], kind: str) -> dict[str, float]:
    """Give one scalar of each layer, without those that nobody knows."""
    values = {name: KINDS[kind](each) for name, each in layers.items()}
    return {name: value for name, value in values.items() if not math.isnan(value)}
