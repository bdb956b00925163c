"""Ghost module: GhostNet: More Features from Cheap Operations (Han et al., CVPR 2020), arXiv 1911.11907."""

import math

import torch
from torch import Tensor, nn

from dyn_lightning.checks import Pair, as_geometry, check_batched, check_channels, check_count
from dyn_lightning.conv2d import (
    BatchNorm2d,
    add_bias,
    conv2d_arguments,
    conv2d_repr,
    copy_bias_,
    copy_first_kernels_,
    in_format_of,
)


class GhostConv2d(nn.Module):
    """Convolve to C_out / s intrinsic maps, and make the others from them by a cheap depthwise convolution.

    ``y = concat(Y', cheap(Y'))[:C_out]``, ``Y' = primary(x)``. As in the authors' code both are convolutions without
    bias, followed by batch norm and ReLU; ``bias`` is added to the output. Worth its while for dense convolutions only.

    Args:
        in_channels: as in ``nn.Conv2d``, like all arguments before the star.
        out_channels: channels of the output.
        kernel_size: rows and columns of the primary kernel.
        stride: step of the primary kernel, like the next two; the cheap convolution takes none of them.
        padding: zeros around the input, or ``"same"`` or ``"valid"``.
        dilation: distance of the primary kernel's elements.
        groups: of the primary convolution.
        bias: whether there is a bias.
        ratio: s, all maps per intrinsic one, 2 or more.
        cheap_kernel_size: d, rows and columns of the cheap kernels, odd.
        relu: whether each batch norm has a ReLU behind it.

    Shape:
        ``(B, C_in, H, W)`` to ``(B, C_out, H', W')`` as in ``nn.Conv2d``.

    Raises:
        ValueError: groups that do not divide C_in, C_out and the intrinsic channels, a C_out or ratio below 2, an even
            cheap_kernel_size, a count below 1, an unknown padding.

    Example:
        >>> GhostConv2d(4, 6, 3, padding=1)(torch.randn(2, 4, 7, 6)).shape
        torch.Size([2, 6, 7, 6])
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
        ratio: int = 2,
        cheap_kernel_size: int = 3,
        relu: bool = True,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        check_count("ratio", ratio, least=2)
        check_count("cheap_kernel_size", cheap_kernel_size)
        if cheap_kernel_size % 2 == 0:
            raise ValueError(f"cheap_kernel_size={cheap_kernel_size} must be odd, or the maps would change their size")
        if out_channels < 2:
            raise ValueError(f"out_channels={out_channels} must be at least 2, or there are no ghosts: use nn.Conv2d")
        intrinsic = math.ceil(out_channels / ratio)
        if intrinsic % groups:
            raise ValueError(
                f"groups={groups} must divide the {intrinsic} intrinsic channels, out_channels={out_channels} / ratio="
                f"{ratio} rounded up: take another ratio, or groups=1"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = as_geometry(kernel_size, stride, padding, dilation)
        self.ratio = ratio
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation, groups)
        self.primary = nn.Sequential(
            nn.Conv2d(in_channels, intrinsic, *geometry, bias=False),
            BatchNorm2d(intrinsic),
            nn.ReLU() if relu else nn.Identity(),
        )
        ghosts = intrinsic * (ratio - 1)
        self.cheap = nn.Sequential(
            nn.Conv2d(intrinsic, ghosts, cheap_kernel_size, padding="same", groups=intrinsic, bias=False),
            BatchNorm2d(ghosts),
            nn.ReLU() if relu else nn.Identity(),
        )
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(B, C_in, H, W)``."""
        check_batched(x.shape)
        intrinsic = self.primary(x)
        y = torch.cat([intrinsic, self.cheap(intrinsic)], 1)[:, : self.out_channels]
        return in_format_of(x, add_bias(y, self.bias))

    @classmethod
    @torch.no_grad()
    def from_conv(
        cls, conv: nn.Conv2d, *, ratio: int = 2, cheap_kernel_size: int = 3, relu: bool = True
    ) -> "GhostConv2d":
        """Build the layer from a trained convolution; the output is not the same, since half of it has to be made anew.

        The intrinsic maps start from the convolution's first kernels, and the bias is kept.

        Args:
            conv: the trained convolution.
            ratio: s.
            cheap_kernel_size: d.
            relu: whether each batch norm has a ReLU behind it.

        Raises:
            ValueError: a padding mode other than zeros, or what the constructor refuses.
        """
        arguments = conv2d_arguments(conv)
        layer = cls(**arguments, ratio=ratio, cheap_kernel_size=cheap_kernel_size, relu=relu).to(conv.weight)
        copy_first_kernels_(layer.primary[0], conv)
        copy_bias_(layer, conv)
        return layer

    def extra_repr(self) -> str:
        """Describe the layer inside its name."""
        return f"{conv2d_repr(self)}, ratio={self.ratio}"
