"""Depthwise convolutions in C++ against torch's, which they stand in for."""

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dyn_lightning.functional import dynamic_conv2d
from dyn_lightning.layers import DynamicConv2d
from dyn_lightning.per_sample import depthwise
from dyn_lightning.per_sample.convolution import convolve, gradients
from dyn_lightning.per_sample.depthwise import serves
from dyn_lightning.per_sample.geometry import Geometry, Pair
from tests.per_sample.loop import assert_equals_the_loop, loop
from tests.tolerances import assert_close

# Kernel's rows and columns, stride, padding, dilation, the map's rows and columns.
SHAPES = [
    ((5, 5), (1, 1), (2, 2), (1, 1), (7, 6)),
    ((5, 5), (2, 2), (2, 2), (1, 1), (8, 9)),
    ((5, 4), (2, 1), (0, 3), (1, 1), (9, 5)),
    ((3, 7), (1, 2), (1, 3), (1, 1), (4, 11)),
    ((3, 3), (1, 1), (1, 1), (1, 1), (2, 2)),
    ((3, 3), (2, 2), (1, 1), (1, 1), (3, 3)),
    ((7, 7), (3, 2), (6, 0), (1, 1), (5, 12)),
    ((1, 1), (1, 1), (0, 0), (1, 1), (4, 3)),
    ((3, 3), (1, 1), (2, 2), (2, 2), (7, 6)),
    ((3, 2), (2, 3), (3, 1), (3, 2), (9, 8)),
    ((3, 3), (2, 1), (0, 4), (1, 5), (6, 7)),
    ((2, 2), (3, 3), (0, 0), (1, 1), (8, 9)),  # pixels between kernels that none sees
    ((2, 9), (1, 1), (0, 4), (1, 1), (2, 1)),  # columns of kernels that see zeros alone
    ((3, 3), (7, 7), (4, 4), (1, 1), (1, 1)),  # all do
    ((1, 5), (5, 5), (2, 2), (1, 1), (1, 3)),
    ((3, 3), (1, 1), (1, 1), (1, 1), (37, 70)),  # more than the vectors that are multiplied at once
    ((5, 5), (2, 2), (2, 2), (1, 1), (61, 75)),
    ((3, 3), (2, 1), (1, 1), (1, 1), (40, 37)),  # gradients of some lines at once, with a stride in one direction
    ((4, 5), (1, 3), (2, 1), (2, 1), (21, 64)),
    ((2, 2), (3, 3), (0, 0), (1, 1), (10, 13)),  # rows and columns after the last that a kernel sees
    ((2, 9), (1, 1), (0, 4), (1, 1), (5, 30)),  # weights of several chains
    ((3, 3), (2, 2), (2, 2), (2, 2), (9, 20)),  # of chains with a stride
    ((6, 6), (2, 2), (2, 3), (1, 1), (12, 17)),
]
GEOMETRY = Geometry((1, 1), (1, 1), (1, 1), 3)
SMALL = {"padding": (1, 2), "groups": 4}  # of `draw`, whose gradient of 3x5 kernels is slow


@pytest.fixture(params=["together", "one by one"])
def _planes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute planes of any size together, and one by one."""
    monkeypatch.setattr(depthwise, "MOST_OF_FEW_TOGETHER", 1 << 20 if request.param == "together" else 0)
    for name in ("LEAST_TOGETHER", "LEAST_TOGETHER_WITH_STRIDE"):
        monkeypatch.setattr(depthwise, name, 1 << 20)
    remember_nothing(monkeypatch)


def remember_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decide anew what other tests decided."""
    for name in ("_found", "_sizes"):
        monkeypatch.setattr(depthwise, name, getattr(depthwise, name).__wrapped__)


