"""Dynamic Convolution: Attention over Convolution Kernels (Chen et al., CVPR 2020), arXiv 1912.03458."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyn_lightning.checks import Pair, as_geometry, check_channels
from dyn_lightning.conv2d import conv2d_arguments, conv2d_repr, flat, init_kernels_
from dyn_lightning.functional import MAX_MIXED_BYTES, check_method, dynamic_conv2d
from dyn_lightning.routing import SoftmaxAttention


class DynamicConv2d(nn.Module):
    """Convolve each sample with ``pi_1 W_1 + ... + pi_K W_K``, ``pi = softmax(FC(ReLU(FC(GAP(x)))) / temperature)``.

    The attention sums to one; the bias is mixed like the kernels. The paper lowers the temperature from 30 to 1 over
    the first ten epochs (``TemperatureAnnealing``); it is a buffer, so it is saved with the weights.

    Args:
        in_channels: as in ``nn.Conv2d``, like all arguments before the star.
        out_channels: channels of the output.
        kernel_size: rows and columns of the kernels.
        stride: step of the kernels.
        padding: zeros around the input, ``"valid"``, or ``"same"``, which may have a stride (see ``dynamic_conv2d``).
        dilation: distance of a kernel's elements.
        groups: groups of channels.
        bias: whether each kernel has a bias.
        num_kernels: K, the kernels that are mixed.
        reduction: the attention's hidden layer has ``in_channels / reduction`` units, rounded, at least 1.
        temperature: of the softmax, above 0.
        method: of computing, for speed, as in ``dynamic_conv2d``.
        max_mixed_bytes: that a chosen method may hold beside input, kernels and output, as in ``dynamic_conv2d``.

    Shape:
        ``(B, C_in, H, W)`` to ``(B, C_out, H', W')`` as in ``nn.Conv2d``. ``weight`` is
        ``(K, C_out, C_in / groups, kH, kW)``, ``bias`` is ``(K, C_out)``.

    Raises:
        ValueError: groups that do not divide the channels, a count below 1, an unknown padding or method, a
            temperature that is not above 0.

    Example:
        >>> DynamicConv2d(4, 6, 3, padding=1)(torch.randn(2, 4, 7, 6)).shape
        torch.Size([2, 6, 7, 6])
    """

    method, max_mixed_bytes = "auto", MAX_MIXED_BYTES  # of layers that were pickled before they had these

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
        num_kernels: int = 4,
        reduction: float = 4,
        temperature: float = 30.0,
        method: str = "auto",
        max_mixed_bytes: int = MAX_MIXED_BYTES,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        geometry = as_geometry(kernel_size, stride, padding, dilation, strided_same=True)
        self.kernel_size, self.stride, self.padding, self.dilation = geometry
        check_method(method, max_mixed_bytes)
        self.method, self.max_mixed_bytes = method, max_mixed_bytes
        self.router = SoftmaxAttention(in_channels, num_kernels, reduction, temperature)
        self.weight = nn.Parameter(torch.empty(num_kernels, out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(num_kernels, out_channels)) if bias else None
        init_kernels_(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(B, C_in, H, W)``."""
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        arguments = (x, self.router(x), self.weight, self.bias, *geometry)
        return dynamic_conv2d(*arguments, method=self.method, max_mixed_bytes=self.max_mixed_bytes)

    def routers(self) -> dict[str, nn.Module]:
        """Give the attention."""
        return {"router": self.router}

    def set_temperature(self, value: float) -> None:
        """Set the attention's softmax temperature, above 0."""
        self.router.set_temperature(value)

    @classmethod
    @torch.no_grad()
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        num_kernels: int = 4,
        reduction: float = 4,
        temperature: float = 30.0,
        method: str = "auto",
        max_mixed_bytes: int = MAX_MIXED_BYTES,
    ) -> "DynamicConv2d":
        """Build the layer from a trained convolution, with the same output: K copies, mixed by weights that sum to one.

        The attention differs between kernels, so SGD moves them apart from the first step on; Adam, which evens out the
        size of gradients, does so very slowly.

        Args:
            conv: the trained convolution.
            num_kernels: K.
            reduction: of the attention's hidden layer.
            temperature: of the softmax.
            method: of computing.
            max_mixed_bytes: as in ``dynamic_conv2d``: bytes for mixed kernels and what else a method holds.

        Raises:
            ValueError: a padding mode other than zeros.
        """
        options: Any = {"num_kernels": num_kernels, "reduction": reduction, "temperature": temperature}
        options |= conv2d_arguments(conv)
        layer = cls(**options, method=method, max_mixed_bytes=max_mixed_bytes).to(conv.weight)
        layer.weight.copy_(conv.weight.expand_as(layer.weight))
        if layer.bias is not None and conv.bias is not None:
            layer.bias.copy_(conv.bias.expand_as(layer.bias))
        return layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DynamicConv2d":
        return super()._apply(flat(fn), recurse)

    def extra_repr(self) -> str:
        """Describe the layer inside its name."""
        return f"{conv2d_repr(self)}, num_kernels={len(self.weight)}"
