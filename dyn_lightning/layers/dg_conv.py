"""DGConv: Differentiable Learning-to-Group Channels via Groupable Convolutional Neural Networks (Zhang et al., ICCV
2019), arXiv 1908.05867.
"""

import math
from collections.abc import Callable
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from dyn_lightning.checks import Pair, as_geometry, check_batched, check_channels, check_count
from dyn_lightning.conv2d import (
    conv2d_arguments,
    conv2d_repr,
    copy_bias_,
    in_format_of,
    init_kernels_,
)

START = 1e-8  # of the gates, so near to 0 that the first step of training decides


class DGConv2d(nn.Module):
    """Convolve with ``U o W``: the binary ``U = U_1 x U_2 x ...`` (Kronecker) says which channels are connected.

    ``U_k = g_k 1 + (1 - g_k) I`` with ``g_k = (sign(gate_k) + 1) / 2``, trained through the straight-through estimator;
    ``sign(0) = +1``. The ``U_k`` are 2x2 in the paper, whose channel counts are equal powers of two; here their sizes
    are the prime factors of gcd(C_in, C_out), smallest first, and what remains of the channels is connected within the
    last factor. All gates open is a dense convolution, all closed one of gcd(C_in, C_out) groups. Training computes the
    masked dense convolution; ``fold`` gives the grouped one.

    Args:
        in_channels: as in ``nn.Conv2d``, like all arguments before the star; shares a factor with ``out_channels``.
        out_channels: channels of the output.
        kernel_size: rows and columns of the kernel.
        stride: step of the kernel.
        padding: zeros around the input, or ``"same"`` or ``"valid"``.
        dilation: distance of the kernel's elements.
        groups: 1, since the layer learns its groups.
        bias: whether there is a bias.
        gate_init: ``"random"`` as in the paper, ``"dense"`` (all open) or ``"depthwise"`` (all closed).
        gate_seed: of the random gates, so that layers of one size start alike; None draws from torch's generator.

    Shape:
        ``(B, C_in, H, W)`` to ``(B, C_out, H', W')`` as in ``nn.Conv2d``. ``weight`` is ``(C_out, C_in, kH, kW)``,
        ``gates`` has a number a prime factor, at least float32 also in a layer of bfloat16.

    Raises:
        ValueError: channel counts without a common factor, groups other than 1, a count below 1, an unknown padding or
            gate_init.

    Example:
        >>> layer = DGConv2d(8, 12, 3, padding=1, gate_init="depthwise")
        >>> layer(torch.randn(2, 8, 7, 6)).shape
        torch.Size([2, 12, 7, 6])
        >>> layer.fold()
        Conv2d(8, 12, kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), groups=4)
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
        gate_init: str = "random",
        gate_seed: int | None = None,
    ) -> None:
        super().__init__()
        check_channels(in_channels, out_channels, groups)
        if groups != 1:
            raise ValueError(f"groups={groups} must be 1, since the layer learns them; from_conv takes a grouped one")
        if math.gcd(in_channels, out_channels) == 1:
            shapes = f"in_channels={in_channels} and out_channels={out_channels}"
            raise ValueError(f"{shapes} must have a common factor, or there are no groups to learn: use nn.Conv2d")
        if gate_init not in GATE_INITS:
            raise ValueError(f"gate_init={gate_init!r} must be one of {list(GATE_INITS)}")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.padding, self.dilation = as_geometry(kernel_size, stride, padding, dilation)
        self.factors = prime_factors(math.gcd(in_channels, out_channels))
        if gate_seed is not None:
            check_count("gate_seed", gate_seed, least=0)
        generator = None if gate_seed is None else Generator().manual_seed(gate_seed)
        wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
        signs = GATE_INITS[gate_init](len(self.factors), generator)
        self.gates = nn.Parameter(torch.empty(len(signs), dtype=wide).copy_(START * signs.to(wide)))
        self.weight = nn.Parameter(torch.empty(out_channels, in_channels, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(out_channels)) if bias else None
        init_kernels_(self.weight[None], self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``(B, C_in, H, W)``."""
        kernel = self.membership().to(self.weight.dtype)[:, :, None, None] * self.weight
        return F.conv2d(x, kernel, self.bias, self.stride, self.padding, self.dilation)

    def membership(self) -> Tensor:
        """Give U ``(C_out, C_in)``: zeros and ones, with the straight-through gradient of the gates."""
        # The gates' own values cancel to exactly 0, so what is left is binary.
        g = (self.gates >= 0).to(self.gates.dtype) + (self.gates - self.gates.detach())
        closed = [torch.eye(factor, device=g.device, dtype=g.dtype) for factor in self.factors]
        parts = [g[k] + (1 - g[k]) * closed[k] for k in range(len(closed))]
        common = math.prod(self.factors)
        rest = g.new_ones(self.out_channels // common, self.in_channels // common)
        return reduce(torch.kron, [*parts, rest])

    @torch.no_grad()
    def fold(self) -> nn.Conv2d:
        """Give the grouped convolution that the layer has become, between two permutations of channels if needed."""
        groups = math.prod(factor for factor, one in zip(self.factors, self.gates >= 0, strict=True) if not one)
        inputs, outputs = self._grouped_order(self.in_channels), self._grouped_order(self.out_channels)
        sorted_already = all(torch.equal(order, order.sort().values) for order in (inputs, outputs))
        make = nn.Conv2d if sorted_already else PermutedConv2d
        conv = make(**conv2d_arguments(self) | {"groups": groups}).to(self.weight)
        # Sorted by group, U is block diagonal: (g o) (g i) -> g o i.
        blocks = self.weight[outputs][:, inputs].unflatten(1, (groups, -1)).unflatten(0, (groups, -1))
        conv.weight.copy_(torch.cat([blocks[group, :, group] for group in range(groups)]))
        if self.bias is not None and conv.bias is not None:
            conv.bias.copy_(self.bias[outputs])
        if isinstance(conv, PermutedConv2d):
            conv.inputs.copy_(inputs)
            conv.outputs.copy_(outputs.argsort())
        return conv

    @classmethod
    @torch.no_grad()
    def from_conv(cls, conv: nn.Conv2d) -> "DGConv2d":
        """Build the layer from a trained convolution, with the same output.

        A dense convolution starts with all gates open. The gates of a grouped one start closed where that gives its
        groups; where no gates do, all are open, and the kernel is 0 between the groups.

        Raises:
            ValueError: a padding mode other than zeros, channel counts without a common factor.
        """
        layer = cls(**conv2d_arguments(conv) | {"groups": 1}, gate_init="dense").to(conv.weight)
        layer.weight.zero_()
        blocks = layer.weight.unflatten(1, (conv.groups, -1)).unflatten(0, (conv.groups, -1))
        for group, kernel in enumerate(conv.weight.chunk(conv.groups)):
            blocks[group, :, group] = kernel
        for count in range(len(layer.factors) + 1):
            if math.prod(layer.factors[:count]) == conv.groups:
                layer.gates[:count] = -START
        copy_bias_(layer, conv)
        return layer

    def extra_repr(self) -> str:
        """Describe the layer inside its name."""
        return conv2d_repr(self)

    def _grouped_order(self, channels: int) -> Tensor:
        """List the channels so that those of one group are neighbours: they are alike in the digits of closed gates."""
        closed_first = (self.gates >= 0).int().argsort(stable=True).tolist()
        digits = torch.arange(channels, device=self.weight.device).reshape(*self.factors, -1)
        return digits.permute(*closed_first, len(self.factors)).flatten()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DGConv2d":
        def wide(tensor: Tensor) -> Tensor:  # in float16 gates of 1e-8 would be 0, that is open
            moved, is_gate = fn(tensor), tensor is self.gates or tensor is self.gates.grad
            return tensor.to(moved.device) if is_gate and moved.dtype.itemsize < 4 else moved

        return super()._apply(wide, recurse)


class PermutedConv2d(nn.Conv2d):
    """A grouped convolution between two permutations of channels: what a trained ``DGConv2d`` folds to."""

    inputs: Tensor
    outputs: Tensor

    def __init__(self, *args: int | Pair | str | bool, **kwargs: int | Pair | str | bool) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[arg-type]
        self.register_buffer("inputs", torch.arange(self.in_channels))
        self.register_buffer("outputs", torch.arange(self.out_channels))

    def forward(self, input: Tensor) -> Tensor:
        """Convolve ``(B, C_in, H, W)``."""
        check_batched(input.shape)
        # On a CPU a few images at a time stay in the cache from one permutation to the other.
        few = 8 if input.device.type == "cpu" and not torch.compiler.is_compiling() else max(1, len(input))
        parts = [self._conv_forward(x[:, self.inputs], self.weight, self.bias) for x in input.split(few)]
        return in_format_of(input, torch.cat([part[:, self.outputs] for part in parts]))


GATE_INITS: dict[str, Callable[[int, Generator | None], Tensor]] = {
    "random": lambda count, generator: torch.randint(2, (count,), generator=generator, device="cpu") * 2.0 - 1,
    "dense": lambda count, generator: torch.ones(count),
    "depthwise": lambda count, generator: -torch.ones(count),
}


def prime_factors(number: int) -> list[int]:
    """List the prime factors, smallest first.

    Example:
        >>> prime_factors(360)
        [2, 2, 2, 3, 3, 5]
    """
    factors, factor = [], 2
    while number > 1:
        while number % factor == 0:
            factors.append(factor)
            number //= factor
        factor += 1
    return factors
