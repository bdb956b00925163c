"""What the layers share: the per-sample convolution, and nn.Conv2d's bookkeeping."""

import math
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dyn_lightning.per_sample.choice import CHOICES, MAX_MIXED_BYTES, case_of, choose, fastest, run
from dyn_lightning.per_sample.methods import Geometry, Pair, mix_kernels
from dyn_lightning.per_sample.reduction import padding_in_numbers, reduced
from dyn_lightning.per_sample.tracing import in_function_transform

# The one subclass of nn.Conv2d whose own doing is known, by name, since timm need not be installed: padding "same" with
# a stride.
SAME_PADDED = "Conv2dSame"

# Called with the name of each method that is taken (cost.methods), and one to take in place of what is asked for
# (cost.multiply_adds).
NOTE: ContextVar[Callable[[str], None]] = ContextVar("NOTE", default=lambda method: None)
INSTEAD: ContextVar[str] = ContextVar("INSTEAD", default="")


def dynamic_conv2d(
    input: Tensor,
    routing: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    method: str = "auto",
    max_mixed_bytes: int = MAX_MIXED_BYTES,
) -> Tensor:
    """Convolve each sample with a kernel of its own, a mixture of K kernels: ``(sum_k routing_k weight_k) * x``.

    Defined in CondConv (arXiv 1904.04971) and Dynamic Convolution (arXiv 1912.03458).

    Args:
        input: ``(B, C_in, H, W)``. B = 0 gives an empty result; channels_last stays channels_last.
        routing: ``(B, K)`` routing weights, one row a sample. They need not sum to one.
        weight: ``(K, C_out, C_in / groups, kH, kW)``, the K kernels.
        bias: ``(K, C_out)``, mixed by the same routing weights, or None.
        stride: as in ``torch.nn.functional.conv2d``.
        padding: as in ``torch.nn.functional.conv2d``, ``"same"`` and ``"valid"`` included. ``"same"`` may have a
            stride, as in TensorFlow: H' is H / stride, rounded up; an odd row of zeros is added below, a column right.
        dilation: as in ``torch.nn.functional.conv2d``.
        groups: as in ``torch.nn.functional.conv2d``.
        method: ``"grouped"`` mixes the kernels and puts the batch into the groups of one convolution, ``"matmul"``
            mixes the kernels and multiplies them with the (unfolded) input, ``"mixture"`` convolves with all K kernels
            and mixes the outputs, ``"chunked"`` mixes and uses the kernels of a few samples at a time, in the backward
            pass again. ``"auto"`` chooses one by a model of their costs (``choose_method``), ``"benchmark"`` times them
            once a shape (``"auto"`` while compiling). All give the same value and the same gradients.
        max_mixed_bytes: bytes that ``"auto"`` and ``"benchmark"`` may take, in this call, for mixed kernels, for
            unfolded input or for the outputs of K kernels, with the gradients of these. Where a method would need more,
            they take another, at last ``"chunked"``, whose chunks keep to it down to one sample and 64 output channels
            (or all, with groups). What a convolution's library takes for a layout of its own is not counted.

    Returns:
        ``(B, C_out, H', W')`` with H' and W' as ``torch.nn.functional.conv2d`` gives them.

    Raises:
        ValueError: a shape or type disagrees with another, the kernel is larger than the padded input, or the method
            does not exist or cannot run on the input's device.

    Example:
        >>> x, routing, weight = torch.randn(2, 4, 7, 6), torch.rand(2, 3), torch.randn(3, 6, 4, 3, 3)
        >>> dynamic_conv2d(x, routing, weight, padding=1).shape
        torch.Size([2, 6, 7, 6])
    """
    _check_shapes(input, routing, weight, bias, groups)
    check_method(method, max_mixed_bytes)
    full = input
    input, weight, geometry = prepared(input, weight, stride, padding, dilation, groups)
    input, weight, routing = _in_one_type(input, weight, routing.to(weight.dtype))
    training = torch.is_grad_enabled() and (input.requires_grad or routing.requires_grad or weight.requires_grad)
    case = case_of(input, weight, geometry, training, max_mixed_bytes)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        method = INSTEAD.get() or method
    if input.shape[0] == 0 or method == "auto" or (method == "benchmark" and compiling):
        method = choose(case)
    elif method == "benchmark":
        method = fastest(input, routing, weight, case)
    if not compiling:
        NOTE.get()(method)
    output = run(method, input, routing, weight, case)
    if bias is not None:
        output = output + mix_kernels(routing, bias.to(routing.dtype))[:, :, None, None]
    return in_format_of(full, output)


