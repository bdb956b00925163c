"""The per-sample convolution, and the choice of how it is computed."""

from collections.abc import Callable
from contextvars import ContextVar

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
from dyn_lightning.per_sample.methods import layout_of, mix_kernels
from dyn_lightning.per_sample.reduction import Plan, plan_of, reduced
from dyn_lightning.per_sample.tracing import remembered

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
            pass again, ``"triton"`` mixes tiles of the kernels where they are used (CUDA). ``"auto"`` chooses one by a
            model of their costs (``choose_method``), ``"benchmark"`` times them once a shape (``"auto"`` while
            compiling). All give the same value and the same gradients.
        max_mixed_bytes: bytes that ``"auto"`` and ``"benchmark"`` may take, in this call, for mixed kernels, for
            unfolded input, for maps in another layout or for the outputs of K kernels, with the gradients of these.
            Where a method would need more, they take another, at last ``"chunked"``, whose chunks keep to it down to
            one sample and 64 output channels (32 in products; or all, with groups). Not counted: what a convolution's
            library takes for a layout of its own, and what second derivatives, forward mode, function transforms,
            ``torch.jit.trace`` and complex numbers take, for which ``"chunked"`` and ``"triton"`` mix all kernels at
            once.

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
    check_batched(input)
    if routing.dtype != weight.dtype:  # `to` would take longer to find out
        routing = routing.to(weight.dtype)
    compiling = torch.compiler.is_compiling()
    if not compiling:
        input = added_in_place(input)
    full, device = input, input.device.type
    input, weight, routing = _in_one_type(device, input, weight, routing)
    training = torch.is_grad_enabled() and (input.requires_grad or routing.requires_grad or weight.requires_grad)
    plan, case, taken = _decided(
        method if compiling else INSTEAD.get() or method,
        max_mixed_bytes,
        input.shape,
        routing.shape,
        weight.shape,
        None if bias is None else bias.shape,
        stride,
        padding,
        dilation,
        groups,
        layout_of(input),
        input.element_size(),
        device,
        training,
        is_freed_memory_kept(),
        () if compiling else _types(stride, padding, dilation),
    )
    input, weight = reduced(input, weight, plan)
    if taken == "benchmark":
        taken = choose(case) if compiling else fastest(input, routing, weight, case)
    if not compiling:
        NOTE.get()(taken)
    output = run(taken, input, routing, weight, case)
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

    On a CPU it depends on ``dyn_lightning.allocator.keep_freed_memory`` too, which the commands call.

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
    check_method("auto", max_mixed_bytes)
    check_batched(input)
    device = input.device.type
    input, weight = _in_one_type(device, input, weight)
    plan = plan_of(input.shape, weight.shape, *_in_pairs(stride, padding, dilation, groups))
    rest = (device, training, max_mixed_bytes, is_freed_memory_kept())
    return choose(case_of(plan, layout_of(input), input.element_size(), *rest))


def check_method(method: str, max_mixed_bytes: int) -> None:
    """Check how ``dynamic_conv2d`` is to compute.

    Raises:
        ValueError: the method does not exist (the message lists those that do), or no byte is allowed.
    """
    check_count("max_mixed_bytes", max_mixed_bytes)
    if method not in CHOICES:
        raise ValueError(f"method={method!r} does not exist, choose one of {[*CHOICES]}")


@remembered
def _decided(
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
    bytes_each: int,
    device: str,
    training: bool,
    keeps_memory: bool,
    types: tuple[tuple[type, ...], ...],
) -> tuple[Plan, Case, str]:
    """Check all arguments and choose a method, once: on small maps each step of Python would be seen.

    The types are of what is in pairs, since (True, 1) equals (1, 1) and would be taken for it.

    Returns:
        What is to be computed, all that the choice depends on, and a method, or ``"benchmark"``.
    """
    check_method(method, max_mixed_bytes)
    plan = plan_of(input, weight, *_in_pairs(stride, padding, dilation, groups))
    kernels, out_channels = weight[:2]
    if routing != (input[0], kernels):
        raise ValueError(
            f"routing of shape {tuple(routing)} must be (B, K) = ({input[0]}, {kernels}): B as in input of "
            f"shape {tuple(input)}, K as in weight of shape {tuple(weight)}"
        )
    if bias is not None and bias != (kernels, out_channels):
        raise ValueError(f"bias of shape {tuple(bias)} must be (K, C_out) = ({kernels}, {out_channels})")
    case = case_of(plan, layout, bytes_each, device, training, max_mixed_bytes, keeps_memory)
    return plan, case, choose(case) if method == "auto" or input[0] == 0 else method


def _types(*values: int | Pair | str) -> tuple[tuple[type, ...], ...]:
    return tuple([tuple(map(type, value)) if type(value) is tuple else () for value in values])


def _in_pairs(
    stride: int | Pair, padding: int | Pair | str, dilation: int | Pair, groups: int
) -> tuple[Pair, Pair | str, Pair, int]:
    check_count("groups", groups)
    return as_steps("stride", stride), as_padding(padding), as_steps("dilation", dilation), groups


def _in_one_type(device: str, input: Tensor, weight: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
    """Cast as autocast casts what a convolution takes (chunks would otherwise be cast one by one), and check the types.

    Raises:
        ValueError: input and weight are of different types.
    """
    tensors = (input, weight, *others)
    if device != "meta" and torch.is_autocast_enabled(device):  # to ask for the device meta is an error
        dtype = torch.get_autocast_dtype(device)
        tensors = tuple(
            tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor
            for tensor in tensors
        )
    if tensors[0].dtype != tensors[1].dtype:
        raise ValueError(f"input of {input.dtype} and weight of {weight.dtype} must have one type: convert one of them")
    return tensors
