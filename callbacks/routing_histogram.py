"""Histograms of the routing weights in TensorBoard."""

from contextlib import ExitStack
from itertools import pairwise
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor

from dyn_lightning.callbacks.notices import (
    NotFinite,
    say_without_pictures,
    say_without_routed_layers,
    say_without_tensorboard,
)
from dyn_lightning.callbacks.pictures import step_of, writers
from dyn_lightning.checks import check_count
from dyn_lightning.routing import watch


class RoutingHistogram(Callback):
    """Writes, every so many steps, a histogram of the routing weights of each layer and kernel over the training batch.

    The tags are ``routing/LAYER/KERNEL``; TensorBoard also shows them as distributions over time. The bins divide
    [0, 1] evenly and never move, so pictures can be compared. All ranks' samples are counted once. Routing weights that
    are NaN or infinite are left out, counted in ``routing_not_finite/LAYER``, and the layer is named once. A compiled
    model runs uncompiled in the steps that are written. Other loggers than TensorBoard's get the counts alone.

    Args:
        every_n_steps: training steps from one histogram to the next.
        bins: bins on [0, 1]; values outside are counted in the first or last.
        stop_when_not_finite: whether NaN or infinity ends the training, else it goes on.

    Raises:
        ValueError: a count below 1.
    """

    def __init__(self, every_n_steps: int = 50, bins: int = 40, stop_when_not_finite: bool = False) -> None:
        check_count("every_n_steps", every_n_steps)
        check_count("bins", bins)
        self.every_n_steps = every_n_steps
        self.bins = bins
        self.stop_when_not_finite = stop_when_not_finite
        self._watching = ExitStack()
        self._weights: dict[str, Tensor] | None = None  # while the routers are watched
        self._last_step = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say once if there is nothing to write, or nowhere to."""
        self._stop()
        self._last_step = -1  # of an earlier training
        self._not_finite = NotFinite(self.stop_when_not_finite)
        say_without_routed_layers(trainer, pl_module)
        say_without_pictures(trainer)
        say_without_tensorboard(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the routers in the steps that are due."""
        step = step_of(trainer)
        due = step % self.every_n_steps == 0 and step != self._last_step
        if due and (self.stop_when_not_finite or trainer.loggers):
            self._last_step = step
            self._weights = self._watching.enter_context(watch(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write what was seen."""
        if self._weights is not None:
            self._write(trainer, {layer: self._count(weights.float()) for layer, weights in self._weights.items()})
        self._stop()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the hooks away where a model left out the rest of the epoch."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks away."""
        self._stop()

    def _stop(self) -> None:
        self._watching.close()
        self._weights = None

    def _write(self, trainer: Trainer, tables: dict[str, Tensor]) -> None:
        if trainer.world_size > 1:  # every rank takes part; a layer may have run on some of them alone
            everywhere: list[dict[str, Tensor]] = [{}] * trainer.world_size
            torch.distributed.all_gather_object(everywhere, tables)
            tables = {}
            for layer, table in (item for of_rank in everywhere for item in of_rank.items()):
                tables[layer] = tables[layer] + table if layer in tables else table
        bad = {layer: int(table[:, 0].sum()) for layer, table in tables.items()}
        self._not_finite(trainer, bad)
        if not trainer.is_global_zero:
            return
        counts_of_bad = {f"routing_not_finite/{layer}": float(count) for layer, count in bad.items() if count}
        for logger in trainer.loggers if counts_of_bad else []:
            logger.log_metrics(counts_of_bad, step=self._last_step)
        edges = torch.linspace(0, 1, self.bins + 1).tolist()
        for writer in writers(trainer):
            for layer, table in tables.items():
                for kernel, (_, total, squares, *counts) in enumerate(table.tolist()):
                    seen = [place for place, count in enumerate(counts) if count] or [0]
                    # Empty bins before all others, and after them, are written as one: TensorBoard takes 0.1 ms a
                    # kilobyte. Its server ends the last bucket at the maximum, so the last bin has one of its own: the
                    # axis reaches its beginning.
                    places = sorted({0, *range(seen[0], seen[-1] + 2), self.bins - 1, self.bins})
                    writer.add_histogram_raw(
                        f"routing/{layer}/{kernel}",
                        min=edges[seen[0]],
                        max=edges[seen[-1] + 1],
                        num=sum(counts),
                        sum=total,
                        sum_squares=squares,
                        bucket_limits=[edges[place] for place in places],
                        # The first bucket ends at 0.
                        bucket_counts=[0, *(sum(counts[begin:end]) for begin, end in pairwise(places))],
                        global_step=self._last_step,
                    )

    def _count(self, weights: Tensor) -> Tensor:
        """Give, a row a kernel, how many are not finite, sum, sum of squares, and the count of each bin; on the CPU."""
        finite = weights.isfinite()
        place = (weights.nan_to_num(0).clamp(0, 1) * self.bins).long().clamp(max=self.bins - 1)
        counts = torch.zeros(weights.shape[1], self.bins, device=weights.device)
        counts.scatter_add_(1, place.T, finite.T.float())
        known = weights.where(finite, 0)
        sums = torch.stack([(~finite).sum(0), known.sum(0), known.square().sum(0)], dim=1)
        return torch.cat([sums, counts], dim=1).cpu()