def draw(batch: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Draw input, routing, weight and bias of a depthwise convolution: 4 channels, 3 kernels."""
    torch.manual_seed(0)
    shapes = (batch, 4, 7, 6), (batch, 3), (3, 4, 1, 3, 5), (3, 4)
    return tuple(torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes)


def calls(name: str, function: Callable[[], Any]) -> int:
    """Count the calls of an operation of torch's or ours."""
    with torch.autograd.profiler.profile() as profile:
        function()
    return sum(event.name == name for event in profile.function_events)


def is_compiled(y: Tensor) -> bool:
    """Tell whether C++ gave an output."""
    return "dyn_lightning_convolve" in type(y.grad_fn).__name__


@pytest.mark.usefixtures("_planes")
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_torchs(
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, size: Pair, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    shapes = (1, 21, *size), (21, 1, *kernel)  # more planes than a vector has lanes, of any type
    tensors = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    assert_equals_torchs(tensors, Geometry(stride, padding, dilation, 21))


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "size"), SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [21, 75])  # vectors of all widths overlap
def test_in_channels_last_equals_torchs(
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, size: Pair, dtype: torch.dtype, channels: int
) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, channels, *size).to(dtype, memory_format=torch.channels_last).requires_grad_()
    kernels = torch.randn(3 * channels, 1, *kernel).to(dtype).requires_grad_()
    y, input_grad = assert_equals_torchs([x, kernels], Geometry(stride, padding, dilation, channels))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert input_grad.is_contiguous(memory_format=torch.channels_last)