def choose_method(
    input: Tensor,
    weight: Tensor,
    stride: int | Pair = 1,
    padding: int | Pair | str = 0,
    dilation: int | Pair = 1,
    groups: int = 1,
    *,
    training: bool = True,
    max_mixed_bytes: int = MAX_MIXED_BYTES,
) -> str:
    """Name the method that ``method="auto"`` takes, from shapes, type and kind of device, the same on every DDP rank.

    Args:
        input: ``(B, C_in, H, W)``; a tensor on the device ``meta`` will do for a CUDA device's choice.
        weight: ``(K, C_out, C_in / groups, kH, kW)``.
        stride: as in ``dynamic_conv2d``, like the next three.
        padding: zeros around the input.
        dilation: distance of the kernel's elements.
        groups: groups of the convolution.
        training: whether there is a backward pass too.
        max_mixed_bytes: as in ``dynamic_conv2d``.

    Returns:
        ``"grouped"``, ``"matmul"``, ``"mixture"`` or ``"chunked"``.

    Raises:
        ValueError: as in ``dynamic_conv2d``.

    Example:
        >>> choose_method(torch.empty(32, 960, 1, 1), torch.empty(4, 160, 960, 1, 1))
        'mixture'
    """
    _check_shapes(input, input.new_empty(len(input), len(weight)), weight, None, groups)
    check_method("auto", max_mixed_bytes)
    input, weight, geometry = prepared(input, weight, stride, padding, dilation, groups)
    input, weight = _in_one_type(input, weight)
    return choose(case_of(input, weight, geometry, training, max_mixed_bytes))


def check_method(method: str, max_mixed_bytes: int) -> None:
    """Check how ``dynamic_conv2d`` is to compute.

    Raises:
        ValueError: the method does not exist (the message lists those that do), or no byte is allowed.
    """
    check_count("max_mixed_bytes", max_mixed_bytes)
    if method not in CHOICES:
        raise ValueError(f"method={method!r} does not exist, choose one of {[*CHOICES]}")


def prepared(
    input: Tensor,
    weight: Tensor,
    stride: int | Pair,
    padding: int | Pair | str,
    dilation: int | Pair,
    groups: int,
) -> tuple[Tensor, Tensor, Geometry]:
    """Check a convolution's numbers, and bring it to the least that is to be computed."""
    numbers = (as_steps("stride", stride), as_padding(padding), as_steps("dilation", dilation))
    return reduced(input, weight, *numbers, groups)


