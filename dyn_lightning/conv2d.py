"""What drop-ins for ``nn.Conv2d`` share: its arguments, padding and initialisation, memory formats, its description."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn_lightning.checks import Pair, as_steps
from dyn_lightning.per_sample.tracing import in_function_transform

# The one subclass of nn.Conv2d whose own doing is known, by name, since timm need not be installed: padding "same" with
# a stride.
SAME_PADDED = "Conv2dSame"


def in_format_of(input: Tensor, output: Tensor) -> Tensor:
    """Lay out an output as its input is: channels_last, or contiguous; an input of one channel or pixel is both."""
    if in_function_transform() or (input.is_contiguous() and output.is_contiguous()):
        return output
    last = input.is_contiguous(memory_format=torch.channels_last)
    if last and input.is_contiguous():
        last = output.is_contiguous(memory_format=torch.channels_last)
    return output.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def add_bias(output: Tensor, bias: Tensor | None) -> Tensor:
    """Add a bias ``(C,)`` to ``(B, C, H, W)``."""
    return output if bias is None else output + bias.to(output.dtype)[:, None, None]


def under_kernels(input: Tensor, kernel_size: Pair, padding: Pair | str, dilation: Pair) -> Tensor:
    """Cut or pad a map so that its pixel 0 lies under the middle of the convolution's first kernel position.

    Every ``stride``-th of its pixels then lies under the middle of one, so that its size divided by the stride, rounded
    up, is that of the convolution's output, for odd sizes too.

    Example:
        >>> under_kernels(torch.zeros(1, 1, 15, 7), (3, 3), (1, 0), (1, 1)).shape
        torch.Size([1, 1, 15, 5])
    """
    if padding == "same":
        return input
    rows, columns = (0, 0) if isinstance(padding, str) else padding
    sides: list[int] = []
    for i, zeros in ((1, columns), (0, rows)):  # F.pad begins with the columns
        reach = dilation[i] * (kernel_size[i] - 1)
        sides += (zeros - reach // 2, zeros - (reach - reach // 2))
    return F.pad(input, sides) if any(sides) else input


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that can also train on one value a channel (one sample, pooled), which has no variance.

    Such a batch is normalised by the running statistics, which it leaves as they are.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Normalise ``(B, C, H, W)``."""
        if self.training and input.numel() == input.shape[1]:
            return F.batch_norm(input, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)
        return super().forward(input)


def flat(convert: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Let a module's conversion (``_apply``) see a 5-D tensor flat: the memory format channels_last is for 4-D ones."""
    return lambda tensor: convert(tensor.flatten()).view(tensor.shape) if tensor.dim() == 5 else convert(tensor)


def init_kernels_(weight: Tensor, bias: Tensor | None = None) -> None:
    """Initialise K kernels ``(K, C_out, C_in / groups, kH, kW)`` each as ``nn.Conv2d`` does, and their biases with 0.

    Each kernel is drawn by itself: the fan of the 5-D tensor would make every kernel sqrt(C_out) times too small.
    """
    for kernel in weight:
        nn.init.kaiming_uniform_(kernel, a=math.sqrt(5))
    if bias is not None:
        nn.init.zeros_(bias)


def conv2d_arguments(conv: Any) -> dict[str, Any]:
    """Read from a convolution, or a drop-in for one, the arguments that build another of the same shape.

    Raises:
        ValueError: a subclass of ``nn.Conv2d`` that does something of its own (only timm's ``Conv2dSame`` is known: it
            is padding ``"same"`` with a stride), or a padding mode other than zeros.
    """
    kind = type(conv).__name__
    if isinstance(conv, nn.modules.conv._ConvNd) and not isinstance(conv, nn.Conv2d):
        raise ValueError(f"{kind} is no Conv2d: leave this layer static")
    if isinstance(conv, nn.Conv2d) and type(conv) is not nn.Conv2d and kind != SAME_PADDED:
        raise ValueError(f"{kind} is a subclass of Conv2d and does something of its own: leave this layer static")
    mode = getattr(conv, "padding_mode", "zeros")
    if mode != "zeros":
        raise ValueError(f"padding_mode={mode!r} is not supported, only 'zeros' is: leave this layer static")
    names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
    arguments = {name: getattr(conv, name) for name in names} | {"bias": conv.bias is not None}
    return arguments | {"padding": "same"} if kind == SAME_PADDED else arguments


def with_kernel_size(arguments: dict[str, Any], kernel_size: int | Pair) -> dict[str, Any]:
    """Change the kernel size in a convolution's arguments, and the padding so that the output keeps its size.

    Raises:
        ValueError: no padding does that.
    """
    before, after = arguments["kernel_size"], as_steps("kernel_size", kernel_size)
    padding = (0, 0) if arguments["padding"] == "valid" else arguments["padding"]
    if padding != "same":
        grown = [arguments["dilation"][i] * (after[i] - before[i]) for i in (0, 1)]
        padding = (padding[0] + grown[0] // 2, padding[1] + grown[1] // 2)
        if any(number % 2 for number in grown) or min(padding) < 0:
            raise ValueError(f"kernel_size={after} in the place of {before} would change the size of the output")
    return arguments | {"kernel_size": after, "padding": padding}


def copy_bias_(layer: Any, conv: Any) -> None:
    """Copy a convolution's bias, where there is one, to a layer of the same arguments."""
    if conv.bias is not None:
        layer.bias.copy_(conv.bias)


def copy_first_kernels_(layer: Any, conv: nn.Conv2d) -> None:
    """Copy of each group as many kernels as a convolution with fewer output channels has."""
    count = layer.out_channels // layer.groups
    layer.weight.copy_(conv.weight.unflatten(0, (conv.groups, -1))[:, :count].flatten(0, 1))


def conv2d_repr(layer: Any) -> str:
    """Describe a layer as ``nn.Conv2d`` describes itself, for ``extra_repr``."""
    text = f"{layer.in_channels}, {layer.out_channels}, kernel_size={layer.kernel_size}, stride={layer.stride}"
    for name, default in (("padding", (0, 0)), ("dilation", (1, 1)), ("groups", 1)):
        if getattr(layer, name) != default:
            text += f", {name}={getattr(layer, name)}"
    text += method_repr(layer)
    return text if layer.bias is not None else text + ", bias=False"


def method_repr(layer: Any) -> str:
    """Describe by which method a layer computes, where it is not ``"auto"``."""
    method = getattr(layer, "method", "auto")
    return "" if method == "auto" else f", method={method}"
