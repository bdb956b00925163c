"""The images that each kernel is used for most, as in CondConv's paper (arXiv 1904.04971)."""

from functools import partial

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor

from dyn_lightning.analysis import figures
from dyn_lightning.analysis.statistics import shares
from dyn_lightning.callbacks.batches import class_names
from dyn_lightning.callbacks.notices import say_once
from dyn_lightning.callbacks.pictures import log_figure, step_of, takes_pictures
from dyn_lightning.callbacks.routing_observer import RoutingObserver, Seen
from dyn_lightning.checks import check_count

MOST = 24  # images in a row
LAYERS = 2  # where the user names none: the first and the last


class ExpertExamples(RoutingObserver):
    """Draws, for each kernel of some layers, the images that give it the largest share of their routing weights.

    The figures are ``expert_examples/LAYER`` (of the test, ``test_expert_examples/LAYER``), a row a kernel, with the
    class and the share below each image. They are drawn at the end of a training, and from time to time before, as
    ``RoutingReport`` does. Pixels are shown as they were before normalisation where the data module has ``mean`` and
    ``std``, else each image is stretched to its range.

    Args:
        layers: globs over the names of layers; None takes the first and the last.
        images_per_expert: how many images a kernel.
        max_images: among how many, at equal distances (see ``RoutingObserver``, also for the memory).
        side: rows and columns of an image as it is shown, at most.
        split: the evaluation to watch: ``"val"`` or ``"test"``.
        every_n_evaluations: draw after every so many evaluations instead, whatever it takes.

    Raises:
        ValueError: a count below 1, more than 24 images a kernel, an unknown split, or a glob that matches no layer.
    """

    def __init__(
        self,
        layers: list[str] | None = None,
        images_per_expert: int = 8,
        max_images: int = 2_000,
        side: int = 48,
        split: str = "val",
        every_n_evaluations: int | None = None,
    ) -> None:
        check_count("images_per_expert", images_per_expert)
        if images_per_expert > MOST:
            raise ValueError(
                f"images_per_expert={images_per_expert} must be at most {MOST}, or nobody can read the figure"
            )
        check_count("side", side)
        super().__init__(max_images, split, every_n_evaluations, side, layers)
        self.images_per_expert = images_per_expert

    def wanted(self, trainer: Trainer) -> bool:
        """Say whether a logger takes pictures."""
        return takes_pictures(trainer)

    def finish(self, trainer: Trainer, pl_module: LightningModule, seen: Seen) -> None:
        """Draw if it is time."""
        if seen.images is None:
            say_once(trainer, "ExpertExamples draws nothing: the batches have no images (B, C, H, W)")
            return
        names = list(seen.weights) if self.layers else figures.spread(list(seen.weights), LAYERS)
        self.pictures.offer(trainer, partial(self._draw, trainer, step_of(trainer), names, seen))

    def _draw(self, trainer: Trainer, step: int, layers: list[str], seen: Seen) -> None:
        assert seen.images is not None
        for layer in layers:
            best, rows = largest_shares(seen.weights[layer], self.images_per_expert)
            labels = torch.full_like(rows, -1) if seen.labels is None else seen.labels[rows]
            draw = partial(figures.examples, layer, seen.images[rows], best, labels, class_names(trainer))
            log_figure(trainer, f"{self.prefix}expert_examples/{layer}", draw, step)


def largest_shares(weights: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Find the images that give a kernel the largest share of their routing weights.

    Args:
        weights: ``(N, K)``; images whose weights are not finite come last, with NaN.
        count: k, images a kernel; fewer where there are fewer.

    Returns:
        Shares and images' numbers, each ``(K, k)``.

    Example:
        >>> largest_shares(torch.tensor([[1.0, 3.0], [1.0, 0.0], [1.0, 1.0]]), 2)[1]
        tensor([[1, 2],
                [0, 2]])
    """
    finite = weights.isfinite().all(1, keepdim=True)
    found = shares(weights).where(finite, -1).topk(min(count, len(weights)), dim=0)
    return found.values.where(found.values >= 0, torch.nan).T, found.indices.T
