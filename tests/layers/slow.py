"""Norms and resizing written out, for the slow forms of the layers; one sample ``(C, H, W)`` at a time."""

import math

import torch
from torch import Tensor, nn


def norm(x: Tensor, batch_norm: nn.BatchNorm2d) -> Tensor:
    """Normalise by running statistics."""
    channels = []
    for channel, mean, variance, weight, bias in zip(
        x, batch_norm.running_mean, batch_norm.running_var, batch_norm.weight, batch_norm.bias, strict=True
    ):
        channels.append((channel - mean) / torch.sqrt(variance + batch_norm.eps) * weight + bias)
    return torch.stack(channels)


def add_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else torch.stack([channel + value for channel, value in zip(y, bias, strict=True)])


def pool(x: Tensor, window: tuple[int, int], *, partial: bool) -> Tensor:
    """Average over windows side by side; with ``partial``, over what is left at the end too."""
    count = [
        (math.ceil if partial else math.floor)(size / step) for size, step in zip(x.shape[1:], window, strict=True)
    ]
    rows = [
        torch.stack(
            [
                x[:, i * window[0] : (i + 1) * window[0], j * window[1] : (j + 1) * window[1]].mean((1, 2))
                for j in range(count[1])
            ],
            1,
        )
        for i in range(count[0])
    ]
    return torch.stack(rows, 1)


def middles(x: Tensor, layer: nn.Module) -> Tensor:
    """Give the map of the pixels from the one under the middle of the first kernel to that of the last, 0 outside."""
    if layer.padding == "same":
        return x
    first, last = [], []
    for i in range(2):
        reach = layer.dilation[i] * (layer.kernel_size[i] - 1)
        padding = 0 if layer.padding == "valid" else layer.padding[i]
        first.append(reach // 2 - padding)
        last.append(x.shape[1 + i] - 1 + padding - (reach - reach // 2))
    y = x.new_zeros(x.shape[0], last[0] - first[0] + 1, last[1] - first[1] + 1)
    for i in range(y.shape[1]):
        for j in range(y.shape[2]):
            if 0 <= first[0] + i < x.shape[1] and 0 <= first[1] + j < x.shape[2]:
                y[:, i, j] = x[:, first[0] + i, first[1] + j]
    return y
