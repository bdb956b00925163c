import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dyn_lightning.cost import peak_bytes
from dyn_lightning.functional import choose_method, dynamic_conv2d, prepared
from dyn_lightning.layers import DynamicConv2d
from dyn_lightning.per_sample import choice
from tests.per_sample.loop import assert_equals_the_loop, draw
from tests.tolerances import assert_close

PADDED: dict[str, Any] = {"padding": 1}


@pytest.mark.parametrize(
    ("input", "weight", "geometry", "method"),
    [
        ((0, 4, 99, 99), (3, 6, 4, 3, 3), {}, "mixture"),
        ((0, 4, 99, 99), (3, 6, 4, 1, 1), {}, "mixture"),
        ((1, 960, 1, 1), (4, 160, 960, 1, 1), {}, "matmul"),
        ((1, 24, 56, 56), (4, 144, 24, 1, 1), {}, "matmul"),
        ((1, 512, 7, 7), (4, 512, 512, 3, 3), PADDED, "grouped"),
        ((1, 256, 2, 2), (4, 256, 256, 3, 3), PADDED, "matmul"),
        ((1, 96, 8, 8), (4, 96, 1, 3, 3), {"padding": 1, "groups": 96}, "matmul"),
        ((1, 96, 14, 14), (4, 96, 1, 3, 3), {"padding": 1, "groups": 96}, "grouped"),
        # MobileNetV2: 1x1 over large and over single pixels, depthwise over large and small maps
        ((32, 24, 56, 56), (4, 144, 24, 1, 1), {}, "matmul"),
        ((32, 960, 1, 1), (4, 160, 960, 1, 1), {}, "mixture"),
        ((32, 96, 112, 112), (4, 96, 1, 3, 3), {"padding": 1, "stride": 2, "groups": 96}, "chunked"),
        ((32, 192, 14, 14), (4, 192, 1, 3, 3), {"padding": 1, "groups": 192}, "grouped"),
        ((32, 960, 1, 1), (4, 960, 1, 3, 3), {"padding": 1, "groups": 960}, "matmul"),
        ((32, 192, 2, 2), (4, 192, 1, 3, 3), {"padding": 1, "groups": 192}, "grouped"),
        ((32, 576, 2, 2), (4, 576, 1, 3, 3), {"padding": 1, "groups": 576}, "grouped"),
        ((32, 192, 28, 28), (4, 192, 1, 3, 3), {"padding": 1, "groups": 192}, "chunked"),
        # ResNet: few and many weights beside the pixels
        ((32, 128, 28, 28), (4, 128, 128, 3, 3), PADDED, "grouped"),
        ((32, 256, 14, 14), (4, 256, 256, 3, 3), PADDED, "chunked"),
        ((32, 256, 2, 2), (4, 256, 256, 3, 3), PADDED, "mixture"),
        ((32, 512, 1, 1), (4, 512, 512, 3, 3), PADDED, "mixture"),
        ((32, 512, 7, 7), (4, 2048, 512, 1, 1), {}, "chunked"),
        ((32, 1024, 15, 15), (4, 64, 1024, 1, 1), {"stride": (8, 15)}, "mixture"),
    ],
)
def test_choose_method(input: tuple, weight: tuple, geometry: dict[str, Any], method: str) -> None:
    assert choose_method(torch.empty(input), torch.empty(weight), **geometry) == method


def test_evaluation_may_choose_otherwise() -> None:
    tensors = torch.empty(32, 512, 4, 4), torch.empty(4, 128, 512, 1, 1)
    assert [choose_method(*tensors, training=training) for training in (True, False)] == ["mixture", "matmul"]
    tensors = torch.empty(32, 160, 7, 7), torch.empty(4, 960, 160, 1, 1)
    assert [choose_method(*tensors, training=training) for training in (True, False)] == ["matmul", "chunked"]


