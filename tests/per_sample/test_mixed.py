"""Kernels mixed block by block in C++, against the loop over samples."""

import copy
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dyn_lightning.cost import peak_bytes
from dyn_lightning.functional import choose_method, dynamic_conv2d
from dyn_lightning.layers import CondConv2d, DynamicConv2d
from dyn_lightning.per_sample import mixed, native
from dyn_lightning.per_sample.geometry import Geometry, Pair
from dyn_lightning.per_sample.mixed import cpp, numbers_held
from tests.per_sample.loop import loop
from tests.tolerances import assert_close

LAYOUTS = [torch.contiguous_format, torch.channels_last]
# Kernel's rows and columns, stride, padding, dilation, the map's rows and columns.
SHAPES = [
    ((3, 3), (1, 1), (1, 1), (1, 1), (7, 6)),
    ((3, 3), (2, 2), (1, 1), (1, 1), (8, 9)),
    ((1, 1), (1, 1), (0, 0), (1, 1), (4, 3)),
    ((1, 1), (1, 1), (1, 1), (1, 1), (1, 1)),  # an output that is larger, in another layout than one pixel's
    ((5, 4), (2, 1), (0, 3), (1, 1), (9, 5)),
    ((3, 2), (2, 3), (3, 1), (3, 2), (9, 8)),
    ((2, 2), (3, 3), (0, 0), (1, 1), (8, 9)),  # pixels between kernels, and after the last, that none sees
    ((2, 9), (1, 1), (0, 4), (1, 1), (2, 1)),  # columns of kernels that see zeros alone
    ((3, 3), (7, 7), (4, 4), (1, 1), (1, 1)),  # all do
    ((3, 3), (1, 1), (1, 1), (1, 1), (13, 70)),
    ((1, 1), (2, 2), (1, 1), (1, 1), (3, 3)),  # a stride and padding after which the output has the map's size
    ((1, 1), (1, 2), (0, 1), (1, 1), (4, 2)),
]
# In and out: of one vector and of more, which overlap or not, of one block and of more.
# Of a last vector more than half is used, or less.
CHANNELS = [(16, 16), (24, 25), (30, 61), (70, 193)]


def draw(
    batch: int = 3,
    channels: tuple[int, int] = (21, 37),
    size: Pair = (7, 6),
    kernel: Pair = (3, 3),
    kernels: int = 3,
    dtype: torch.dtype = torch.float64,
    layout: torch.memory_format = torch.channels_last,
) -> tuple[Tensor, ...]:
    """Draw input, routing and weight."""
    torch.manual_seed(0)
    shapes = (batch, channels[0], *size), (batch, kernels), (kernels, *channels[::-1], *kernel)
    x, routing, weight = (torch.randn(shape, dtype=dtype) for shape in shapes)
    return tuple(tensor.requires_grad_() for tensor in (x.contiguous(memory_format=layout), routing, weight))


@contextmanager
def threads_of(number: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def by_cpp(*tensors: Tensor, **geometry: Any) -> Tensor:
    return dynamic_conv2d(*tensors, method="cpp", **geometry)


def assert_equals_the_loop(tensors: tuple[Tensor, ...], **geometry: Any) -> None:
    """Compare values and gradients with the loop's in double precision."""
    dtype = tensors[0].dtype
    wide = [tensor.detach().double().contiguous().requires_grad_() for tensor in tensors]
    y, expected = by_cpp(*tensors, **geometry), loop(*wide, **geometry)
    assert "cpp" in type(y.grad_fn).__name__
    cotangent = torch.randn_like(expected)
    found = (y, *torch.autograd.grad(y, tensors, cotangent.to(dtype)))
    wanted = (expected, *torch.autograd.grad(expected, wide, cotangent))
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == dtype
        largest = theirs.detach().abs().max().clamp(min=1)  # sums over a map and its channels have its rounding
        assert_close(ours.double() / largest, theirs / largest, dtype)
    with torch.no_grad():
        assert torch.equal(by_cpp(*tensors, **geometry), y)
    last = tensors[0].is_contiguous(memory_format=torch.channels_last) and not tensors[0].is_contiguous()
    for map_ in found[:2]:
        assert map_.is_contiguous(memory_format=torch.channels_last if last else torch.contiguous_format)


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "size"), SHAPES)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_loop(
    kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, size: Pair, channels: Pair, dtype: torch.dtype
) -> None:
    for layout in LAYOUTS:
        tensors = draw(channels=channels, size=size, kernel=kernel, dtype=dtype, layout=layout)
        assert_equals_the_loop(tensors, stride=stride, padding=padding, dilation=dilation)