def _in_one_type(input: Tensor, weight: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts what a convolution takes (chunks would otherwise be cast one by one), and check the types.

    Raises:
        ValueError: input and weight are of different types.
    """
    tensors, device = (input, weight, *others), input.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        tensors = tuple(tensor.to(dtype) if tensor.dtype != torch.float64 else tensor for tensor in tensors)
    if tensors[0].dtype != tensors[1].dtype:
        raise ValueError(f"input of {input.dtype} and weight of {weight.dtype} must have one type: convert one of them")
    return tensors


def in_format_of(input: Tensor, output: Tensor) -> Tensor:
    """Lay out an output as its input is: channels_last, or contiguous; an input of one channel or pixel is both."""
    if in_function_transform():
        return output
    last = input.is_contiguous(memory_format=torch.channels_last)
    if last and input.is_contiguous():
        last = output.is_contiguous(memory_format=torch.channels_last)
    return output.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


def check_batched(input: Tensor) -> None:
    """Check that an input is a batch of maps.

    Raises:
        ValueError: it is not ``(B, C, H, W)``.
    """
    if input.dim() != 4:
        raise ValueError(f"input of shape {tuple(input.shape)} must be (B, C_in, H, W); x[None] adds a batch axis")


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


def as_pair(name: str, value: int | Pair | list[int]) -> Pair:
    """Bring one number, or two as a tuple or list, to (rows, columns).

    Raises:
        ValueError: neither one nor two whole numbers.
    """
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(values) != 2 or type(values[0]) is not int or type(values[1]) is not int:
        raise ValueError(f"{name}={value!r} must be a whole number or two of them, (rows, columns)")
    return values


def as_steps(name: str, value: int | Pair | list[int]) -> Pair:
    """Bring a kernel size, stride or dilation to (rows, columns).

    Raises:
        ValueError: not whole numbers, or one below 1.
    """
    steps = as_pair(name, value)
    check_count(name, min(steps))
    return steps


def as_padding(value: int | Pair | list[int] | str) -> Pair | str:
    """Bring padding to (rows, columns), or keep ``"same"`` and ``"valid"``.

    Raises:
        ValueError: another string, not whole numbers, or one below 0.
    """
    if isinstance(value, str):
        if value not in ("same", "valid"):
            raise ValueError(f"padding={value!r} must be 'same', 'valid', a whole number or two of them")
        return value
    padding = as_pair("padding", value)
    check_count("padding", min(padding), least=0)
    return padding


def as_geometry(
    kernel_size: int | Pair,
    stride: int | Pair,
    padding: int | Pair | str,
    dilation: int | Pair,
    strided_same: bool = False,
) -> tuple[Pair, Pair, Pair | str, Pair]:
    """Bring kernel size, stride, padding and dilation to what ``nn.Conv2d`` holds.

    Raises:
        ValueError: not whole numbers, one below 1, an unknown padding, or ``"same"`` with a stride where the layer has
            no ``strided_same``.
    """
    strides, paddings = as_steps("stride", stride), as_padding(padding)
    if paddings == "same" and strides != (1, 1) and not strided_same:
        raise ValueError(f"padding='same' needs stride=1, not stride={strides}; give the padding as numbers")
    return as_steps("kernel_size", kernel_size), strides, paddings, as_steps("dilation", dilation)


def check_channels(in_channels: int, out_channels: int, groups: int) -> None:
    """Check what ``nn.Conv2d`` checks.

    Raises:
        ValueError: the groups do not divide both channel counts, or a count is below 1.
    """
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
        check_count(name, value)
    if in_channels % groups or out_channels % groups:
        raise ValueError(f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}")


def check_count(name: str, value: int, least: int = 1) -> None:
    """Check a count.

    Raises:
        ValueError: it is no whole number, or below the least.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a whole number")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")


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


def _check_shapes(input: Tensor, routing: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> None:
    check_batched(input)
    check_count("groups", groups)
    if weight.dim() != 5:
        raise ValueError(f"weight of shape {tuple(weight.shape)} must be (K, C_out, C_in / groups, kH, kW)")
    kernels, out_channels, group_channels = weight.shape[:3]
    if routing.shape != (input.shape[0], kernels):
        raise ValueError(
            f"routing of shape {tuple(routing.shape)} must be (B, K) = ({input.shape[0]}, {kernels}): B as in input of "
            f"shape {tuple(input.shape)}, K as in weight of shape {tuple(weight.shape)}"
        )
    if input.shape[1] != group_channels * groups or out_channels % groups:
        raise ValueError(
            f"input of {input.shape[1]} channels and groups={groups} must agree with weight of shape "
            f"{tuple(weight.shape)}: C_in = {group_channels} * groups, and groups must divide C_out = {out_channels}"
        )
    if bias is not None and bias.shape != (kernels, out_channels):
        raise ValueError(f"bias of shape {tuple(bias.shape)} must be (K, C_out) = ({kernels}, {out_channels})")


def explicit_padding(
    input: Tensor, padding: Pair | str, kernel_size: Pair, stride: Pair, dilation: Pair
) -> tuple[Tensor, Pair]:
    """Turn "same" and "valid" into numbers; what "same" has more on one side is padded here.

    Returns:
        The input, padded where the sides differ, and the rows and columns of zeros to be added on both sides.
    """
    zeros, sides = padding_in_numbers(input.shape, padding, kernel_size, stride, dilation)
    return F.pad(input, zeros) if zeros else input, sides