class TestMemory:
    """64 samples' kernels of 64 -> 64 channels take 9.4 MB, a chunk's gradients as much as the chunk."""

    KERNELS = 64 * 64 * 64 * 9 * 4

    def beyond(
        self, input: tuple, weight: tuple, geometry: dict[str, Any], training: bool = True, **options: Any
    ) -> int:
        """Give the bytes that are held at once beyond the output and the gradients."""
        x, stacked = torch.randn(input, requires_grad=training), torch.randn(weight, requires_grad=training)
        routing = torch.rand(len(x), len(stacked), requires_grad=training)
        leaves = (x, routing, stacked)
        cotangent = torch.randn_like(dynamic_conv2d(x, routing, stacked, **geometry))

        def step() -> None:
            y = dynamic_conv2d(x, routing, stacked, **geometry, **options)
            if training:
                torch.autograd.grad(y, leaves, cotangent)

        step()
        return peak_bytes(step) - sum(t.nbytes for t in (cotangent, *(leaves if training else ())))

    def test_all_kernels_and_their_gradient(self) -> None:
        shapes = (64, 64, 4, 4), (4, 64, 64, 3, 3)
        assert self.beyond(*shapes, PADDED, method="grouped") > 2 * self.KERNELS

    @pytest.mark.parametrize("method", ["auto", "chunked", "benchmark"])
    @pytest.mark.parametrize(
        ("input", "weight", "geometry", "training", "limit"),
        [
            ((64, 64, 4, 4), (4, 64, 64, 3, 3), PADDED, True, 10**6),
            ((64, 64, 4, 4), (4, 64, 64, 3, 3), PADDED, True, 1_100_000),
            ((64, 64, 4, 4), (4, 64, 64, 3, 3), PADDED, True, 4 * 10**6),
            ((64, 64, 4, 4), (4, 64, 64, 3, 3), PADDED, False, 10**6),
            ((16, 32, 14, 14), (4, 32, 32, 3, 3), PADDED, True, 700_000),
            ((8, 64, 32, 32), (4, 8, 64, 1, 1), {"stride": 2}, False, 200_000),  # rows that have to be copied
            ((64, 64, 4, 4), (4, 64, 32, 3, 3), {"padding": 1, "groups": 2}, False, 1_100_000),
            ((32, 512, 2, 2), (4, 16, 512, 1, 1), {}, False, 40_000),
            ((32, 512, 1, 1), (4, 64, 512, 1, 1), {}, True, 300_000),
        ],
    )
    def test_no_more_than_is_allowed(
        self, input: tuple, weight: tuple, geometry: dict[str, Any], training: bool, limit: int, method: str
    ) -> None:
        # A convolution's library may take as much again as the kernels, in a layout of its own.
        times = 1 if weight[3:] == (1, 1) else 1.5 if training else 2
        assert self.beyond(input, weight, geometry, training, method=method, max_mixed_bytes=limit) <= times * limit

    def test_an_input_that_is_copied_into_the_groups_counts(self) -> None:
        weight, x = torch.empty(4, 8, 8, 3, 3), torch.empty(2, 8, 20, 20)
        limits: dict[str, Any] = {"training": False, "max_mixed_bytes": 10_000}
        assert choose_method(x, weight, **PADDED, **limits) == "grouped"
        last = x.contiguous(memory_format=torch.channels_last)
        for copied in (x[:, :, :, ::2], last):
            assert choose_method(copied, weight, **PADDED, **limits) == "chunked"

    def test_unfolded_input_counts(self) -> None:
        tensors = torch.empty(1, 512, 4, 4), torch.empty(4, 1, 512, 3, 3)
        assert choose_method(*tensors, **PADDED, training=False) == "matmul"
        assert choose_method(*tensors, **PADDED, training=False, max_mixed_bytes=20_000) == "chunked"


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("size", [(9, 8), (40, 41)])
def test_a_layer_is_exported_for_any_batch(size: tuple[int, int], strict: bool) -> None:
    layer = DynamicConv2d(16, 16, 3, padding=1).eval()
    dynamic = ({0: torch.export.Dim("batch", min=2, max=1024)},)
    exported = torch.export.export(layer, (torch.randn(3, 16, *size),), dynamic_shapes=dynamic, strict=strict)
    x = torch.randn(7, 16, *size)
    assert_close(exported.module()(x), layer(x))


