"""CondConv: Conditionally Parameterized Convolutions for Efficient Inference (Yang et al., NeurIPS 2019),
arXiv 1904.04971.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dyn_lightning.checks import Pair, as_geometry, check_channels, check_count
from dyn_lightning.conv2d import conv2d_arguments, conv2d_repr, flat, init_kernels_, method_repr
from dyn_lightning.functional import MAX_MIXED_BYTES, check_method, dynamic_conv2d
from dyn_lightning.routing import Router, as_router


class CondConv2d(nn.Module):
    """Convolve each sample with ``alpha_1 W_1 + ... + alpha_n W_n``, ``alpha = sigmoid(GAP(x) R)``.

    The routing weights are independent of each other and do not sum to one; the bias is mixed like the kernels.

    Args:
        in_channels: as in ``nn.Conv2d``, like all arguments before the star.
        out_channels: channels of the output.
        kernel_size: rows and columns of the kernels.
        stride: step of the kernels.
        padding: zeros around the input, ``"valid"``, or ``"same"``, which may have a stride (see ``dynamic_conv2d``).
        dilation: distance of a kernel's elements.
        groups: groups of channels.
        bias: whether each expert has a bias.
        num_experts: n, the kernels that are mixed (8 in most of the paper's tables).
        router: the routing function: a name in ``routing.ROUTERS`` (``sigmoid``, ``softmax``, ``hidden_small``,
            ``hidden_medium``, ``hidden_large``), or a callable from in_channels and n to a module.
        method: of computing, for speed, as in ``dynamic_conv2d``.
        max_mixed_bytes: that a chosen method may hold beside input, kernels and output, as in ``dynamic_conv2d``.

    Shape:
        ``(B, C_in, H, W)`` to ``(B, C_out, H', W')`` as in ``nn.Conv2d``. ``weight`` is
        ``(n, C_out, C_in / groups, kH, kW)``, ``bias`` is ``(n, C_out)``.

    Raises:
        ValueError: groups that do not divide the channels, a count below 1, an unknown padding, router or method.

    Example:
        >>> CondConv2d(4, 6, 3, padding=1)(torch.randn(2, 4, 7, 6)).shape
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
        num_experts: int = 8,
        router: str | Router = "sigmoid",
        method: str = "auto",
        max_mixed_bytes: int = MAX_MIXED_BYTES,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        geometry = as_geometry(kernel_size, stride, padding, dilation, strided_same=True)
        self.kernel_size, self.stride, self.padding, self.dilation = geometry
        check_count("num_experts", num_experts)
        check_method(method, max_mixed_bytes)
        self.method, self.max_mixed_bytes = method, max_mixed_bytes
        self.router = as_router(router)(in_channels, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, out_channels, in_channels // groups, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(num_experts, out_channels)) if bias else None
        init_kernels_(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(B, C_in, H, W)``."""
        geometry = (self.stride, self.padding, self.dilation, self.groups)
        arguments = (x, self.router(x), self.weight, self.bias, *geometry)
        return dynamic_conv2d(*arguments, method=self.method, max_mixed_bytes=self.max_mixed_bytes)

    def routers(self) -> dict[str, nn.Module]:
        """Give the router."""
        return {"router": self.router}

    @classmethod
    @torch.no_grad()
    def from_conv(
        cls,
        conv: nn.Conv2d,
        *,
        num_experts: int = 8,
        router: str | Router = "sigmoid",
        method: str = "auto",
        max_mixed_bytes: int = MAX_MIXED_BYTES,
    ) -> "CondConv2d":
        """Build the layer from a trained convolution, with the same output.

        The router's last matrix starts at 0, so the routing weights start as the same n numbers for every image; each
        expert is the convolution's kernel divided by their sum. The numbers differ (the router's bias is random), so
        SGD moves the experts apart from the first step on; Adam, which evens out the size of gradients, does so very
        slowly.

        Args:
            conv: the trained convolution.
            num_experts: n.
            router: the routing function; a callable's module must have ``constant_``, as ``SigmoidRouter``.
            method: of computing.
            max_mixed_bytes: as in ``dynamic_conv2d``: bytes for mixed kernels and what else a method holds.

        Raises:
            ValueError: a padding mode other than zeros, or what the constructor refuses.
        """
        options: Any = {"num_experts": num_experts, "router": router}
        options |= conv2d_arguments(conv)
        layer = cls(**options, method=method, max_mixed_bytes=max_mixed_bytes).to(conv.weight)
        _copy_experts_(layer, conv)
        return layer

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "CondConv2d":
        return super()._apply(flat(fn), recurse)

    def extra_repr(self) -> str:
        """Describe the layer inside its name."""
        return f"{conv2d_repr(self)}, num_experts={len(self.weight)}"


class CondLinear(nn.Module):
    """A classifier as a CondConv: ``(alpha_1 W_1 + ... + alpha_n W_n) x + b``, with a router of its own on ``x``.

    Args:
        in_features: as in ``nn.Linear``, like all arguments before the star.
        out_features: numbers of the output.
        bias: whether each expert has a bias.
        num_experts: n.
        router: the routing function, as in ``CondConv2d``.
        method: of computing, as in ``CondConv2d``.
        max_mixed_bytes: as in ``CondConv2d``.

    Shape:
        ``(B, in_features)`` to ``(B, out_features)``. ``weight`` is ``(n, out_features, in_features)``, ``bias`` is
        ``(n, out_features)``.

    Raises:
        ValueError: a count below 1, an unknown router or method.

    Example:
        >>> CondLinear(4, 6)(torch.randn(2, 4)).shape
        torch.Size([2, 6])
    """

    method, max_mixed_bytes = "auto", MAX_MIXED_BYTES  # of layers that were pickled before they had these

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        num_experts: int = 8,
        router: str | Router = "sigmoid",
        method: str = "auto",
        max_mixed_bytes: int = MAX_MIXED_BYTES,
    ) -> None:
        super().__init__()
        for name, count in (("in_features", in_features), ("out_features", out_features), ("num_experts", num_experts)):
            check_count(name, count)
        check_method(method, max_mixed_bytes)
        self.method, self.max_mixed_bytes = method, max_mixed_bytes
        self.in_features, self.out_features = in_features, out_features
        self.router = as_router(router)(in_features, num_experts)
        self.weight = nn.Parameter(torch.empty(num_experts, out_features, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts, out_features)) if bias else None
        init_kernels_(self.weight, self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, in_features)``."""
        if x.dim() != 2:
            raise ValueError(f"input of shape {tuple(x.shape)} must be (B, in_features)")
        arguments = (x[:, :, None, None], self.router(x), self.weight[..., None, None], self.bias)
        return dynamic_conv2d(*arguments, method=self.method, max_mixed_bytes=self.max_mixed_bytes).flatten(1)

    def routers(self) -> dict[str, nn.Module]:
        """Give the router."""
        return {"router": self.router}

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        num_experts: int = 8,
        router: str | Router = "sigmoid",
        method: str = "auto",
        max_mixed_bytes: int = MAX_MIXED_BYTES,
    ) -> "CondLinear":
        """Build the layer from a trained classifier, with the same output, as ``CondConv2d.from_conv`` does.

        Args:
            linear: the trained classifier.
            num_experts: n.
            router: the routing function.
            method: of computing.
            max_mixed_bytes: as in ``dynamic_conv2d``: bytes for mixed kernels and what else a method holds.
        """
        features = (linear.in_features, linear.out_features, linear.bias is not None)
        options: Any = {"num_experts": num_experts, "router": router}
        layer = cls(*features, **options, method=method, max_mixed_bytes=max_mixed_bytes).to(linear.weight)
        _copy_experts_(layer, linear)
        return layer

    def extra_repr(self) -> str:
        """Describe the layer inside its name."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{text}, num_experts={len(self.weight)}{method_repr(self)}"


def _copy_experts_(layer: Any, static: Any) -> None:
    """Make every expert the static layer divided by the sum of the routing weights, which become constant."""
    if not hasattr(layer.router, "constant_"):
        raise ValueError(
            f"{type(layer.router).__name__} has no `constant_`, which makes its weights the same for all images"
        )
    mass = layer.router.constant_().sum()
    layer.weight.copy_(static.weight / mass)
    if static.bias is not None:
        layer.bias.copy_(static.bias / mass)
