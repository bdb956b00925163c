"""The per-sample convolution, and the choice of how it is computed."""

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from dyn_lightning.allocator import is_freed_memory_kept
from dyn_lightning.checks import Pair, as_padding, as_steps, check_batched, check_count
from dyn_lightning.conv2d import in_format_of
from dyn_lightning.per_sample.added_in_place import added_in_place
from dyn_lightning.per_sample.by_name import CHOICES, run
from dyn_lightning.per_sample.case import MAX_MIXED_BYTES, Case, case_of
from dyn_lightning.per_sample.choice import choose
from dyn_lightning.per_sample.fastest import fastest
from dyn_lightning.per_sample.layout import layout_of
from dyn_lightning.per_sample.methods import mix_kernels
from dyn_lightning.per_sample.reduction import Plan, plan_of, reduced
from dyn_lightning.per_sample.tracing import are_constant, autocasts, how_exported, is_transformed, remembered

# Called with the name of each method that is taken (cost.methods), and one to take in place of what is asked for
# (cost.multiply_adds).
NOTE: ContextVar[Callable[[str], None] | None] = ContextVar("NOTE", default=None)
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
            pass again, ``"cpp"`` and ``"triton"`` mix blocks of the kernels where they are used, in C++ (on a CPU, of
            one group, in float32 from 16 channels on, in float64 from 8, 1x1 kernels on large contiguous maps from one
            on) and in Triton (CUDA). ``"auto"`` chooses one by a model of their costs (``choose_method``),
            ``"benchmark"`` times them once a shape (``"auto"`` while compiling), so a DDP rank, or a run that goes on,
            may take another than the others or the first did. All give the same value and the same gradients, up to
            rounding.
        max_mixed_bytes: bytes that ``"auto"`` and ``"benchmark"`` may take, in this call, for mixed kernels, for
            unfolded input, for maps or the K kernels in another layout or for the outputs of K kernels, with their
            gradients. Where a method would need more, they take another, at last ``"chunked"``, whose chunks keep to it
            down to one sample and 64 output channels (32 in products; or all, with groups). An exported network, which
            others run without us, has no chunks: there nothing may be small enough. Not counted: what a
            convolution takes for a layout of its own (a library of all maps; ours, in each thread, by ``"cpp"`` of 64
            channels of a map, or of several that come to 4 MB, and of 64 times 64 channels of the K kernels, in
            products of 65,536 mixed weights, and of a vector for each of up to 4,096 weights, for one image with few
            positions of 24 output channels with 768 weights each, depthwise of three padded maps of as
            many channels as fit into a vector, 16 in float32), what is copied whatever the method is (the input to be
            padded by ``"same"`` on one side more, or for the pixels that 1x1 kernels with a stride see, in
            channels_last; in training the output to add a bias; a gradient that does not lie as the output does), and
            what second derivatives, forward mode, function transforms, ``torch.jit.trace`` and complex numbers take,
            for which ``"chunked"``, ``"cpp"`` and ``"triton"`` mix all kernels at once.

    Returns:
        ``(B, C_out, H', W')`` with H' and W' as ``torch.nn.functional.conv2d`` gives them.

    Raises:
        ValueError: shapes, types or devices of input, routing and weight disagree, a size but B is 0, the kernel is
            larger than the padded input, or the method does not exist or does not serve (``"cpp"``, ``"triton"``).

    Example:
        >>> x, routing, weight = torch.randn(2, 4, 7, 6), torch.rand(2, 3), torch.randn(3, 6, 4, 3, 3)
        >>> dynamic_conv2d(x, routing, weight, padding=1).shape
        torch.Size([2, 6, 7, 6])
    """
    # On small maps each call in Python would be seen, so there are few before a method's own.
    compiling = torch.compiler.is_compiling()
    if not compiling:
        input = added_in_place(input, routing)
    if routing.dtype != weight.dtype:
        routing = routing.to(weight.dtype)
    if input.is_cpu:  # to ask for the device takes longer
        device, one = "cpu", routing.is_cpu and weight.is_cpu
    else:
        device, one = input.device.type, routing.device == input.device == weight.device
    if not one:
        raise ValueError(
            f"input on {input.device}, routing on {routing.device} and weight on {weight.device} must be on one device"
        )
    full = input
    if autocasts(device):
        input, weight, routing = _as_autocast(device, input, weight, routing)
    training = torch.is_grad_enabled() and (input.requires_grad or routing.requires_grad or weight.requires_grad)
    layout = layout_of(input)
    if compiling:
        method = "auto" if method == "benchmark" else method
        decide = _decide_for_compiler
    else:
        method, decide = INSTEAD.get() or method, _decided
    plan, case, taken = decide(
        method,
        max_mixed_bytes,
        input.shape,
        routing.shape,
        weight.shape,
        None if bias is None else bias.shape,
        stride,
        padding,
        dilation,
        groups,
        layout,
        input.dtype,
        weight.dtype,
        device,
        training,
        is_freed_memory_kept(),
        how_exported() if compiling else "",
        () if compiling else _types(stride, padding, dilation, groups, max_mixed_bytes),
    )
    if plan.reduces:
        input, weight = reduced(input, weight, plan)
    if taken == "benchmark":
        taken = fastest(input, routing, weight, case)
    if not compiling and (note := NOTE.get()):
        note(taken)
    output = run(taken, input, routing, weight, case)
    if bias is not None:
        mixed = mix_kernels(routing, bias.to(routing.dtype))[:, :, None, None]
        # In place a compiler does by itself; of a view that one of our operations gave, autograd does not allow it.
        new = compiling or training or is_transformed()
        output = output + mixed if new else output.add_(mixed)
    return output if layout == "contiguous" and output.is_contiguous() else in_format_of(full, output)


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

    On a CPU it depends on ``dyn_lightning.allocator.keep_freed_memory`` too, which the commands call, on whether the
    processor is one of Intel's and on whether there is a compiler for our C++: ranks on equal machines take the same.

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
        ``"grouped"``, ``"matmul"``, ``"mixture"``, ``"chunked"`` or ``"cpp"``.

    Raises:
        ValueError: as in ``dynamic_conv2d``.

    Example:
        >>> choose_method(torch.empty(32, 960, 1, 1), torch.empty(4, 160, 960, 1, 1))
        'mixture'
    """
    check_method("auto", max_mixed_bytes)
    device = input.device.type
    if autocasts(device):
        input, weight = _as_autocast(device, input, weight)
    plan = _checked_plan(
        input.shape, input.dtype, weight.shape, weight.dtype, stride, padding, dilation, groups, training
    )
    rest = (device, training, max_mixed_bytes, is_freed_memory_kept(), how_exported())
    return choose(case_of(plan, layout_of(input), input.dtype, *rest))