def test_a_layer_that_was_pickled_without_a_method() -> None:
    layer = DynamicConv2d(4, 6, 3)
    for name in ("method", "max_mixed_bytes"):
        del layer.__dict__[name]
    assert copy.deepcopy(layer)(torch.randn(2, 4, 7, 6)).shape == (2, 6, 5, 4)


@pytest.mark.parametrize("batch", [1, 32])
def test_a_meta_tensor_has_a_shape(batch: int) -> None:
    x, routing, weight = (torch.empty(s, device="meta") for s in ((batch, 4, 7, 6), (batch, 3), (3, 6, 4, 3, 3)))
    for method in ("auto", "benchmark", "grouped", "chunked"):
        assert dynamic_conv2d(x, routing, weight, method=method).shape == (batch, 6, 5, 4)


@pytest.mark.parametrize("method", ["auto", "grouped", "matmul", "mixture", "chunked"])
@pytest.mark.parametrize("size", [(1, 1), (2, 1), (2, 3), (4, 2)])
@pytest.mark.parametrize("kernel_size", [(3, 3), (5, 2), (1, 4)])
@pytest.mark.parametrize(("stride", "padding", "dilation"), [(1, 2, 1), (2, 2, 1), ((3, 2), (4, 3), 2), (1, "same", 2)])
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_rows_and_columns_that_see_only_padding(
    stride: Any, padding: Any, dilation: Any, kernel_size: Any, size: Any, method: str
) -> None:
    tensors = draw(2, size, kernel_size)
    assert_equals_the_loop(tensors, method, stride=stride, padding=padding, dilation=dilation)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "kept", "left"),
    [
        ((1, 1), 1, 1, (1, 1), (0, 0)),
        ((2, 2), 2, 1, (2, 2), (0, 0)),
        ((2, 2), 1, 1, (3, 3), (1, 1)),
        ((1, 5), 1, 1, (1, 3), (0, 1)),
    ],
)
def test_they_are_cut_off(size: Any, stride: int, padding: int, kept: Any, left: Any) -> None:
    input, _, weight, _ = draw(2, size)
    _, cut, geometry = prepared(input, weight, stride, padding, 1, 1)
    assert cut.shape[3:] == kept
    assert geometry.padding == left


class TestBenchmark:
    @pytest.fixture(autouse=True)
    def _forget(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(choice, "MEASURED", {})

    def test_the_fastest_is_taken_and_remembered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        timed = []

        def measure(method: str, tensors: list[Tensor], case: choice.Case) -> float:
            timed.append(method)
            return 1.0 if method == "mixture" else 2.0

        monkeypatch.setattr(choice, "_milliseconds", measure)
        tensors = draw()
        for _ in range(2):
            assert_equals_the_loop(tensors, "benchmark", padding=1)
        assert sorted(timed) == ["chunked", "grouped", "matmul", "mixture"]
        assert list(choice.MEASURED.values()) == ["mixture"]
        with torch.no_grad():
            dynamic_conv2d(*tensors, padding=1, method="benchmark")
        assert [case.training for case, *_ in choice.MEASURED] == [True, False]

    def test_leaves_no_gradient(self) -> None:
        tensors = draw()
        dynamic_conv2d(*tensors, method="benchmark")
        assert len(choice.MEASURED) == 1
        assert all(tensor.grad is None for tensor in tensors)

    def test_keeps_within_the_bytes(self) -> None:
        dynamic_conv2d(*draw(), method="benchmark", max_mixed_bytes=1)
        assert list(choice.MEASURED.values()) == ["chunked"]

    def test_what_is_around_does_not_see_it(self) -> None:
        tensors = draw()
        packed: list[Tensor] = []
        with (
            torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t),
            FlopCounterMode(display=False) as counter,
        ):
            y = dynamic_conv2d(*tensors, method="benchmark")
            count, flops = len(packed), counter.get_total_flops()
            dynamic_conv2d(*tensors, method="benchmark")
        assert (len(packed), counter.get_total_flops()) == (2 * count, 2 * flops)
        choice.MEASURED.clear()
        again = checkpoint(lambda *t: dynamic_conv2d(*t, method="benchmark"), *tensors, use_reentrant=False)
        assert_close(torch.autograd.grad(again.sum(), tensors), torch.autograd.grad(y.sum(), tensors))

    @pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, for forward mode
    def test_under_a_function_transform_there_is_nothing_to_time(self) -> None:
        input, routing, weight, _ = (tensor.detach() for tensor in draw())
        torch.func.jvp(lambda x: dynamic_conv2d(x, routing, weight, method="benchmark"), (input,), (input,))
        assert not choice.MEASURED

    def test_unfolded_inputs_count(self) -> None:
        dynamic_conv2d(*draw(8, (28, 28)), method="benchmark", max_mixed_bytes=40_000)
        assert not {"matmul", "mixture"} & set(choice.MEASURED.values())
        ((case, *_),) = choice.MEASURED
        assert choice.methods_within(case) == ["grouped", "chunked"]

    def test_inference_mode(self) -> None:
        tensors = draw()
        with torch.inference_mode():
            y = dynamic_conv2d(*tensors, method="benchmark")
        assert_close(y, dynamic_conv2d(*tensors, method="grouped").detach())


