"""DO-Conv: Depthwise Over-parameterized Convolutional Layer (Cao et al., IEEE TIP 2022), arXiv 2006.12030."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn_lightning.checks import Pair, as_geometry, check_channels, check_count
from dyn_lightning.conv2d import conv2d_arguments, conv2d_repr, copy_bias_
from dyn_lightning.per_sample.tracing import without_autocast


class DOConv2d(nn.Module):
    """Convolve with ``D o W``, a kernel W whose elements are mixed for each input channel by a matrix D.

    ``kernel[o, i, m] = sum_s (I + D)[i, m, s] W[o, i, s]``, where m runs over the kernel's elements. D starts at 0, so
    that the layer starts as a plain convolution, and weight decay pulls it back to that. Training is easier with more
    parameters; ``fold`` gives the plain convolution of the same output and cost. A 1x1 kernel has no D. With groups, i
    counts all input channels, as a depthwise convolution before a grouped one has it (the official code differs there).

    Args:
        in_channels: as in ``nn.Conv2d``, like all arguments before the star.
        out_channels: channels of the output.
        kernel_size: rows and columns of the kernel.
        stride: step of the kernel.
        padding: zeros around the input, or ``"same"`` or ``"valid"``.
        dilation: distance of the kernel's elements.
        groups: groups of channels.
        bias: whether there is a bias.
        depth_multiplier: elements of W for each pair of channels, at least the kernel's area; None is the area.

    Shape:
        ``(B, C_in, H, W)`` to ``(B, C_out, H', W')`` as in ``nn.Conv2d``. ``W`` is
        ``(C_out, C_in / groups, depth_multiplier)``, ``D`` is ``(C_in, kH kW, depth_multiplier)``.

    Raises:
        ValueError: a depth_multiplier below the kernel's area, groups that do not divide the channels, a count below 1,
            an unknown padding.

    Example:
        >>> layer = DOConv2d(4, 6, 3, padding=1)
        >>> layer(torch.randn(2, 4, 7, 6)).shape
        torch.Size([2, 6, 7, 6])
        >>> layer.fold()
        Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1))
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | Pair,
        stride: int | Pair = 1,
        padding: int | Pair | str = 0,
        dilation: int | Pair = 1,
        groups: int = 1,
        bias: bool = True,
        *,
        depth_multiplier: int | None = None,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = as_geometry(kernel_size, stride, padding, dilation)
        area = math.prod(self.kernel_size)
        elements = area if depth_multiplier is None else depth_multiplier
        check_count("depth_multiplier", elements)
        if area == 1:
            elements = 1
        if elements < area:
            raise ValueError(
                f"depth_multiplier={depth_multiplier} must be at least the kernel's area, {area} for "
                f"kernel_size={self.kernel_size}: leave it out to have just that"
            )
        self.W = nn.Parameter(torch.empty(out_channels, in_channels // groups, elements))
        self.D = nn.Parameter(torch.zeros(in_channels, area, elements)) if area > 1 else None
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        nn.init.kaiming_uniform_(self.W, a=math.sqrt(5))
        if self.bias is not None:
            bound = 1 / math.sqrt(in_channels // groups * elements)
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(B, C_in, H, W)``."""
        return F.conv2d(x, self.kernel(), self.bias, self.stride, self.padding, self.dilation, self.groups)

    def kernel(self) -> Tensor:
        """Compose ``D o W``, ``(C_out, C_in / groups, kH, kW)``."""
        if self.D is None:
            return self.W.unflatten(2, self.kernel_size)
        area, elements = self.D.shape[1:]
        identity = torch.eye(area, dtype=self.D.dtype, device=self.D.device).repeat(1, elements // area)
        # As often as it fits; what remains of the elements starts without a part in the kernel.
        identity = F.pad(identity, (0, elements % area))
        D = (identity + self.D).unflatten(0, (self.groups, -1))
        W = self.W.unflatten(0, (self.groups, -1))
        with without_autocast(W):  # a kernel is composed in full precision
            return torch.einsum("gims,gois->goim", D, W).flatten(0, 1).unflatten(2, self.kernel_size)

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """Give the plain convolution of the same output."""
        conv = nn.Conv2d(**conv2d_arguments(self)).to(self.W)
        conv.weight.copy_(self.kernel())
        copy_bias_(conv, self)
        return conv

    @classmethod
    @torch.no_grad()
    def from_conv(cls, conv: nn.Conv2d, *, depth_multiplier: int | None = None) -> "DOConv2d":
        """Build the layer from a trained convolution, with the same output: D = 0, W the kernel.

        Args:
            conv: the trained convolution.
            depth_multiplier: elements of W for each pair of channels.

        Raises:
            ValueError: a padding mode other than zeros, a depth_multiplier below the kernel's area.
        """
        layer = cls(**conv2d_arguments(conv), depth_multiplier=depth_multiplier).to(conv.weight)
        area = math.prod(layer.kernel_size)
        repeats = layer.W.shape[2] // area
        layer.W[:, :, : repeats * area] = conv.weight.flatten(2).repeat(1, 1, repeats) / repeats
        copy_bias_(layer, conv)
        return layer

    def extra_repr(self) -> str:
        """Describe the layer inside its name."""
        return f"{conv2d_repr(self)}, depth_multiplier={self.W.shape[2]}"