def assert_equals_torchs(tensors: list[Tensor], geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Compare C++ with torch's convolution in double precision, give the output and the gradient of the input."""
    dtype = tensors[0].dtype
    wide = [tensor.detach().double().contiguous().requires_grad_() for tensor in tensors]
    y = convolve(*tensors, geometry)
    single = zip(wide[0].split(1), wide[1].split(len(wide[1]) // len(wide[0])), strict=True)
    expected = torch.cat([F.conv2d(image, kernels, None, *geometry) for image, kernels in single])
    assert is_compiled(y)
    assert y.dtype == dtype
    assert_close(y.double(), expected, dtype)
    cotangent = torch.randn_like(y)
    for some in (slice(0, 2), slice(0, 1), slice(1, 2)):
        found = torch.autograd.grad(y, tensors[some], cotangent, retain_graph=True)
        wanted = torch.autograd.grad(expected, wide[some], cotangent.double(), retain_graph=True)
        for ours, theirs in zip(found, wanted, strict=True):
            assert ours.dtype == dtype
            largest = theirs.abs().max().clamp(min=1)  # sums over the map have its rounding
            assert_close(ours.double() / largest, theirs / largest, dtype)
        if some.start == 0:
            input_grad = found[0]
    return y, input_grad


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the functions of the library that are called, within an operation or without."""
    names: list[str] = []

    def call(name: str, *arguments: Any) -> None:
        names.append(name)
        of_library(name, *arguments)

    of_library = depthwise._call
    monkeypatch.setattr(depthwise, "_call", call)
    return names


class TestOneImageWithoutABackwardPass:
    @pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "size"), SHAPES)
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
    def test_equals_torchs(
        self,
        kernel: Pair,
        stride: Pair,
        padding: Pair,
        dilation: Pair,
        size: Pair,
        dtype: torch.dtype,
        called: list[str],
    ) -> None:
        torch.manual_seed(0)
        x, kernels = (torch.randn(shape).to(dtype) for shape in ((1, 3, *size), (3, 1, *kernel)))
        geometry = Geometry(stride, padding, dilation, 3)
        y = convolve(x, kernels, geometry)
        assert called == ["forward"]
        assert y.dtype == dtype
        assert_close(y.double(), F.conv2d(x.double(), kernels.double(), None, *geometry), dtype)

    def test_of_a_layer(self, called: list[str]) -> None:
        x, routing, weight, bias = draw(1)
        y = dynamic_conv2d(x, routing, weight, bias, **SMALL)
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                assert_close(dynamic_conv2d(x, routing, weight, bias, **SMALL), y.detach())
        assert called == ["forward"] * 3

    @pytest.mark.parametrize("dtype", [torch.float16, torch.complex64])
    def test_other_types_are_left_to_torch(self, dtype: torch.dtype, called: list[str]) -> None:
        convolve(torch.randn(1, 3, 5, 5).to(dtype), torch.ones(3, 1, 3, 3, dtype=dtype), GEOMETRY)
        assert not called

    @pytest.mark.parametrize("change", [{"stride": (1000, 1000)}, {"padding": (50, 50), "stride": (40, 40)}])
    def test_maps_that_would_be_laid_out_much_larger_are_left_to_torch(
        self, change: dict[str, Pair], called: list[str]
    ) -> None:
        for size in (3, 30):
            convolve(torch.randn(1, 3, size, size), torch.randn(3, 1, 3, 3), GEOMETRY._replace(**change))
            assert len(called) == 1  # of a small one

    def test_a_map_whose_memory_was_freed(self) -> None:
        x = torch.randn(1, 3, 5, 5)
        x.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match=r"a tensor of shape \(1, 3, 5, 5\) has no memory"):
            convolve(x, torch.randn(3, 1, 3, 3), GEOMETRY)

    def test_counters_profilers_and_modes_see_an_operation(self, called: list[str]) -> None:
        seen: list[Any] = []

        class Mode(TorchFunctionMode):
            def __torch_function__(self, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:
                seen.append(function)
                return function(*given, **(named or {}))

        for size in (5, 200):
            x, kernels = torch.randn(1, 3, size, size), torch.randn(3, 1, 3, 3)
            with FlopCounterMode(display=False) as counter:
                convolve(x, kernels, GEOMETRY)
            assert counter.get_total_flops() == 2 * 3 * size * size * 3 * 3
            assert calls("dyn_lightning::convolve", lambda: convolve(x, kernels, GEOMETRY)) == 1  # noqa: B023
            with Mode():
                convolve(x, kernels, GEOMETRY)
            assert torch.ops.dyn_lightning.convolve.default in seen
            seen.clear()
        assert called == ["forward"] * 6

    def test_fake_tensors(self, called: list[str]) -> None:
        with FakeTensorMode():
            y = convolve(torch.randn(1, 3, 5, 5), torch.randn(3, 1, 3, 3), GEOMETRY)
        assert isinstance(y, FakeTensor)
        assert y.shape == (1, 3, 5, 5)
        assert not called

    @pytest.mark.parametrize(
        "change",
        [
            lambda x: TwoTensor(x, x.clone()),
            torch._neg_view,
            lambda x: torch._efficientzerotensor(x.shape),
            torch._lazy_clone,
            Parameter,
            lambda x: x.mT.contiguous().mT,
            lambda x: x[:, :1].expand(x.shape),
        ],
    )
    def test_tensors_that_are_not_their_memory_alone(self, change: Callable[[Tensor], Tensor]) -> None:
        x, kernels = torch.randn(1, 3, 5, 5), torch.randn(3, 1, 3, 3)
        for tensors in ((change(x), kernels), (x, change(kernels))):
            assert_close(convolve(*tensors, GEOMETRY), F.conv2d(*tensors, None, *GEOMETRY))

    def test_tensors_that_torch_makes_functions_of(self) -> None:
        x, kernels = torch.randn(1, 3, 5, 5), torch.randn(3, 1, 3, 3)
        expected = F.conv2d(x, kernels, None, *GEOMETRY)
        found = convolve(torch._to_functional_tensor(x), torch._to_functional_tensor(kernels), GEOMETRY)
        assert_close(torch._from_functional_tensor(found), expected)

    @pytest.mark.filterwarnings("ignore:.torch.jit.trace.* is deprecated")
    @pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
    def test_a_traced_network(self) -> None:
        layer = DynamicConv2d(8, 8, 3, padding=1, groups=8).eval()
        x, other = torch.randn(2, 1, 8, 5, 5)
        with torch.no_grad():
            assert_close(torch.jit.trace(layer, x)(other), layer(other))

    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, for forward mode
    def test_transforms(self) -> None:
        x, kernels = torch.randn(4, 1, 3, 5, 5), torch.randn(3, 1, 3, 3)
        found = torch.vmap(lambda x: convolve(x, kernels, GEOMETRY))(x)
        assert_close(found, torch.stack([F.conv2d(image, kernels, None, *GEOMETRY) for image in x]))
        tangent = (torch.randn_like(x[0]),)
        _, along = torch.func.jvp(lambda x: convolve(x, kernels, GEOMETRY), (x[0],), tangent)
        assert_close(along, F.conv2d(*tangent, kernels, None, *GEOMETRY))

    def test_by_several_threads(self) -> None:
        x, kernels = torch.randn(16, 1, 64, 30, 30), torch.randn(64, 1, 3, 3)
        geometry = GEOMETRY._replace(groups=64)
        with ThreadPoolExecutor(4) as threads:
            found = [*threads.map(lambda image: convolve(image, kernels, geometry), x)]
        assert_close(found, [F.conv2d(image, kernels, None, *geometry) for image in x])

    def test_on_a_device_that_it_cannot_serve_nothing_is_compiled(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(depthwise, "is_compiled", lambda: pytest.fail("compiled"))
        y = convolve(torch.empty(1, 3, 5, 5, device="meta"), torch.empty(3, 1, 3, 3, device="meta"), GEOMETRY)
        assert y.device.type == "meta"


@pytest.mark.usefixtures("_planes")
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_any_number_of_threads(threads: int) -> None:
    torch.manual_seed(0)
    shapes = (1, 75, 7, 6), (75, 1, 3, 5)  # groups of planes enough for all threads
    x, kernels = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes)
    geometry, before = Geometry((1, 2), (1, 2), (1, 1), 75), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = convolve(x, kernels, geometry)
        assert is_compiled(y)
        expected = F.conv2d(x, kernels, None, *geometry)
        assert_close(y, expected)
        assert_close(*(torch.autograd.grad(out.square().sum(), (x, kernels)) for out in (y, expected)))
    finally:
        torch.set_num_threads(before)


def test_tensors_that_are_not_dense() -> None:
    x, _, weight, _ = draw(1)
    kernels = weight[0].detach().mT.contiguous().mT.requires_grad_()
    geometry = Geometry((1, 1), (1, 2), (1, 1), 4)
    y, expected = convolve(x, kernels, geometry), F.conv2d(x, kernels, None, *geometry)
    assert is_compiled(y)
    assert_close(*(torch.autograd.grad(out.sum(), (x, kernels)) for out in (y, expected)))  # of an expanded gradient


@pytest.mark.usefixtures("_planes")
@pytest.mark.parametrize("size", [8, 42])  # narrower than a vector, and wider
def test_pixels_that_no_kernel_sees_need_not_be_numbers(size: int) -> None:
    x = torch.randn(1, 4, size, size)
    x[..., -1] = x[..., -1, :] = torch.inf
    kernels = torch.randn(4, 1, 3, 3, requires_grad=True)
    y = convolve(x.requires_grad_(), kernels, Geometry((2, 2), (0, 0), (1, 1), 4))
    assert is_compiled(y)
    assert all(found.isfinite().all() for found in (y, *torch.autograd.grad(y.sum(), (x, kernels))))


@pytest.mark.usefixtures("_planes")
@pytest.mark.parametrize("other", [torch.nan, torch.inf])
@pytest.mark.parametrize(("size", "stride"), [((8, 7), 1), ((21, 19), 1), ((21, 39), 2)])
def test_planes_do_not_see_each_other(other: float, size: Pair, stride: int) -> None:
    torch.manual_seed(0)
    geometry, found = Geometry((stride, stride), (1, 1), (1, 1), 37), []
    tensors = [torch.randn(shape) for shape in ((1, 37, *size), (37, 1, 3, 3))]
    for value in (None, other):
        x, kernels = (tensor.clone() for tensor in tensors)
        if value is not None:
            x[:, 0] = x[:, 20] = value
        y = convolve(x.requires_grad_(), kernels.requires_grad_(), geometry)
        assert is_compiled(y)
        x_grad, kernels_grad = torch.autograd.grad(y, (x, kernels), torch.ones_like(y))
        found.append([y[0], x_grad[0], kernels_grad])
    others = [plane for plane in range(37) if plane not in (0, 20)]
    for without, beside in zip(*found, strict=True):
        assert torch.equal(without[others], beside[others])
    assert not found[1][0][[0, 20]].isfinite().all()


def test_multiply_adds() -> None:
    x, _, weight, _ = draw(1)
    with FlopCounterMode(display=False) as counter:
        y = convolve(x, weight[0], Geometry((1, 1), (1, 2), (1, 1), 4))
    once = 4 * 7 * 6 * 3 * 5
    assert counter.get_total_flops() == 2 * once
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y.sum(), (x, weight))
    assert counter.get_total_flops() == 2 * 2 * once


@pytest.mark.parametrize(("kernel", "size", "stride"), [(5, 7, 1), (3, 2, 1), (3, 28, 2), (3, 18, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_and_half_precision(kernel: int, size: int, stride: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 8192, size, size).to(dtype).requires_grad_()
    kernels = torch.randn(8192, 1, kernel, kernel).to(dtype).requires_grad_()
    geometry = Geometry((stride, stride), (kernel // 2, kernel // 2), (1, 1), 8192)
    y = convolve(x, kernels, geometry)
    assert is_compiled(y)
    cotangent = torch.randn_like(y)
    found = (y, *torch.autograd.grad(y, (x, kernels), cotangent))
    wide = [tensor.detach().double().requires_grad_() for tensor in (x, kernels)]
    expected = F.conv2d(*wide, None, *geometry)
    for ours, theirs in zip(found, (expected, *torch.autograd.grad(expected, wide, cotangent.double())), strict=True):
        assert ours.dtype == dtype
        assert_close(ours.double(), theirs, dtype)


def test_rounding_to_bfloat16() -> None:
    def convolved(numbers: list[float], kernel: list[float]) -> tuple[Tensor, Tensor]:
        x, kernels = (torch.tensor(values, dtype=torch.bfloat16)[None, None, None] for values in (numbers, kernel))
        found = convolve(x, kernels, Geometry((1, 1), (0, 0), (1, 1), 1))
        return found, F.conv2d(x.float(), kernels.float()).bfloat16()

    # Sums in the middle between two numbers, below and above the odd one; and what may be rounded up.
    found, expected = convolved([1, 1, 1 + 2**-7, 1, 2 - 2**-7, -1, 3.3895e38, 3.3895e38], [1, 2**-8])
    assert torch.equal(found, expected)
    special = [0.0, 1e-40, float("inf"), float("-inf"), float("nan")]
    for ours, theirs in [convolved(special, [1]), convolved([3.3895e38, 3.3895e38], [1, 1])]:
        assert torch.equal(ours.nan_to_num(7), theirs.nan_to_num(7))


@pytest.mark.parametrize(("samples", "channels"), [(1, 64), (2, 15)])
def test_in_channels_last_one_image_and_few_channels_are_left_to_torch(samples: int, channels: int) -> None:
    x = torch.randn(samples, channels, 7, 6).to(memory_format=torch.channels_last).requires_grad_()
    kernels = torch.randn(samples * channels, 1, 3, 3)
    assert not is_compiled(convolve(x, kernels, GEOMETRY._replace(groups=channels)))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", ["grouped", "chunked"])
def test_in_channels_last_equals_the_loop(method: str, training: bool, called: list[str]) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 32, 40, 40, dtype=torch.float64).to(memory_format=torch.channels_last)
    routing, weight = torch.rand(4, 3, dtype=torch.float64), torch.randn(3, 32, 1, 5, 5, dtype=torch.float64)
    if training:
        tensors = tuple(tensor.requires_grad_() for tensor in (x, routing, weight))
        assert_equals_the_loop(tensors, method, padding=2, groups=32)
    else:
        found = dynamic_conv2d(x, routing, weight, padding=2, groups=32, method=method)
        assert_close(found, loop(x, routing, weight, padding=2, groups=32))
    assert set(called) == {"forward", "backward"} if training else {"forward"}


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_in_channels_last_by_any_number_of_threads(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        test_in_channels_last_equals_torchs((3, 3), (2, 1), (1, 1), (1, 1), (90, 40), torch.float64, 32)
    finally:
        torch.set_num_threads(before)


def test_derivatives_of_any_order() -> None:
    x, _, weight, _ = draw()
    x, kernels = x[:1, :, :3, :4].detach().requires_grad_(), weight[0].detach().requires_grad_()
    geometry = Geometry((1, 2), (1, 2), (1, 1), 4)

    def function(x: Tensor, kernels: Tensor) -> Tensor:
        return convolve(x, kernels, geometry)

    assert gradcheck(function, (x, kernels), check_batched_grad=True)
    assert gradgradcheck(function, (x, kernels))
    assert gradcheck(function, (x.detach(), kernels))


@pytest.mark.parametrize("method", ["grouped", "chunked"])
class TestMixedKernels:
    def test_equal_a_loop(self, method: str) -> None:
        for limit in (1, 1 << 20):
            assert_equals_the_loop(draw(), method, limit, **SMALL)

    @pytest.mark.parametrize("needed", [n for n in itertools.product([True, False], repeat=3) if any(n)])
    def test_what_needs_no_gradient(self, method: str, needed: tuple[bool, ...]) -> None:
        tensors = [tensor.detach().requires_grad_(need) for tensor, need in zip(draw()[:3], needed, strict=True)]
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        outputs = (function(*tensors, **SMALL) for function in (_by(method), loop))
        assert_close(*(torch.autograd.grad(y.square().sum(), wanted) for y in outputs))

    def test_gradients_of_several_cotangents(self, method: str) -> None:
        tensors = draw()[:3]
        outputs = [function(*tensors, **SMALL) for function in (_by(method), loop)]
        cotangents = torch.randn(3, *outputs[0].shape, dtype=torch.float64)
        assert_close(*(torch.autograd.grad(y, tensors, cotangents, is_grads_batched=True) for y in outputs))

    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, for forward mode
    def test_transforms(self, method: str) -> None:
        x, routing, weight, _ = (tensor.detach() for tensor in draw())
        for take in (torch.func.grad, torch.func.hessian):
            found, expected = (
                take(lambda shares, f=f: f(x, shares, weight, **SMALL).square().sum())(routing)
                for f in (_by(method), loop)
            )
            assert_close(found, expected)
        tangent = (torch.randn_like(weight),)
        found, expected = (
            torch.func.jvp(lambda w, f=f: f(x, routing, w, **SMALL), (weight,), tangent) for f in (_by(method), loop)
        )
        assert_close(found, expected)

    def test_complex_numbers(self, method: str) -> None:
        tensors = draw(dtype=torch.complex128)
        outputs = [function(*tensors, **SMALL) for function in (_by(method), loop)]
        found, expected = (torch.autograd.grad(y, tensors, torch.ones_like(y)) for y in outputs)
        assert_close([*map(torch.view_as_real, found)], [*map(torch.view_as_real, expected)])

    @pytest.mark.parametrize("inside", [True, False])
    def test_bfloat16_autocast(self, method: str, inside: bool) -> None:
        tensors = draw(dtype=torch.float32)[:3]
        with torch.autocast("cpu", torch.bfloat16):
            y = _by(method)(*tensors, **SMALL)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            found = torch.autograd.grad(y, tensors, torch.ones_like(y))
        expected = torch.autograd.grad(loop(*tensors, **SMALL).sum(), tensors)
        for ours, theirs in zip(found, expected, strict=True):
            assert ours.dtype == torch.float32
            assert_close(ours / theirs.abs().max(), theirs / theirs.abs().max(), torch.bfloat16)

    def test_a_checkpoint(self, method: str) -> None:
        tensors = draw()
        y = checkpoint(_by(method), *tensors, use_reentrant=False, **SMALL)
        found = torch.autograd.grad(y.square().sum(), tensors)
        assert_close(found, torch.autograd.grad(loop(*tensors, **SMALL).square().sum(), tensors))

    @pytest.mark.parametrize("dynamic", [True, False])
    def test_compiled_to_one_graph(self, method: str, dynamic: bool) -> None:
        def step(*tensors: Tensor) -> Tensor:
            return _by(method)(*tensors, **SMALL)

        torch.compiler.reset()
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for batch in (3, 5) if dynamic else (3,):
            tensors = draw(batch)
            y, found = compiled(*tensors).square().sum(), []
            name = f"dyn_lightning::{'convolve' if method == 'grouped' else method}_backward"
            assert calls(name, lambda: found.extend(torch.autograd.grad(y, tensors))) == 1  # noqa: B023
            assert_close(found, torch.autograd.grad(step(*tensors).square().sum(), tensors))


def test_large_maps_in_channels_last_one_by_one() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 80, 80, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    tensors = (
        x,
        torch.rand(2, 3, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 8, 1, 5, 5, dtype=torch.float64, requires_grad=True),
    )
    assert_equals_the_loop(tensors, "chunked", padding=2, groups=8)


@pytest.mark.parametrize("training", [True, False])
def test_compiled_for_another_device_any_number_of_planes_has_one_graph(training: bool) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(convolve, fullgraph=True, backend=counter, dynamic=True)
    for planes in (300, 600, 5000, 9000):
        x = torch.empty(1, planes, 8, 8, device="meta", requires_grad=training)
        compiled(x, torch.empty(planes, 1, 3, 3, device="meta"), Geometry((1, 1), (1, 1), (1, 1), planes))
    assert counter.frame_count == 1


@pytest.mark.parametrize("size", [1, 5, 56])
def test_what_it_serves(size: int) -> None:
    x, kernels = (2, 48, size, size), (96, 1, 3, 3)
    geometry = Geometry((1, 1), (1, 1), (1, 1), 48)
    assert all(serves(x, kernels, geometry, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float64))
    assert not serves(x, kernels, geometry, torch.float16)
    assert not serves(x, (48, *kernels[1:]), geometry, torch.float32)
    assert not serves(x, (192, *kernels[1:]), geometry, torch.float32)  # two output channels a group
    assert not serves(x, (96, 3, 3, 3), geometry._replace(groups=16), torch.float32)


def test_maps_are_not_taken_apart_into_pixels() -> None:
    geometry = Geometry((96, 96), (0, 0), (1, 1), 4096)
    assert not serves((1, 4096, 96, 96), (4096, 1, 96, 96), geometry, torch.float32)
    assert serves((1, 4096, 96, 96), (4096, 1, 96, 96), geometry, torch.bfloat16)
    assert serves((1, 4096, 64, 64), (4096, 1, 64, 64), geometry._replace(stride=(64, 64)), torch.float32)


@pytest.mark.parametrize(
    ("samples", "size", "stride", "expected"),
    [(10, 44, 1, True), (10, 45, 1, False), (9, 15, 1, False), (9, 14, 1, True), (5, 80, 2, True), (5, 81, 2, False)],
)
def test_planes_that_are_computed_together(samples: int, size: int, stride: int, expected: bool) -> None:
    """Of 16 channels a thread: maps that are near enough, and smaller ones where there are few planes."""
    shape = (samples, 16 * torch.get_num_threads(), size, size)
    geometry = Geometry((stride, stride), (1, 1), (1, 1), shape[1])
    assert depthwise._is_together(shape, geometry, torch.float32, torch.get_num_threads()) == expected


@pytest.mark.parametrize("threads", [1, 2, 7])
def test_what_it_serves_does_not_depend_on_threads(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Since the choice of a method does not: kernels as large as maps are computed together by any number of them."""
    remember_nothing(monkeypatch)
    torch.manual_seed(0)
    x, kernels = torch.randn(1, 200, 16, 16), torch.randn(200, 1, 16, 16)
    geometry, before = Geometry((1, 1), (0, 0), (1, 1), 200), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert serves(x.shape, kernels.shape, geometry, torch.float32)
        assert_close(convolve(x, kernels, geometry), (x * kernels[:, 0]).sum((2, 3), keepdim=True))
        *_, used, together = depthwise._sizes(x.shape, (1, 1), (16, 16), geometry, torch.float32, threads, False)
        assert (used, together) == (threads, True)
    finally:
        torch.set_num_threads(before)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's own check
@pytest.mark.parametrize(
    ("input", "kernels", "layout"),
    [
        ((1, 4, 7, 6), (4, 1, 3, 5), torch.contiguous_format),
        ((2, 16, 7, 6), (32, 1, 3, 5), torch.channels_last),
        ((2, 16, 3, 2), (32, 1, 5, 6), torch.channels_last),  # to one pixel
        ((2, 4, 7, 6), (12, 4, 3, 5), torch.channels_last),
        ((2, 64, 56, 56), (128, 64, 3, 5), torch.channels_last),  # a convolution for each sample
    ],
)
def test_is_a_well_formed_operation(input: tuple[int, ...], kernels: tuple[int, ...], layout: Any) -> None:
    groups = 1 if kernels[1] > 1 else input[1]
    x = torch.randn(input).to(memory_format=layout).requires_grad_()
    operands = (x, torch.randn(kernels, requires_grad=True), [1, 1, 1, 2, 1, 1, groups])
    torch.library.opcheck(torch.ops.dyn_lightning.convolve.default, operands)
    grad = torch.randn_like(torch.ops.dyn_lightning.convolve(*operands))
    given = (grad, *(tensor.detach() for tensor in operands[:2]), operands[2], [True, True])
    torch.library.opcheck(torch.ops.dyn_lightning.convolve_backward.default, given)


def test_gradients_that_are_not_wanted() -> None:
    x, _, weight, _ = (tensor.detach() for tensor in draw(1))
    geometry = Geometry((1, 1), (1, 2), (1, 1), 4)
    grad = torch.randn_like(convolve(x, weight[0], geometry))
    both = gradients(grad, x, weight[0], geometry, (True, True))
    for wanted in ((True, False), (False, True), (False, False)):
        found = gradients(grad, x, weight[0], geometry, wanted)
        assert [one is not None for one in found] == [*wanted]
        assert all(one is None or torch.equal(one, other) for one, other in zip(found, both, strict=True))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("least", [1, 2])
def test_an_export_does_without(strict: bool, least: int) -> None:
    layer = DynamicConv2d(8, 8, 5, padding=2, groups=8, method="grouped")
    dynamic = ({0: torch.export.Dim("batch", min=least, max=1024)},)
    # As `torch.onnx.export` does, where the example is no limit.
    with torch.fx.experimental._config.patch(backed_size_oblivious=least == 1):
        exported = torch.export.export(layer, (torch.randn(4, 8, 9, 9),), dynamic_shapes=dynamic, strict=strict)
    x = torch.randn(3, 8, 9, 9)
    assert_close(exported.module()(x), layer(x))
    if least == 1:
        assert_close(exported.module()(x[:1]), layer(x[:1]))


def _by(method: str) -> Callable[..., Tensor]:
    return lambda *tensors, **geometry: dynamic_conv2d(*tensors, method=method, **geometry)