# As SHAPES, of fewer positions than the widest vectors have lanes, as many, and more.
OF_ONE = [
    *SHAPES,
    ((1, 1), (1, 1), (0, 0), (1, 1), (1, 1)),
    ((2, 3), (1, 1), (0, 1), (1, 1), (2, 3)),
    ((3, 3), (2, 2), (1, 1), (1, 1), (4, 3)),
    ((3, 2), (2, 3), (1, 3), (1, 2), (5, 5)),
    ((1, 1), (3, 3), (4, 6), (1, 1), (1, 2)),  # most see zeros alone
    *(((1, 1), (1, 1), (0, 0), (1, 1), size) for size in ((1, 7), (2, 4), (3, 5), (4, 4), (1, 17), (9, 15))),
    *(((3, 3), (1, 1), (1, 1), (1, 1), size) for size in ((2, 2), (4, 4), (7, 7), (8, 8), (5, 13))),
]


@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "size"), OF_ONE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_sample(kernel: Pair, stride: Pair, padding: Pair, dilation: Pair, size: Pair, dtype: torch.dtype) -> None:
    # With more threads than output channels, and weights enough that they share the work; with fewer weights of 1x1
    # kernels than that; and with more of 3x3 kernels than are mixed at once.
    for channels, kernels, threads in (((16, 16), 64, 20), ((21, 37), 4, 2), ((137, 161), 2, 3)):
        for layout in LAYOUTS:
            tensors = draw(1, channels, size, kernel, kernels, dtype, layout)
            with threads_of(threads):
                assert_equals_the_loop(tensors, stride=stride, padding=padding, dilation=dilation)


@pytest.mark.parametrize("batch", [1, 2, 4, 5, 7, 13])  # samples whose blocks are mixed together, and those that remain
@pytest.mark.parametrize("kernels", [1, 2, 17])
def test_any_batch_and_number_of_kernels(batch: int, kernels: int) -> None:
    for layout in LAYOUTS:
        assert_equals_the_loop(draw(batch, kernels=kernels, layout=layout), padding=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (2, 1)])
@pytest.mark.parametrize("channels", [(16, 300), (300, 16), (24, 144), (40, 210), (21, 37)])
def test_blocks_of_whole_pixels(channels: Pair, stride: int, padding: int, dtype: torch.dtype) -> None:
    """Of more channels than others, for rows of more pixels than are multiplied at once."""
    with threads_of(2):  # with more threads than samples there are none
        for layout in LAYOUTS:
            tensors = draw(channels=channels, size=(3, 139), kernel=(1, 1), dtype=dtype, layout=layout)
            assert_equals_the_loop(tensors, stride=stride, padding=padding)


# Of as many pixels as are multiplied as they lie, and as are summed up; with fewer and more channels than are
# multiplied at once; and with more weights than are summed up.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("size", [(8, 8), (5, 13), (16, 16), (15, 19), (28, 28)])
@pytest.mark.parametrize("channels", [(40, 24), (21, 37), (16, 300), (300, 16)])
def test_products_of_planes(channels: Pair, size: Pair, threads: int, dtype: torch.dtype) -> None:
    with threads_of(threads):
        for batch in (1, 5):
            tensors = draw(batch, channels, size, (1, 1), dtype=dtype, layout=torch.contiguous_format)
            assert_equals_the_loop(tensors)
    assert_equals_the_loop(tensors, padding=(1, 0))  # the input's gradient is a whole plane, the output not


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("channels", [(1, 1), (1, 70), (3, 5), (7, 2), (15, 33), (70, 1)])
def test_few_channels_of_large_planes(channels: Pair, dtype: torch.dtype) -> None:
    for batch, size in ((2, (16, 16)), (3, (17, 31)), (1, (40, 30))):
        with threads_of(2):
            assert_equals_the_loop(draw(batch, channels, size, (1, 1), 2, dtype, torch.contiguous_format))