def check_method(method: str, max_mixed_bytes: int) -> None:
    """Check how ``dynamic_conv2d`` is to compute.

    Raises:
        ValueError: the method does not exist (the message lists those that do), or no byte is allowed.
    """
    check_count("max_mixed_bytes", max_mixed_bytes)
    if method not in CHOICES:
        raise ValueError(f"method={method!r} does not exist, choose one of {[*CHOICES]}")


def _decide(
    method: str,
    max_mixed_bytes: int,
    input: torch.Size,
    routing: torch.Size,
    weight: torch.Size,
    bias: torch.Size | None,
    stride: int | Pair,
    padding: int | Pair | str,
    dilation: int | Pair,
    groups: int,
    layout: str,
    dtype: torch.dtype,
    dtype_of_weight: torch.dtype,
    device: str,
    training: bool,
    keeps_memory: bool,
    exported: str,
    types: tuple[Any, ...],
) -> tuple[Plan, Case, str]:
    """Check all arguments and choose a method.

    The types are of what may be in pairs and of numbers: as True and 1.0 equal 1, they would be taken for it.

    Returns:
        What is to be computed, all that the choice depends on, and a method, or ``"benchmark"``.
    """
    check_method(method, max_mixed_bytes)
    plan = _checked_plan(input, dtype, weight, dtype_of_weight, stride, padding, dilation, groups, training)
    kernels, out_channels = weight[:2]
    if routing != (input[0], kernels):
        raise ValueError(
            f"routing of shape {tuple(routing)} must be (B, K) = ({input[0]}, {kernels}): B as in input of "
            f"shape {tuple(input)}, K as in weight of shape {tuple(weight)}"
        )
    if bias is not None and bias != (kernels, out_channels):
        raise ValueError(f"bias of shape {tuple(bias)} must be (K, C_out) = ({kernels}, {out_channels})")
    case = case_of(plan, layout, dtype, device, training, max_mixed_bytes, keeps_memory, exported)
    return plan, case, choose(case) if method == "auto" or input[0] == 0 else method


_decided = remembered(_decide)


def _decide_for_compiler(*arguments: Any) -> tuple[Plan, Case, str]:
    """Decide once, while compiling, where no number is open: else all that ``_decide`` reads is looked at again before
    each call of a layer. Bad arguments, for which that gives None, the compiler sees, so that the error is a user's.
    """
    return (are_constant(*arguments) and _as_constant(*arguments)) or _decide(*arguments)


@torch.compiler.assume_constant_result
def _as_constant(*arguments: Any) -> tuple[Plan, Case, str] | None:
    try:
        return _decide(*arguments)
    except ValueError:
        return None


def _checked_plan(
    input: torch.Size,
    dtype: torch.dtype,
    weight: torch.Size,
    dtype_of_weight: torch.dtype,
    stride: int | Pair,
    padding: int | Pair | str,
    dilation: int | Pair,
    groups: int,
    training: bool,
) -> Plan:
    check_batched(input)
    _check_types(dtype, dtype_of_weight)
    check_count("groups", groups)
    steps, distances = as_steps("stride", stride), as_steps("dilation", dilation)
    return plan_of(input, weight, steps, as_padding(padding), distances, groups, training)


def _types(*values: int | Pair | str) -> tuple[Any, ...]:
    return tuple([tuple(map(type, value)) if isinstance(value, tuple) else type(value) for value in values])


def _as_autocast(device: str, input: Tensor, weight: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts what a convolution takes; chunks would otherwise be cast one by one."""
    dtype = torch.get_autocast_dtype(device)
    found = tuple(
        tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
        for tensor in (input, weight, *others)
    )
    if found[0].dtype != found[1].dtype:
        _check_types(input.dtype, weight.dtype)  # says the user's own
    return found


def _check_types(input: torch.dtype, weight: torch.dtype) -> None:
    if input != weight:
        raise ValueError(f"input of {input} and weight of {weight} must have one type: convert one of them")