def test_a_strided_1x1_convolution_sees_every_other_pixel() -> None:
    input, _, weight, _ = draw(kernel_size=(1, 1))
    pixels, _, geometry = prepared(input, weight, (2, 3), 0, 1, 1)
    assert geometry.stride == (1, 1)
    assert torch.equal(pixels, F.avg_pool2d(input, 1, (2, 3)))


class TestErrors:
    @pytest.mark.parametrize(
        ("input", "weight", "options", "message"),
        [
            ((2, 4, 7, 6), (3, 6, 4, 3, 3), {"groups": 7}, "input of 4 channels and groups=7 must agree"),
            ((4, 7, 6), (3, 6, 4, 3, 3), {}, r"input of shape \(4, 7, 6\) must be \(B, C_in, H, W\)"),
            ((2, 4, 7, 6), (3, 6, 4, 3, 3), {"max_mixed_bytes": 0}, "max_mixed_bytes=0 must be at least 1"),
            ((2, 4, 7, 6), (3, 6, 4, 3, 3), {"groups": 1.0}, "groups=1.0 must be a whole number"),
            ((2, 4, 7, 6), (3, 6, 4, 3, 3), {"stride": 1.0}, "stride=1.0 must be a whole number"),
            ((2, 4, 7, 6), (3, 6, 4, 3, 3), {"padding": {0: 1}}, "padding={0: 1} must be a whole number"),
            (
                (2, 4, 7, 2),
                (3, 6, 4, 3, 3),
                {"dilation": (1, 3), "padding": 1},
                "input of 2 columns, padded by 1 on both sides, must not be smaller than the kernel of 3, dilated by 3",
            ),
        ],
    )
    def test_choose_method_and_dynamic_conv2d_refuse(
        self, input: Any, weight: Any, options: dict[str, Any], message: str
    ) -> None:
        x, kernels = torch.empty(input), torch.empty(weight)
        if len(input) == 4:
            choose_method(torch.empty(2, 4, 7, 6), kernels)  # what is remembered must not hide an error
        with pytest.raises(ValueError, match=message):
            choose_method(x, kernels, **options)
        with pytest.raises(ValueError, match=message):
            dynamic_conv2d(x, torch.empty(2, 3), kernels, **options)

    def test_types_must_agree(self) -> None:
        input, routing, weight, _ = draw()
        with pytest.raises(
            ValueError, match=r"input of torch\.float32 and weight of torch\.float64 must have one type"
        ):
            dynamic_conv2d(input.float(), routing, weight)
