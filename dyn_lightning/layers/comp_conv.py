"""CompConv: A Compact Convolution Module for Efficient Feature Learning (Zhang et al., CVPR Workshops 2021),
arXiv 2106.10486. There is no official code; what the paper leaves open is an option here.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn_lightning.checks import Pair, as_geometry, check_batched, check_channels, check_count
from dyn_lightning.conv2d import (
    add_bias,
    conv2d_arguments,
    conv2d_repr,
    copy_bias_,
    copy_first_kernels_,
    in_format_of,
    under_kernels,
)


class CompConv2d(nn.Module):
    """Convolve to few channels, then double them d times: one half is copied or cheap, the other convolved.

    With ``c = ceil(C_out / (2 (2^d - 1)))`` and ``X`` the input: ``y_1 = [X's next c channels, conv_1(X)]``,
    ``y_i = [X's next 2^(i-1) c channels, conv_i(y_(i-1))]``, ``y_d = [tail(y_(d-1)), conv_d(y_(d-1))]``; all are
    concatenated, the last channels of the tail dropped where there are more than C_out, and shuffled. For d = 1 the
    tail works on ``conv_1(X)``, which with a depthwise tail is the Ghost module's arrangement. There is no norm and no
    activation inside: the equations have none, and the network has its own behind the layer.

    Args:
        in_channels: as in ``nn.Conv2d``, like all arguments before the star.
        out_channels: channels of the output.
        kernel_size: rows and columns of all kernels.
        stride: step of the first kernel, like the next one; the others keep the size of the map.
        padding: zeros around the input, or ``"same"`` or ``"valid"``.
        dilation: of all kernels.
        groups: of all convolutions.
        bias: whether there is a bias, added to the output.
        depth: d; None is the paper's ``min(3, floor(log2(max(1, C_in / base_channels))) + 1)``.
        base_channels: C_0, 128 in the paper's CompConv128.
        tail: ``"depthwise"``, the cost that the paper prints, or ``"full"``, which is the cost if its last term is
            squared.
        copy: how copied channels get the size of the output: ``"pool"`` averages over the stride, ``"slice"`` takes
            every stride-th pixel.
        shuffle: groups of the channel shuffle, 1 is none; the part of the number that divides C_out is taken.

    Shape:
        ``(B, C_in, H, W)`` to ``(B, C_out, H', W')`` as in ``nn.Conv2d``.

    Raises:
        ValueError: more copied channels than C_in, so few output channels that nothing is left for the tail, groups
            that do not divide C_in and c, an unknown tail, copy or padding, a count below 1.

    Example:
        >>> CompConv2d(4, 6, 3, padding=1, depth=2)(torch.randn(2, 4, 7, 6)).shape
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
        depth: int | None = None,
        base_channels: int = 128,
        tail: str = "depthwise",
        copy: str = "pool",
        shuffle: int = 2,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        check_count("base_channels", base_channels)
        check_count("shuffle", shuffle)
        if depth is None:
            depth = min(3, int(math.log2(max(1, in_channels / base_channels))) + 1)
        check_count("depth", depth)
        if tail not in ("depthwise", "full"):
            raise ValueError(f"tail={tail!r} must be 'depthwise' or 'full'")
        if copy not in COPIES:
            raise ValueError(f"copy={copy!r} must be one of {list(COPIES)}")
        primary = -(-out_channels // (2 * (2**depth - 1)))  # rounded up
        copied = (2 ** (depth - 1) - 1) * primary
        if copied > in_channels:
            raise ValueError(
                f"depth={depth} copies {copied} channels for out_channels={out_channels}, but in_channels="
                f"{in_channels} has not so many: take a smaller depth, 1 copies none"
            )
        tail_channels = out_channels - (3 * 2 ** (depth - 1) - 2) * primary
        if tail_channels < 1:
            raise ValueError(
                f"depth={depth} makes {out_channels - tail_channels} channels without the tail, which leaves nothing "
                f"for it in out_channels={out_channels}: take a smaller depth, or leave the layer static"
            )
        if primary % groups:
            raise ValueError(
                f"groups={groups} must divide the {primary} channels of the first convolution, ceil(out_channels / "
                f"{2 * (2**depth - 1)}) of out_channels={out_channels}: take another depth, or groups=1"
            )
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = as_geometry(kernel_size, stride, padding, dilation)
        self.depth, self.copy, self.shuffle = depth, copy, math.gcd(shuffle, out_channels)
        self.tail_channels = tail_channels  # that are kept
        self.widths = [2**i * primary for i in range(depth)]  # of conv_1 ... conv_d
        geometry = (self.kernel_size, self.stride, self.padding, self.dilation, groups)
        self.convs = nn.ModuleList([nn.Conv2d(in_channels, primary, *geometry, bias=False)])
        self.convs.extend(self._same_size(width, groups) for width in self.widths[1:])
        self.tail = self._same_size(self.widths[-1], self.widths[-1] if tail == "depthwise" else groups)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(B, C_in, H, W)``."""
        check_batched(x.shape)
        conv, *convs = self.convs
        y, ys = conv(x), []
        for copied, conv in zip(self._copies(x), convs, strict=True):
            ys.append(torch.cat([copied.to(y.dtype), y], 1))
            y = conv(ys[-1])
        tail = self.tail(ys[-1] if ys else y)[:, : self.tail_channels]
        y = torch.cat([*ys, tail, y], 1)
        y = y.unflatten(1, (self.shuffle, -1)).transpose(1, 2).flatten(1, 2)
        return in_format_of(x, add_bias(y, self.bias))

    def _same_size(self, channels: int, groups: int) -> nn.Conv2d:
        return nn.Conv2d(channels, channels, self.kernel_size, 1, "same", self.dilation, groups, bias=False)

    def _copies(self, x: Tensor) -> tuple[Tensor, ...]:
        """Cut the copied channels, for all doublings but the last, in the size of the output."""
        widths = self.widths[:-1]
        if not widths:
            return ()
        pixels = under_kernels(x[:, : sum(widths)], self.kernel_size, self.padding, self.dilation)
        return COPIES[self.copy](pixels, self.stride).split(widths, 1)

    @classmethod
    @torch.no_grad()
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        depth: int | None = None,
        base_channels: int = 128,
        tail: str = "depthwise",
        copy: str = "pool",
        shuffle: int = 2,
    ) -> "CompConv2d":
        """Build the layer from a trained convolution; the output is not the same: most of it is made in another way.

        The first convolution starts from the convolution's first kernels of each group, and the bias is kept.

        Args:
            conv: the trained convolution.
            depth: d.
            base_channels: C_0.
            tail: ``"depthwise"`` or ``"full"``.
            copy: ``"pool"`` or ``"slice"``.
            shuffle: groups of the channel shuffle.

        Raises:
            ValueError: a padding mode other than zeros, or what the constructor refuses.
        """
        arguments = conv2d_arguments(conv) | {"depth": depth, "base_channels": base_channels}
        layer = cls(**arguments, tail=tail, copy=copy, shuffle=shuffle).to(conv.weight)
        copy_first_kernels_(layer.convs[0], conv)
        copy_bias_(layer, conv)
        return layer

    def extra_repr(self) -> str:
        """Describe the layer inside its name."""
        return f"{conv2d_repr(self)}, depth={self.depth}, copy={self.copy!r}, shuffle={self.shuffle}"


COPIES: dict[str, Callable[[Tensor, Pair], Tensor]] = {
    "pool": lambda x, stride: F.avg_pool2d(x, stride, ceil_mode=True),
    "slice": lambda x, stride: x[:, :, :: stride[0], :: stride[1]],
}