def test_more_weights_than_are_mixed_at_once() -> None:
    assert_equals_the_loop(draw(3, (300, 500), (8, 8), (1, 1), 2, layout=torch.contiguous_format))


@pytest.mark.parametrize("stride", [(1, 2), (2, 1)])
def test_as_many_outputs_as_inputs_after_a_stride(stride: Pair) -> None:
    tensors = draw(channels=(16, 16), size=(16, 16), kernel=(1, 1), layout=torch.contiguous_format)
    padding = tuple(8 * (step - 1) for step in stride)
    assert by_cpp(*tensors, stride=stride, padding=padding).shape[2:] == tensors[0].shape[2:]
    assert_equals_the_loop(tensors, stride=stride, padding=padding)


@pytest.mark.parametrize("threads", [1, 2, 5, 16])
@pytest.mark.parametrize(
    ("channels", "kernel"),
    [((16, 16), (3, 3)), ((70, 193), (3, 3)), ((24, 144), (1, 1))],
    ids=["one block", "blocks enough for all threads", "a block of whole pixels"],
)
@pytest.mark.parametrize("batch", [2, 9])
def test_any_number_of_threads(threads: int, channels: Pair, kernel: Pair, batch: int) -> None:
    with threads_of(threads):
        for layout in LAYOUTS:
            assert_equals_the_loop(draw(batch, channels, kernel=kernel, layout=layout), padding=kernel[0] // 2)


@pytest.mark.parametrize(
    ("blocks", "numbers", "samples", "threads", "parts"),
    [
        (1, 1000, 32, 1, 1),
        (1, 1000, 32, 16, 16),
        (1, 1000, 3, 16, 3),
        (1, 1000, 0, 16, 1),
        (4, 1000, 32, 16, 4),
        (6, 1000, 32, 16, 8),
        (9, 1000, 32, 2, 2),
        (16, 1000, 32, 2, 1),
        (9, 1 << 21, 32, 4, 2),  # so many sums at most
        (9, 1 << 30, 32, 4, 1),
    ],
)
def test_parts_of_the_samples(blocks: int, numbers: int, samples: int, threads: int, parts: int) -> None:
    assert mixed._parts(blocks, numbers, samples, threads) == parts
    assert parts == 1 or parts * numbers <= mixed.MOST_IN_PARTS


# What products.cpp computes.
FEW: dict[str, Any] = {
    "channels": (3, 37),
    "size": (16, 16),
    "kernel": (1, 1),
    "layout": torch.contiguous_format,
}
# Of mixed.cpp, of products.cpp, and of both.
WAYS = [{}, FEW, {**FEW, "channels": (40, 24), "size": (8, 8)}]


@pytest.mark.parametrize("needed", [n for n in itertools.product([True, False], repeat=3) if any(n)])
@pytest.mark.parametrize("drawn", WAYS)
def test_what_needs_no_gradient(drawn: dict[str, Any], needed: tuple[bool, ...]) -> None:
    tensors = [tensor.detach().requires_grad_(need) for tensor, need in zip(draw(**drawn), needed, strict=True)]
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    outputs = by_cpp(*tensors), loop(*tensors)
    assert_close(*(torch.autograd.grad(y.square().sum(), wanted) for y in outputs))


@pytest.mark.parametrize(
    ("drawn", "files"),
    [
        (WAYS[0], ["mixed", "mixed", "mixed"]),
        (WAYS[1], ["products", "products", "products"]),
        (WAYS[2], ["products", "products", "mixed"]),
    ],
)
def test_which_file_computes(drawn: dict[str, Any], files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    called = []

    def call(name: str, *given: Any) -> None:
        called.append(name)
        native.call(name, *given)

    monkeypatch.setattr(mixed, "call", call)
    tensors = draw(**drawn)
    torch.autograd.grad(by_cpp(*tensors).sum(), tensors)
    jobs = ("forward", "backward", "differentiate")
    assert called == [f"{file}_{job}" for file, job in zip(files, jobs, strict=True)]


@pytest.mark.parametrize("drawn", WAYS)
def test_empty_batch(drawn: dict[str, Any]) -> None:
    tensors = draw(0, **drawn)
    y = cpp(*tensors, Geometry((1, 1), (0, 0), (1, 1), 1))
    assert y.shape == (0, *loop(*draw(1, **drawn)).shape[1:])
    gradients = torch.autograd.grad(y.sum(), tensors)
    assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in tensors]
    assert not any(gradient.any() for gradient in gradients)


def test_first_and_second_derivatives() -> None:
    tensors = draw(2, (8, 8), (3, 4), kernels=2)
    geometry = Geometry((1, 2), (1, 0), (1, 1), 1)
    assert cpp(*tensors, geometry).numel()
    assert gradcheck(lambda *tensors: cpp(*tensors, geometry), tensors)
    small = draw(1, (8, 8), (2, 2), (2, 1), kernels=2)
    assert gradgradcheck(lambda *tensors: cpp(*tensors, geometry), small)


@pytest.mark.parametrize("batch", [2, 4])  # of one sample, or two, every other one
def test_tensors_that_are_not_dense(batch: int) -> None:
    x, routing, weight = draw(batch)
    tensors = (x[::2, :, ::2], routing[::2], weight.mT.contiguous().mT)
    outputs = by_cpp(*tensors, padding=1), loop(*tensors, padding=1)
    assert_close(*outputs)
    assert_close(*(torch.autograd.grad(y.sum(), (x, routing, weight)) for y in outputs))  # of an expanded gradient


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pixels_that_no_kernel_sees_need_not_be_numbers(layout: torch.memory_format, batch: int) -> None:
    x, *others = draw(batch, size=(8, 8), layout=layout)
    x.detach()[..., -1] = torch.inf
    y = by_cpp(x, *others, stride=2)
    assert all(found.isfinite().all() for found in (y, *torch.autograd.grad(y.sum(), (x, *others))))


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbers_that_are_none_reach_those_that_they_touch(layout: torch.memory_format, batch: int) -> None:
    x, *others = draw(batch, layout=layout)
    x.detach()[0, 3, 2, 2] = torch.nan
    found, expected = by_cpp(x, *others, padding=1), loop(x, *others, padding=1)
    assert torch.equal(found.isnan(), expected.isnan())
    assert found.isnan().any()


def test_a_map_whose_memory_was_freed() -> None:
    x, *others = (tensor.detach() for tensor in draw())
    x.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=r"a tensor of shape \(3, 21, 7, 6\) has no memory"):
        by_cpp(x, *others)


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_to_one_graph(dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(by_cpp, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for batch in (3, 5) if dynamic else (3,):
        tensors = draw(batch)
        y, expected = compiled(*tensors, padding=1), by_cpp(*tensors, padding=1)
        assert torch.equal(y, expected)
        assert_close(*(torch.autograd.grad(out.square().sum(), tensors) for out in (y, expected)))


@pytest.mark.parametrize("size", [(8, 8), (2, 2)])
def test_auto_is_compiled_with_an_open_batch(size: Pair) -> None:
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(dynamic_conv2d, fullgraph=True, backend=counter)
    count = size[0] * size[1]
    for batch in (3, count, count + 1):  # as many images as positions; by the same method as that many
        tensors = draw(batch, (64, 64), size, dtype=torch.float32, layout=torch.contiguous_format)
        assert_close(compiled(*tensors, padding=1), dynamic_conv2d(*tensors, padding=1))
    assert counter.frame_count == 2  # of a batch of 3, and of any


@pytest.mark.parametrize("layout", LAYOUTS)
def test_by_inductor_the_layout_stays(layout: torch.memory_format) -> None:
    torch.compiler.reset()
    tensors = draw(dtype=torch.float32, layout=layout)
    y = torch.compile(by_cpp, fullgraph=True)(*tensors, padding=1)
    assert y.is_contiguous(memory_format=layout)
    assert_close(y, by_cpp(*tensors, padding=1))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's own check
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("needed", [[True, True, True], [False, True, False], [True, False, True]])
def test_is_a_well_formed_operation(layout: torch.memory_format, needed: list[bool]) -> None:
    operands = (*draw(2, (16, 16), (4, 3), layout=layout), [1, 1, 1, 1, 1, 1, 1])
    torch.library.opcheck(torch.ops.dyn_lightning.cpp.default, operands)
    grad = torch.randn_like(torch.ops.dyn_lightning.cpp(*operands))
    given = (grad, *(tensor.detach() for tensor in operands[:3]), operands[3], needed)
    torch.library.opcheck(torch.ops.dyn_lightning.cpp_backward.default, given)


def test_multiply_adds() -> None:
    tensors = [tensor.detach() for tensor in draw(2)]
    mixing, products = 2 * 3 * 37 * 21 * 9, 2 * 37 * 21 * 9 * 7 * 6
    with FlopCounterMode(display=False) as counter:
        by_cpp(*tensors, padding=1)
    assert counter.get_total_flops() == 2 * (mixing + products)
    tensors = draw(2)
    y = by_cpp(*tensors, padding=1)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(y.sum(), tensors)
    assert counter.get_total_flops() == 2 * (3 * mixing + 2 * products)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        y = by_cpp(*(tensor.detach() for tensor in draw()), padding=1)
    assert isinstance(y, FakeTensor)
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, for forward mode
def test_transforms() -> None:
    x, *others = (tensor.detach() for tensor in draw())
    found = torch.vmap(lambda x: by_cpp(x, *others))(x[:, None].expand(-1, 3, -1, -1, -1))
    assert_close(found, torch.stack([loop(image.expand(3, -1, -1, -1), *others) for image in x]))
    tangent = torch.randn_like(x)
    _, along = torch.func.jvp(lambda x: by_cpp(x, *others), (x,), (tangent,))
    assert_close(along, loop(tangent, *others))


def test_checkpoints_and_many_threads() -> None:
    tensors = draw()
    y = checkpoint(by_cpp, *tensors, padding=1, use_reentrant=False)
    assert_close(*(torch.autograd.grad(out.sum(), tensors) for out in (y, loop(*tensors, padding=1))))
    given = [tensor.detach() for tensor in tensors]
    with ThreadPoolExecutor(4) as threads:
        found = [*threads.map(lambda scale: by_cpp(scale * given[0], *given[1:]), range(12))]
    assert_close(found, [loop(scale * given[0], *given[1:]) for scale in range(12)])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dtype": torch.float16}, r"computes torch.float32 and torch.float64, not torch.float16: take 'auto'"),
        (
            {"channels": (3, 37), "dtype": torch.float32},
            "computes 16 or more channels, fewer with 1x1 kernels alone, without padding, of up to 4096 weights, in "
            "contiguous maps of 256 or more pixels, not 3 to 37: take 'auto'",
        ),
        ({"channels": (7, 8)}, "computes 8 or more channels, fewer .* not 7 to 8"),
        ({"channels": (3, 37), "size": (16, 16), "kernel": (1, 1)}, "computes 8 or more channels, fewer .* 3 to 37"),
        ({**FEW, "size": (15, 17)}, "computes 8 or more channels, fewer .* not 3 to 37"),
        ({**FEW, "channels": (3, 1366)}, "computes 8 or more channels, fewer .* not 3 to 1366"),
        ({**FEW, "kernel": (1, 2)}, "computes 8 or more channels, fewer .* not 3 to 37"),
    ],
)
def test_what_it_does_not_serve(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match="method='cpp' " + message):
        by_cpp(*draw(**change))


