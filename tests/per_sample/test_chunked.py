import itertools
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from dyn_lightning.functional import dynamic_conv2d
from dyn_lightning.layers import DynamicConv2d
from dyn_lightning.per_sample import by_name, case
from dyn_lightning.per_sample import chunked as module
from dyn_lightning.per_sample.chunked import chunk_size, chunked, chunked_rows
from dyn_lightning.per_sample.geometry import Geometry
from tests.contract import GEOMETRIES
from tests.per_sample.loop import assert_equals_the_loop, draw
from tests.tolerances import assert_close

METHODS = ("chunked", "grouped")


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let channels be divided that are as few as the tests'."""
    monkeypatch.setattr(module, "LEAST_CHANNELS", 2)
    monkeypatch.setattr(module, "LEAST_OF_PRODUCTS", 2)
    monkeypatch.setattr(module, "WANTED_SAMPLES", 2)


def geometry_of(groups: int = 1) -> Geometry:
    return Geometry((1, 1), (1, 1), (1, 1), groups)


class TestChunked:
    @pytest.mark.parametrize("limit", [1, 6000, 1 << 20])
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("kernel_size", [(3, 3), (1, 1), (1, 3)])
    @pytest.mark.parametrize(("stride", "padding", "dilation"), GEOMETRIES)
    def test_equals_a_loop_over_samples(
        self, stride: Any, padding: Any, dilation: Any, kernel_size: Any, groups: int, limit: int
    ) -> None:
        tensors = draw(5, kernel_size=kernel_size, groups=groups)
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        assert_equals_the_loop(tensors, "chunked", max_mixed_bytes=limit, **geometry)

    @pytest.mark.parametrize("limit", [1, 6000, 1 << 20])
    @pytest.mark.parametrize(("stride", "padding", "dilation"), GEOMETRIES)
    def test_with_the_input_unfolded_it_equals_a_loop(
        self, stride: Any, padding: Any, dilation: Any, limit: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        geometry = {"stride": stride, "padding": padding, "dilation": dilation}
        calls = []

        def rows(input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry, _: int) -> Tensor:
            calls.append(geometry)
            return chunked_rows(input, routing, weight, geometry, limit)

        monkeypatch.setattr(by_name, "chunked_rows", rows)
        monkeypatch.setattr(case, "SMALL_MAP", 100)
        assert_equals_the_loop(draw(5), "chunked", **geometry)
        assert calls

    def test_the_input_is_unfolded_where_there_is_room(self, monkeypatch: pytest.MonkeyPatch) -> None:
        tensors = [
            tensor.requires_grad_()
            for tensor in (torch.randn(4, 8, 4, 4), torch.rand(4, 2), torch.randn(2, 8, 8, 3, 3))
        ]
        needed = 2 * 2 * 4 * (4 * 8 * 9 * 16 + 4 * 8 * 16)  # with its gradient, and as much for chunks
        rooms = []
        for name in ("chunked", "chunked_rows"):
            plain = getattr(by_name, name)
            monkeypatch.setattr(by_name, name, lambda *args, name=name, plain=plain: rooms.append(name) or plain(*args))
        for limit in (needed, needed - 1):
            dynamic_conv2d(*tensors, padding=1, method="chunked", max_mixed_bytes=limit)
        assert rooms == ["chunked_rows", "chunked"]

    @pytest.mark.parametrize("last", [False, True])
    @pytest.mark.parametrize("how", ["compiled", "compiled for open sizes", "bfloat16", "second derivatives", "vmap"])
    def test_with_the_input_unfolded_it_works(self, how: str, last: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        dtype = torch.float32 if how == "bfloat16" else torch.float64
        x, routing, weight = torch.randn(5, 4, 4, 3), torch.rand(5, 3), torch.randn(3, 6, 4, 3, 3)
        x, routing, weight = (tensor.to(dtype).requires_grad_() for tensor in (x, routing, weight))
        if last:
            x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        taken, rows = [], chunked_rows
        monkeypatch.setattr(by_name, "chunked_rows", lambda *args: taken.append(True) or rows(*args))

        def convolve(method: str, *tensors: Tensor) -> Tensor:
            return dynamic_conv2d(*tensors, padding=1, method=method)

        tensors = (x, routing, weight)
        if how == "second derivatives":
            assert torch.autograd.gradgradcheck(partial(convolve, "chunked"), tensors)
        elif how == "vmap":
            found = [torch.func.vmap(partial(convolve, method))(*(t[None] for t in tensors)) for method in METHODS]
            assert_close(*found)
        else:
            chunks = partial(convolve, "chunked")
            if how != "bfloat16":
                chunks(*tensors)
                monkeypatch.setattr(by_name, "chunked_rows", rows)  # a compiler looks into it
                torch.compiler.reset()
                chunks = torch.compile(chunks, fullgraph=True, dynamic=how.endswith("sizes"), backend="aot_eager")
            with torch.autocast("cpu", torch.bfloat16, enabled=how == "bfloat16"):
                found = [chunks(*tensors), convolve("grouped", *tensors)]
            assert found[0].is_contiguous(memory_format=torch.channels_last) == last
            assert_close(*found)
            cotangent = 0.3 * torch.randn_like(found[0])
            for pair in zip(*(torch.autograd.grad(y, tensors, cotangent) for y in found), strict=True):
                assert_close(*pair, dtype=found[0].dtype)
        assert taken

    def test_samples_and_channels_are_divided(self) -> None:
        input, _, weight, _ = draw(5)
        sizes = {limit: chunk_size(input, weight, geometry_of(), limit) for limit in (1, 6000, 1 << 20)}
        assert sizes == {1: (1, 2), 6000: (1, 6), 1 << 20: (206, 6)}
        assert chunk_size(*draw(5, groups=2)[::2], geometry_of(2), 1) == (1, 6)

    def test_one_sample_is_divided_less(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(module, "WANTED_SAMPLES", 16)
        channels = [chunk_size(*draw(batch)[::2], geometry_of(), 4000)[1] for batch in (1, 5)]
        assert channels == [3, 2]  # a channel's kernel takes 288 bytes

    @pytest.mark.parametrize("limit", [1, 1 << 20])
    @pytest.mark.parametrize("kernel_size", [(3, 3), (1, 1)])
    def test_first_and_second_derivatives(self, kernel_size: Any, limit: int) -> None:
        tensors = draw(2, (4, 3), kernel_size, bias=False)
        geometry = geometry_of() if kernel_size == (3, 3) else Geometry((1, 1), (0, 0), (1, 1), 1)

        def function(*tensors: Tensor) -> Tensor:
            return chunked(*tensors, geometry, limit)

        assert torch.autograd.gradcheck(function, tensors)
        assert torch.autograd.gradgradcheck(function, tensors)

    def test_second_derivatives_where_the_routing_depends_on_the_input(self) -> None:
        layer = DynamicConv2d(4, 6, 3, padding=1, num_kernels=3, temperature=1).double()
        x = torch.randn(3, 4, 7, 6, dtype=torch.float64, requires_grad=True)
        found = []
        for layer.method in ("chunked", "grouped"):
            (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
            found.append([first, *torch.autograd.grad(first.square().sum(), [x, *layer.parameters()])])
        assert_close(*found)
        (once,) = torch.autograd.grad(layer(x).square().sum(), x)
        assert_close(found[0][0], once)

    def test_batches_of_gradients(self) -> None:
        tensors = draw(2, bias=False)
        y = [dynamic_conv2d(*tensors, method=method, max_mixed_bytes=1) for method in ("chunked", "grouped")]
        cotangents = torch.randn(3, *y[0].shape, dtype=torch.float64)
        assert_close(*(torch.autograd.grad(one, tensors, cotangents, is_grads_batched=True) for one in y))

    @pytest.mark.parametrize("kernel_size", [(3, 3), (1, 1)])
    @pytest.mark.parametrize("needed", [n for n in itertools.product([True, False], repeat=3) if any(n)])
    def test_frozen_parts_get_no_gradient(self, needed: tuple[bool, ...], kernel_size: Any) -> None:
        drawn = draw(3, kernel_size=kernel_size, bias=False)
        tensors = [tensor.detach().requires_grad_(need) for tensor, need in zip(drawn, needed, strict=True)]
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        gradients = [
            torch.autograd.grad(dynamic_conv2d(*tensors, method=method, max_mixed_bytes=1).square().sum(), wanted)
            for method in ("chunked", "grouped")
        ]
        assert_close(*gradients)

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's own check
    @pytest.mark.parametrize("kernel_size", [(3, 3), (1, 1)])
    def test_is_a_well_formed_operation(self, kernel_size: Any) -> None:
        geometry = [1, 1, 0, 0, 1, 1, 1]
        tensors = draw(3, kernel_size=kernel_size, bias=False)
        for layout in (torch.contiguous_format, torch.channels_last):
            input = tensors[0].detach().contiguous(memory_format=layout).requires_grad_()
            weight = tensors[2].detach().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
            operands = (input, tensors[1], weight, [*geometry, 1000])
            torch.library.opcheck(torch.ops.dyn_lightning.chunked.default, operands)
            grad = torch.randn_like(torch.ops.dyn_lightning.chunked(*operands))
            gradients = (grad, *(tensor.detach() for tensor in operands[:3]), operands[3], [True, True, True])
            torch.library.opcheck(torch.ops.dyn_lightning.chunked_backward.default, gradients)

    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, for forward mode
    def test_forward_mode_and_function_transforms(self) -> None:
        input, routing, weight, _ = (tensor.detach() for tensor in draw(3))

        def function(x: Tensor, method: str) -> Tensor:
            return dynamic_conv2d(x, routing, weight, method=method, max_mixed_bytes=1)

        tangent = torch.randn_like(input)
        actual, expected = (
            torch.func.jvp(lambda x, method=method: function(x, method), (input,), (tangent,))
            for method in ("chunked", "grouped")
        )
        assert_close(actual, expected)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(input, tangent)
            assert_close(torch.autograd.forward_ad.unpack_dual(function(dual, "chunked")).tangent, expected[1])
        actual, expected = (
            torch.func.grad(lambda x, method=method: function(x, method).square().sum())(input)
            for method in ("chunked", "grouped")
        )
        assert_close(actual, expected)

    @pytest.mark.parametrize(
        ("method", "dynamic"), [("grouped", False), ("matmul", False), ("mixture", False), ("chunked", True)]
    )
    def test_every_method_compiles_to_one_graph(self, method: str, dynamic: bool) -> None:
        def step(*tensors: Tensor) -> Tensor:
            return dynamic_conv2d(*tensors, padding="same", method=method)

        torch.compiler.reset()
        compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        for batch in (3, 5) if dynamic else (3,):
            tensors = draw(batch)
            assert_close(compiled(*tensors), step(*tensors))
            gradients = [torch.autograd.grad(run(*tensors).square().sum(), tensors) for run in (compiled, step)]
            assert_close(*gradients)

    @pytest.mark.parametrize("method", ["grouped", "matmul", "mixture", "chunked"])
    @pytest.mark.parametrize("kernel_size", [(3, 3), (1, 1)])
    def test_gradients_under_bfloat16_autocast(self, kernel_size: Any, method: str) -> None:
        tensors = draw(5, kernel_size=kernel_size, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = dynamic_conv2d(*tensors, method=method, max_mixed_bytes=1)
        cotangent = torch.randn_like(y)
        expected = torch.autograd.grad(dynamic_conv2d(*tensors, method="grouped"), tensors, cotangent.float())
        for actual, right in zip(torch.autograd.grad(y, tensors, cotangent), expected, strict=True):
            assert_close(actual / right.abs().amax(), right / right.abs().amax(), torch.bfloat16)

    @pytest.mark.parametrize("limit", [1, 10**9])
    @pytest.mark.parametrize(
        ("input", "weight", "groups"),
        [
            ((3, 4, 7, 6), (3, 6, 4, 3, 3), 1),
            ((3, 4, 7, 6), (3, 6, 4, 1, 1), 1),
            ((3, 4, 150, 151), (3, 6, 4, 3, 3), 1),
            ((3, 4, 90, 95), (3, 4, 1, 3, 3), 4),
        ],
    )
    def test_channels_last_needs_no_other_layout(self, input: Any, weight: Any, groups: int, limit: int) -> None:
        geometry = Geometry((1, 1), (0, 0), (1, 1), groups)
        shapes = input, (input[0], weight[0]), weight
        input, routing, weight = (torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes)
        last = input.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        y = chunked(last, routing, weight, geometry, limit)
        assert y.is_contiguous(memory_format=torch.channels_last)
        expected = chunked(input, routing, weight, geometry, limit)
        assert_close(y, expected)
        cotangent = torch.randn_like(y)
        actual = torch.autograd.grad(y, (last, routing, weight), cotangent)
        assert_close(actual, torch.autograd.grad(expected, (input, routing, weight), cotangent))

    def test_sixteen_bits_are_added_up_in_float32(self) -> None:
        # 512 samples of one pixel each add 1 to the kernel's gradient; in bfloat16 the sum would stay at 256.
        input = torch.ones(512, 1, 1, 1, dtype=torch.bfloat16)
        routing, weight = torch.ones(512, 1).bfloat16(), torch.ones(1, 2, 1, 1, 1).bfloat16().requires_grad_()
        y = chunked(input, routing, weight, Geometry((1, 1), (0, 0), (1, 1), 1), 1)
        (gradient,) = torch.autograd.grad(y.sum(), weight)
        assert gradient.flatten().tolist() == [512, 512]
