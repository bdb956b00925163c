"""What routing weights say about their layers.

Axis letters: n image, k kernel, c class, l layer.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

# A kernel is dead if its share stays below this part of an equal share, 1 / K, for every image.
DEAD_BELOW = 0.1


class LayerStatistics(NamedTuple):
    """What the routing weights of a layer were like. A kernel's share is its weight divided by the sum of the image's.

    Attributes:
        images: how many had finite weights.
        not_finite: how many had not, and are left out.
        entropy: of an image's shares in bits, mean over the images.
        relative_entropy: the same divided by log2 K: 1 where all kernels have the same share, 0 where one has all.
        largest: an image's largest share, mean over the images.
        load: ``(K,)``, each kernel's share, mean over the images.
        balance: 2 to the entropy of the load, divided by K: the part of the kernels that is in use.
        dead: the kernels that no image gives more than a threshold.
        class_means: ``(C, K)``, mean routing weights of each class; NaN for a class without images.
        explained: the part of the variance of the routing weights, kernels added up, that the classes explain, adjusted
            for chance (epsilon squared): 0 where classes do not differ more than random groups of images would, 1 where
            nothing else differs; NaN where nothing varies, no class has two images, or there are no labels.
    """

    images: int
    not_finite: int
    entropy: float
    relative_entropy: float
    largest: float
    load: Tensor
    balance: float
    dead: list[int]
    class_means: Tensor
    explained: float


def layer_statistics(
    weights: Tensor, labels: Tensor | None = None, num_classes: int = 0, dead_below: float = DEAD_BELOW
) -> LayerStatistics:
    """Describe the routing weights of one layer.

    Args:
        weights: ``(N, K)``, a row an image.
        labels: ``(N,)``, from 0 to C - 1, negative where it is not known, or None.
        num_classes: C; 0 where there are no labels.
        dead_below: a kernel is dead if no image's share of it is above this part of 1 / K.

    Returns:
        The statistics; NaN where no image had finite weights.

    Example:
        >>> weights = torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0], [0.5, 0.5]])
        >>> found = layer_statistics(weights, torch.tensor([0, 1, 0, 1]), 2)
        >>> found.entropy, found.load.tolist(), found.explained
        (0.5, [0.75, 0.25], 1.0)
    """
    finite = weights.isfinite().all(1)
    weights, kernels = weights[finite].double(), weights.shape[1]
    parts = shares(weights)
    bits = entropy(parts).mean().item()
    load = parts.mean(0)
    highest = parts.amax(0) if len(parts) else load
    dead = (highest <= dead_below / kernels).nonzero().flatten().tolist()
    labels = None if labels is None else labels[finite]
    class_means, explained = _by_class(weights, labels, num_classes)
    return LayerStatistics(
        images=len(weights),
        not_finite=int((~finite).sum()),
        entropy=bits,
        relative_entropy=bits / math.log2(kernels) if kernels > 1 else math.nan,
        largest=parts.amax(1).mean().item(),
        load=load,
        balance=(2 ** entropy(load) / kernels).item(),
        dead=dead,
        class_means=class_means,
        explained=explained,
    )


def shares(weights: Tensor) -> Tensor:
    """Divide routing weights, signs aside, by their sum over the kernels; where all are 0, each kernel has 1 / K."""
    size = weights.abs()
    total = size.sum(-1, keepdim=True)
    return torch.where(total > 0, size / total, 1 / weights.shape[-1])


def entropy(parts: Tensor) -> Tensor:
    """Give the entropy in bits of shares along the last axis."""
    return -torch.xlogy(parts, parts).sum(-1) / math.log(2)


def _by_class(weights: Tensor, labels: Tensor | None, num_classes: int) -> tuple[Tensor, float]:
    if labels is None:
        return weights.new_empty(0, weights.shape[1]), math.nan
    weights, labels = weights[labels >= 0], labels[labels >= 0]
    count = labels.bincount(minlength=num_classes).to(weights)
    means = weights.new_zeros(num_classes, weights.shape[1]).index_add_(0, labels, weights) / count[:, None]
    total = (weights - weights.mean(0)).square().sum().item()
    within = (weights - means[labels]).square().sum().item()
    images, classes = len(weights), int((count > 0).sum())
    if total == 0 or images == classes:
        return means, math.nan
    return means, max(0.0, 1 - within / (images - classes) * (images - 1) / total)


def similarity(layers: Mapping[str, Tensor]) -> Tensor:
    """Say how alike the layers route images: ``(L, L)``, 1 where they tell images apart in the same way, 0 unrelated.

    It is the linear CKA of Kornblith et al. (arXiv 1905.00414), the squared covariances between two layers' kernels,
    added up and divided so that a layer has 1 with itself; the order of the kernels does not matter. NaN for a layer
    whose weights do not vary.

    Args:
        layers: ``(N, K)`` by layer, of the same images. Rows that are not finite count as the layer's mean.
    """
    centered = []
    for weights in layers.values():
        finite = weights.isfinite().all(1, keepdim=True)
        known = weights.double().where(finite, 0)
        centered.append((known - known.sum(0) / finite.sum()).where(finite, 0))
    squared = torch.stack([torch.stack([(a.mT @ b).square().sum() for b in centered]) for a in centered])
    scale = squared.diagonal().sqrt()
    return squared / scale / scale[:, None]
