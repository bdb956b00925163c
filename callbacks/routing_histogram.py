"""Histograms of the routing weights in TensorBoard."""

from contextlib import ExitStack
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import TensorBoardLogger
from pytorch_lightning.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from dyn_lightning.checks import check_count
from dyn_lightning.routing import named_routers, watch


class RoutingHistogram(Callback):
    """Writes, every so many steps, a histogram of the routing weights of each layer and kernel over the training batch.

    The tags are ``routing/LAYER/KERNEL``; the bins divide [0, 1] evenly and never move, so pictures can be compared.
    All ranks' samples are counted once. Routing weights that are NaN or infinite are left out and counted in
    ``routing_not_finite/LAYER``, and training goes on. A compiled model runs uncompiled in the steps that are written.

    Args:
        every_n_steps: training steps from one histogram to the next.
        bins: bins on [0, 1]; values outside are counted in the first or last.

    Raises:
        ValueError: a count below 1.
    """

    def __init__(self, every_n_steps: int = 50, bins: int = 40) -> None:
        check_count("every_n_steps", every_n_steps)
        check_count("bins", bins)
        self.every_n_steps = every_n_steps
        self.bins = bins
        self._watching = ExitStack()
        self._weights: dict[str, Tensor] = {}
        self._last_step = -1

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say once if there is nothing to write, or nowhere to."""
        self._weights, self._last_step = {}, -1  # of an earlier training
        if not named_routers(pl_module):
            rank_zero_warn("RoutingHistogram found no routed layer (routers()) in the model")
        if not _writers(trainer):
            rank_zero_warn("RoutingHistogram needs a TensorBoardLogger; without one it writes nothing")

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Watch the routers in the steps that are due."""
        due = trainer.global_step % self.every_n_steps == 0 and trainer.global_step != self._last_step
        if due and _writers(trainer):
            self._last_step = trainer.global_step
            self._weights = self._watching.enter_context(watch(pl_module))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write what was seen."""
        self._watching.close()
        for layer, weights in self._weights.items():
            self._write(trainer, layer, weights.float())
        self._weights = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the hooks away."""
        self._watching.close()

    def _write(self, trainer: Trainer, layer: str, weights: Tensor) -> None:
        finite = weights.isfinite()
        edges = torch.linspace(0, 1, self.bins + 1)
        place = (weights.nan_to_num(0).clamp(0, 1) * self.bins).long().clamp(max=self.bins - 1)
        counts = torch.zeros(weights.shape[1], self.bins, device=weights.device)
        counts.scatter_add_(1, place.T, finite.T.float())
        known = weights.where(finite, 0)
        sums = torch.stack([known.sum(0), known.square().sum(0), (~finite).sum(0).float()], dim=1)
        # Every rank takes part; only the first one writes.
        counts, sums = (trainer.strategy.reduce(values, reduce_op="sum").cpu() for values in (counts, sums))
        if not trainer.is_global_zero:
            return
        for writer in _writers(trainer):
            if sums[:, 2].any():
                writer.add_scalar(f"routing_not_finite/{layer}", sums[:, 2].sum().item(), self._last_step)
            for kernel, count in enumerate(counts):
                seen = count.nonzero().flatten().tolist() or [0]
                writer.add_histogram_raw(
                    f"routing/{layer}/{kernel}",
                    min=edges[seen[0]].item(),
                    max=edges[seen[-1] + 1].item(),
                    num=count.sum().item(),
                    sum=sums[kernel, 0].item(),
                    sum_squares=sums[kernel, 1].item(),
                    bucket_limits=edges.tolist(),
                    bucket_counts=[0, *count.tolist()],  # the first bucket ends at 0
                    global_step=self._last_step,
                )


def _writers(trainer: Trainer) -> list[SummaryWriter]:
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