def test_few_channels_that_it_serves() -> None:
    for channels in ((3, 37), (1, 4096)):
        assert by_cpp(*draw(**{**FEW, "channels": channels})).shape[1] == channels[1]
    with pytest.raises(ValueError, match="without padding"):
        by_cpp(*draw(**FEW), padding=1)


def test_groups_and_other_devices() -> None:
    x, routing, weight = draw(channels=(32, 32))
    with pytest.raises(ValueError, match="computes convolutions of one group, not of 2"):
        by_cpp(x, routing, weight[:, :, :16], groups=2)
    with pytest.raises(ValueError, match="computes on CPUs, not on meta"):
        by_cpp(*(tensor.to("meta") for tensor in (x, routing, weight)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("layer", [CondConv2d, DynamicConv2d])
def test_layers_train_by_it(layer: Any, layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    by_it = layer(20, 36, 3, padding=1, stride=2, method="cpp").double()
    other = copy.deepcopy(by_it)
    other.method = "grouped"
    x = torch.randn(5, 20, 9, 8, dtype=torch.float64).contiguous(memory_format=layout)
    layers = by_it, other
    outputs = [one(x) for one in layers]
    assert_close(*outputs)
    cotangent = torch.randn_like(outputs[0])
    both = zip(layers, outputs, strict=True)
    assert_close(*(torch.autograd.grad(y, [*one.parameters()], cotangent) for one, y in both))
    with torch.no_grad():
        assert torch.equal(by_it(x), outputs[0])


def test_memory_of_a_training_step() -> None:
    x, routing, weight = draw(32, (256, 256), (4, 4), kernels=4, dtype=torch.float32)

    def peak(method: str) -> int:
        def step() -> None:
            y = dynamic_conv2d(x, routing, weight, padding=1, method=method)
            torch.autograd.grad(y, (x, routing, weight), torch.ones_like(y))

        return peak_bytes(step, x.device)

    native.library()
    mixed_kernels, kernels = 4 * 32 * 256 * 256 * 9, 4 * weight.numel()
    assert peak("grouped") > 2 * mixed_kernels
    assert peak("cpp") < 2 * kernels + mixed_kernels / 2


@pytest.mark.parametrize(
    ("batch", "size", "kernels", "training", "planes", "expected"),
    [
        (1, 7, 1, False, True, 64 * 64),  # what 49 positions see, in whole vectors
        (1, 7, 1, True, True, 64 * 64 // 2),  # more than the kernels
        (1, 7, 9, True, True, 9 * 16 * 64 // 2),
        (1, 8, 1, False, True, 64 * 64),
        (1, 8, 9, True, True, 9 * 16 * 64 // 2),
        (1, 16, 1, True, True, 0),
        (2, 7, 1, False, True, 16 * 64),
        (2, 7, 1, True, True, (16 * 64 + mixed.MOST_IN_PARTS) // 2),
        (2, 8, 1, False, True, 0),  # the kernels as they lie
        (2, 8, 1, False, False, 16 * 64),
        (2, 8, 1, True, True, (16 * 64 + mixed.MOST_IN_PARTS) // 2),  # not for their gradients
        (2, 16, 1, True, True, mixed.MOST_IN_PARTS // 2),
        (2, 16, 1, True, False, (16 * 64 + mixed.MOST_IN_PARTS) // 2),
    ],
)
def test_numbers_that_are_held(
    batch: int, size: int, kernels: int, training: bool, planes: bool, expected: int
) -> None:
    shapes = (batch, 64, size, size), (kernels, 16, 64, 1, 1)
    assert numbers_held(*shapes, Geometry((1, 1), (0, 0), (1, 1), 1), training, planes) == expected


class TestAuto:
    """Of 256 channels on 14x14, which it computes fastest in any layout."""

    @pytest.fixture
    def case(self) -> Iterator[Callable[..., str]]:
        def choose(**options: Any) -> str:
            x = torch.empty(32, 256, 14, 14).contiguous(memory_format=torch.channels_last)
            return choose_method(x, torch.empty(4, 256, 256, 3, 3), padding=1, **options)

        yield choose
        native.library.cache_clear()

    @pytest.mark.parametrize("training", [True, False])
    def test_takes_it(self, case: Callable[..., str], training: bool) -> None:
        assert case(training=training) == "cpp"

    def test_but_not_without_a_compiler(self, case: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CXX", "no-such-compiler")
        native.library.cache_clear()
        with pytest.warns(UserWarning, match="no compiler"):
            assert case() in ("grouped", "chunked")
        with pytest.raises(ValueError, match="method='cpp' needs Linux and a C\\+\\+ compiler: take 'auto'"):
            by_cpp(*draw())

    def test_but_not_where_its_memory_is_not_allowed(self, case: Callable[..., str]) -> None:
        needed = 4 * 4 * 256 * 256 * 9  # kernels in another order; their gradients are summed in one part
        assert [case(max_mixed_bytes=needed + less) for less in (0, -1)] == ["cpp", "chunked"]

    @pytest.mark.parametrize("strict", [True, False])
    def test_but_not_in_an_export(self, strict: bool) -> None:
        layer = DynamicConv2d(256, 256, 3, padding=1).eval()
        x = torch.randn(32, 256, 14, 14)
        assert choose_method(x, layer.weight, padding=1, training=False) == "cpp"
        exported = torch.export.export(layer, (x,), strict=strict)
        assert "dyn_lightning" not in str(exported.graph)
        assert_close(exported.module()(x), layer(x))
