"""Small copies of the images that go through a network, to look at."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def thumbnails(
    images: Tensor, side: int, mean: float | Sequence[float] | None = None, std: float | Sequence[float] | None = None
) -> Tensor:
    """Make small pictures of a network's input.

    Args:
        images: ``(B, C, H, W)``; bytes are shown as they are, other than one or three channels as their mean, in grey.
        side: rows and columns of the longer side; smaller images stay as they are.
        mean: what was subtracted from pixels in [0, 1]; None stretches each image from its least to its greatest value.
        std: what they were divided by.

    Returns:
        ``(B, 3, h, w)``, bytes.

    Example:
        >>> thumbnails(torch.randn(2, 1, 56, 28), 32).shape
        torch.Size([2, 3, 32, 16])
    """
    raw, images = images.dtype == torch.uint8, images.detach().float()
    if raw:
        images = images / 255
    elif mean is not None and std is not None:
        shift, scale = (torch.as_tensor(value).to(images).reshape(-1, 1, 1) for value in (mean, std))
        images = images * scale + shift
    else:
        finite = images.isfinite()
        least = images.where(finite, torch.inf).amin((1, 2, 3), keepdim=True)
        most = images.where(finite, -torch.inf).amax((1, 2, 3), keepdim=True)
        images = (images - least) / (most - least).clamp(min=1e-12)
    if images.shape[1] != 3:
        images = images.mean(1, keepdim=True)
    part = side / max(images.shape[2:])
    if part < 1:
        size = [max(1, round(length * part)) for length in images.shape[2:]]
        images = F.interpolate(images, size, mode="area")
    return (images.nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8).cpu().expand(-1, 3, -1, -1)


def squared(images: Tensor, side: int | None = None) -> Tensor:
    """Fill images ``(..., h, w)``, bytes, with white up to squares of ``side``, or of their longer side."""
    height, width = images.shape[-2:]
    side = side or max(height, width)
    return F.pad(images, (0, side - width, 0, side - height), value=255)
