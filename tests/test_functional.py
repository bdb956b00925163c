import copy
import math
import re
from typing import Any

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.testing import EagerAndRecordGraphs
from torch.fx.experimental.proxy_tensor import make_fx

from dyn_lightning import allocator, functional
from dyn_lightning.checks import as_pair
from dyn_lightning.functional import choose_method, dynamic_conv2d
from dyn_lightning.layers import DynamicConv2d
from dyn_lightning.per_sample import tracing
from dyn_lightning.per_sample.by_name import METHODS
from tests.contract import GEOMETRIES
from tests.per_sample.loop import assert_equals_the_loop, draw, loop
from tests.tolerances import assert_close

every_method = pytest.mark.parametrize("method", ["auto", *(name for name in METHODS if name not in ("cpp", "triton"))])


class TestDynamicConv2d:
    @every_method
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize("kernel_size", [(3, 3), (1, 1), (1, 3)])
    @pytest.mark.parametrize(("stride", "padding", "dilation"), GEOMETRIES)
    def test_equals_a_loop_over_samples(
        self, stride: Any, padding: Any, dilation: Any, kernel_size: Any, groups: int, method: str
    ) -> None:
        tensors = draw(kernel_size=kernel_size, groups=groups)
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        assert_equals_the_loop(tensors, method, **geometry)

    @every_method
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("kernel_size", [(3, 3), (1, 1)])
    @pytest.mark.parametrize(("batch", "size"), [(1, (7, 6)), (3, (7, 6)), (5, (1, 1)), (2, (17, 15))])
    def test_equals_a_loop_for_any_batch(
        self, batch: int, size: tuple[int, int], kernel_size: Any, bias: bool, method: str
    ) -> None:
        assert_equals_the_loop(draw(batch, size, kernel_size, 2, bias), method, padding=1, groups=2)

    @every_method
    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("kernel_size", [(3, 3), (1, 1)])
    def test_empty_batch(self, kernel_size: Any, bias: bool, method: str) -> None:
        tensors = draw(0, kernel_size=kernel_size, groups=2, bias=bias)
        y = dynamic_conv2d(*tensors, stride=2, padding=1, groups=2, method=method)
        assert y.shape == F.conv2d(tensors[0], tensors[2][0], stride=2, padding=1, groups=2).shape
        gradients = torch.autograd.grad(y.sum(), tensors)
        assert [gradient.shape for gradient in gradients] == [tensor.shape for tensor in tensors]
        assert not any(gradient.any() for gradient in gradients)

    @every_method
    def test_depthwise(self, method: str) -> None:
        input, routing, weight, bias = draw(groups=4)
        assert_equals_the_loop((input, routing, weight[:, :4], bias[:, :4]), method, padding=1, groups=4)

    @every_method
    @pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
    @pytest.mark.parametrize("dilation", [1, (2, 1)])
    @pytest.mark.parametrize("kernel_size", [(2, 2), (4, 3), (3, 2), (1, 4)])
    def test_same_padding_of_even_kernels(self, kernel_size: Any, dilation: Any, method: str) -> None:
        assert_equals_the_loop(draw(kernel_size=kernel_size), method, padding="same", dilation=dilation)

    @every_method
    def test_valid_padding(self, method: str) -> None:
        assert_equals_the_loop(draw(), method, padding="valid", stride=2)

    @every_method
    @pytest.mark.parametrize("batch", [2, 5])
    @pytest.mark.parametrize("kernel_size", [(3, 3), (1, 1), (2, 2)])
    def test_channels_last_stays(self, kernel_size: Any, batch: int, method: str) -> None:
        input, *others = draw(batch, kernel_size=kernel_size)
        expected = dynamic_conv2d(input, *others, padding="same", method=method)
        y = dynamic_conv2d(input.contiguous(memory_format=torch.channels_last), *others, padding="same", method=method)
        assert expected.is_contiguous()
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert_close(y, expected)
        assert_close(*(torch.autograd.grad(output.square().sum(), (input, *others)) for output in (y, expected)))

    @every_method
    @pytest.mark.parametrize("kernel_size", [(3, 3), (1, 1)])
    def test_bfloat16_autocast(self, kernel_size: Any, method: str) -> None:
        tensors = draw(kernel_size=kernel_size, dtype=torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            y = dynamic_conv2d(*tensors, method=method)
        assert y.dtype == torch.bfloat16
        assert_close(y.float(), loop(*tensors), torch.bfloat16)
        assert [g.dtype for g in torch.autograd.grad(y.float().sum(), tensors)] == [torch.float32] * 4

    @every_method
    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
    def test_float32_routing_of_another_dtype(self, dtype: torch.dtype, method: str) -> None:
        input, routing, weight, bias = draw(dtype=dtype)
        routing = routing.bfloat16()
        y = dynamic_conv2d(input, routing.float(), weight, bias, method=method)
        assert y.dtype == dtype
        assert_close(y, dynamic_conv2d(input, routing.to(dtype), weight, bias, method=method))


class TestErrors:
    @pytest.mark.parametrize(
        ("shapes", "groups", "message"),
        [
            (
                [(2, 4, 7, 6), (2, 4), (3, 6, 4, 3, 3), (3, 6)],
                1,
                r"routing of shape \(2, 4\) must be \(B, K\) = \(2, 3\): B as in input of shape \(2, 4, 7, 6\), "
                r"K as in weight of shape \(3, 6, 4, 3, 3\)",
            ),
            ([(2, 4, 7, 6), (5, 3), (3, 6, 4, 3, 3), (3, 6)], 1, r"routing of shape \(5, 3\) must be .* \(2, 3\)"),
            (
                [(2, 5, 7, 6), (2, 3), (3, 6, 4, 3, 3), (3, 6)],
                1,
                r"input of 5 channels and groups=1 must agree with weight of shape .*: C_in = 4 \* groups",
            ),
            ([(2, 4, 7, 6), (2, 3), (3, 6, 4, 3, 3), (3, 6)], 2, r"input of 4 channels and groups=2 must agree"),
            ([(2, 4, 7, 6), (2, 3), (3, 5, 2, 3, 3), (3, 5)], 2, r"groups must divide C_out = 5"),
            ([(2, 4, 7, 6), (2, 3), (3, 6, 4, 3, 3), (6,)], 1, r"bias of shape \(6,\) must be \(K, C_out\) = \(3, 6\)"),
            ([(4, 7, 6), (2, 3), (3, 6, 4, 3, 3), (3, 6)], 1, r"input of shape \(4, 7, 6\) must be \(B, C_in, H, W\)"),
            ([(2, 4, 7, 6), (2, 3), (6, 4, 3, 3), (3, 6)], 1, r"weight of shape \(6, 4, 3, 3\) must be \(K, C_out"),
            ([(2, 4, 7, 6), (2, 0), (0, 6, 4, 3, 3)], 1, r"weight of shape \(0, 6, 4, 3, 3\): only B may be 0"),
            ([(2, 4, 7, 6), (2, 3), (3, 0, 4, 3, 3)], 1, "only B may be 0"),
            ([(2, 4, 7, 6), (2, 3), (3, 6, 4, 0, 0)], 1, "only B may be 0"),
            ([(2, 4, 0, 6), (2, 3), (3, 6, 4, 1, 1)], 1, "only B may be 0"),
        ],
    )
    def test_shapes_must_agree(self, shapes: list[tuple[int, ...]], groups: int, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            dynamic_conv2d(*map(torch.zeros, shapes), groups=groups)

    @pytest.mark.parametrize(
        ("changed", "method"), [(0, "grouped"), (1, "grouped"), (2, "auto"), (1, "mixture"), (2, "chunked")]
    )
    def test_devices_must_agree(self, changed: int, method: str) -> None:
        shapes = (1, 96, 8, 8), (1, 4), (4, 96, 1, 3, 3)
        tensors = [torch.zeros(shape, device="meta" if i == changed else "cpu") for i, shape in enumerate(shapes)]
        with pytest.raises(ValueError, match=r"input on .*, routing on .* and weight on .* must be on one device"):
            dynamic_conv2d(*tensors, padding=1, groups=96, method=method)

    def test_unknown_method_lists_those_that_exist(self) -> None:
        message = r"method='fast' does not exist, choose one of \['auto', 'benchmark', 'grouped', .*, 'triton'\]"
        with pytest.raises(ValueError, match=message):
            dynamic_conv2d(*draw(), method="fast")

    def test_true_is_no_number_even_after_one(self) -> None:
        dynamic_conv2d(*draw(), stride=(1, 1))
        for value in (True, (True, 1), (1, 1.0)):
            with pytest.raises(ValueError, match=rf"stride={re.escape(str(value))} must be a whole number"):
                dynamic_conv2d(*draw(), stride=value)  # type: ignore[arg-type]

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

    def test_types_are_called_as_they_were_before_autocast(self) -> None:
        input, routing, weight, _ = draw()
        message = r"input of torch\.float32 and weight of torch\.float64 must have one type"
        with torch.autocast("cpu", torch.bfloat16):
            with pytest.raises(ValueError, match=message):
                dynamic_conv2d(input.float(), routing, weight)
            with pytest.raises(ValueError, match=message):
                choose_method(input.float(), weight)

    def test_unknown_padding(self) -> None:
        with pytest.raises(ValueError, match="padding='full' must be 'same', 'valid', a whole number or two of them"):
            dynamic_conv2d(*draw(), padding="full")


@every_method
@pytest.mark.parametrize("size", [(7, 6), (12, 13), (1, 2)])
@pytest.mark.parametrize("stride", [2, (3, 1)])
@pytest.mark.parametrize("dilation", [1, (1, 2)])
@pytest.mark.parametrize("kernel_size", [(3, 3), (2, 5), (1, 1)])
def test_same_padding_with_a_stride_is_tensorflow_s(
    kernel_size: tuple[int, int], dilation: Any, stride: Any, size: tuple[int, int], method: str
) -> None:
    input, routing, weight, bias = draw(size=size, kernel_size=kernel_size)
    geometry = {"stride": stride, "dilation": dilation}
    y = dynamic_conv2d(input, routing, weight, bias, padding="same", method=method, **geometry)
    padded = timm.layers.pad_same(input, kernel_size, as_pair("stride", stride), as_pair("dilation", dilation))
    assert_close(y, loop(padded, routing, weight, bias, **geometry))
    assert y.shape[2:] == tuple(
        math.ceil(length / step) for length, step in zip(size, as_pair("stride", stride), strict=True)
    )


@every_method
@pytest.mark.parametrize("order", [(0, 2, 3, 1), (0, 1, 3, 2), (0, 2, 1, 3), (1, 0, 2, 3), (3, 2, 1, 0)])
@pytest.mark.parametrize(("kernel_size", "groups"), [((1, 1), 1), ((3, 3), 1), ((3, 3), 4)])
@pytest.mark.parametrize("stride", [1, 2])
def test_any_layout_in_memory(stride: int, kernel_size: Any, groups: int, order: Any, method: str) -> None:
    input, routing, weight, bias = draw(3, kernel_size=kernel_size, groups=groups)
    back = torch.tensor(order).argsort().tolist()
    input = input.detach().permute(order).contiguous().permute(back).requires_grad_()
    tensors = (input, routing, weight[:, :4], bias[:, :4])  # 4 channels, so that 4 groups are a depthwise convolution
    for max_mixed_bytes in (1, 1 << 20):
        assert_equals_the_loop(tensors, method, max_mixed_bytes, stride=stride, groups=groups)


@every_method
@pytest.mark.parametrize("kernel_size", [(1, 1), (3, 3)])
def test_complex_numbers(kernel_size: Any, method: str) -> None:
    tensors = draw(3, kernel_size=kernel_size, dtype=torch.complex128)
    with torch.autocast("cpu", torch.bfloat16):
        y = dynamic_conv2d(*tensors, method=method, max_mixed_bytes=1)
    outputs = y, loop(*tensors)
    cotangent = torch.randn_like(outputs[0])
    actual, expected = ((y, *torch.autograd.grad(y, tensors, cotangent)) for y in outputs)
    assert_close([*map(torch.view_as_real, actual)], [*map(torch.view_as_real, expected)])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")  # torch's own, for forward mode
@every_method
def test_transforms_are_compiled(method: str) -> None:
    input, routing, weight, _ = (tensor.detach() for tensor in draw(3))

    def convolve(x: Tensor) -> Tensor:
        return dynamic_conv2d(x, routing, weight, method=method, max_mixed_bytes=1)

    def derivative(x: Tensor) -> Tensor:
        return torch.func.jvp(convolve, (x,), (x.cos(),))[1]

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: convolve(x).square().sum())(x)

    def several(x: Tensor) -> Tensor:
        return torch.vmap(convolve)(torch.stack((x, x.cos())))

    for transform in (derivative, gradient, several):
        torch.compiler.reset()
        assert_close(torch.compile(transform, fullgraph=True, backend="aot_eager")(input), transform(input))


@pytest.mark.parametrize("method", ["auto", "benchmark"])
def test_a_compiler_does_not_look_into_the_choice(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it looks again, before each call, at all that it saw there. What is taken is the same, after changes too."""
    seen: list[tuple[bool, str]] = []
    decide = functional._decide

    def watched(*arguments: Any) -> Any:
        found = decide(*arguments)
        seen.append((torch.compiler.is_dynamo_compiling(), found[2]))
        return found

    monkeypatch.setattr(functional, "_decide", watched)
    torch.compiler.reset()
    x, routing, weight = torch.randn(8, 128, 14, 14), torch.rand(8, 3), torch.randn(3, 128, 64, 3, 3)
    compiled = torch.compile(dynamic_conv2d, fullgraph=True, backend="eager")
    taken = []
    for keeps, limit in ((False, 1 << 30), (True, 1 << 30), (True, 1000)):
        monkeypatch.setattr(allocator, "_kept", keeps)
        options: dict[str, Any] = {"padding": 1, "groups": 2, "max_mixed_bytes": limit}
        with torch.no_grad():
            compiled(x, routing, weight, method=method, **options)
        taken.append(choose_method(x, weight, training=False, **options))
        assert seen[-1][1] == taken[-1]
    assert len(set(taken)) > 1
    assert [looked for looked, _ in seen] == [not tracing.KEEPS_CONSTANTS] * 2 + [True]  # an int that changes is open


def test_a_compiled_choice_is_not_that_of_an_export() -> None:
    tensors = torch.randn(8, 64, 9, 9), torch.rand(8, 3), torch.randn(3, 64, 64, 3, 3)
    if choose_method(tensors[0], tensors[2], training=False) != "cpp":
        pytest.skip("an export takes the same without our C++")
    torch.compiler.reset()
    recorder = EagerAndRecordGraphs()
    compiled = torch.compile(dynamic_conv2d, fullgraph=True, backend=recorder)
    assert torch.equal(compiled(*tensors), dynamic_conv2d(*tensors))
    assert "dyn_lightning.cpp" in str(recorder.graphs[0].graph)


def test_arguments_may_change_between_compiled_calls() -> None:
    torch.compiler.reset()
    compiled = torch.compile(dynamic_conv2d, fullgraph=True, backend="eager")
    input, routing, weight, _ = draw(3)
    for padding, limit in ((1, 1 << 20), (2, 1 << 20), (3, 1 << 21), (3, 1 << 22)):
        options: dict[str, Any] = {"padding": padding, "max_mixed_bytes": limit}
        assert_close(compiled(input, routing, weight, **options), dynamic_conv2d(input, routing, weight, **options))


def test_a_compiled_call_has_errors_of_its_own_kind() -> None:
    torch.compiler.reset()
    compiled = torch.compile(dynamic_conv2d, backend="eager")
    with pytest.raises(ValueError, match=re.escape("routing of shape (2, 3) must be (B, K) = (2, 4)")):
        compiled(torch.randn(2, 8, 5, 5), torch.rand(2, 3), torch.randn(4, 6, 8, 1, 1))


def test_open_sizes_can_be_traced() -> None:
    tensors, others = (
        tuple(tensor.detach() for tensor in draw(batch, size=size)) for batch, size in ((3, (7, 6)), (5, (9, 11)))
    )
    traced = make_fx(lambda *tensors: dynamic_conv2d(*tensors, padding=1), tracing_mode="symbolic")(*tensors)
    for given in (tensors, others):
        assert_close(traced(*given), dynamic_conv2d(*given, padding=1))


@every_method
def test_autocast_around_the_backward_pass_alone(method: str) -> None:
    tensors = draw(3, dtype=torch.float32)
    y = dynamic_conv2d(*tensors, method=method, max_mixed_bytes=1)
    cotangent = torch.randn_like(y)
    expected = torch.autograd.grad(y, tensors, cotangent, retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):  # under which torch's own products are of 16 bits
        gradients = torch.autograd.grad(y, tensors, cotangent)
    for actual, right in zip(gradients, expected, strict=True):
        assert_close(actual / right.abs().amax(), right / right.abs().amax(), torch.bfloat16)


def test_the_choice_under_autocast_is_the_one_that_is_taken() -> None:
    x, routing, weight = torch.randn(16, 256, 14, 14), torch.rand(16, 4), torch.randn(4, 256, 256, 3, 3)
    taken: list[str] = []
    token = functional.NOTE.set(taken.append)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            dynamic_conv2d(x, routing, weight, padding=1)
            chosen = choose_method(x, weight, padding=1, training=False)
    finally:
        functional.NOTE.reset(token)
    assert taken == [chosen]


@every_method
def test_vmap_and_per_sample_gradients(method: str) -> None:
    input, routing, weight, _ = (tensor.detach() for tensor in draw(3))
    several = torch.randn(5, *input.shape, dtype=input.dtype)
    one_by_one = torch.stack([dynamic_conv2d(x, routing, weight) for x in several])
    assert_close(torch.vmap(lambda x: dynamic_conv2d(x, routing, weight, method=method))(several), one_by_one)

    def loss(weight: Tensor, x: Tensor, shares: Tensor) -> Tensor:
        return dynamic_conv2d(x[None], shares[None], weight, method=method).square().sum()

    gradients = torch.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(weight, input, routing)
    leaf = weight.clone().requires_grad_()
    expected = [torch.autograd.grad(loss(leaf, *pair), leaf)[0] for pair in zip(input, routing, strict=True)]
    assert_close(gradients, torch.stack(expected))


def test_lists_are_pairs_as_in_conv2d() -> None:
    tensors = draw()
    y = dynamic_conv2d(*tensors, stride=[2, 1], padding=[1, 0], dilation=[1, 2])  # type: ignore[arg-type]
    assert torch.equal(y, dynamic_conv2d(*tensors, stride=(2, 1), padding=(1, 0), dilation=(1, 2)))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("size", "options"), [((9, 8), {}), ((40, 41), {}), ((2, 2), {"groups": 16, "stride": 2}), ((1, 1), {"groups": 16})]
)
def test_a_layer_is_exported_for_any_batch(
    size: tuple[int, int], options: dict[str, int], training: bool, strict: bool
) -> None:
    layer = DynamicConv2d(16, 16, 3, padding=1, **options).eval()
    dynamic = ({0: torch.export.Dim("batch", min=2, max=1024)},)
    with torch.set_grad_enabled(training):
        exported = torch.export.export(layer, (torch.randn(3, 16, *size),), dynamic_shapes=dynamic, strict=strict)
        x = torch.randn(7, 16, *size)
        assert_close(exported.module()(x), layer(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("least", [1, 2])
def test_a_mixture_is_exported_for_any_batch(least: int, strict: bool) -> None:
    layer = DynamicConv2d(16, 24, 1, method="mixture").eval()
    dynamic = ({0: torch.export.Dim("batch", min=least, max=1024)},)
    exported = torch.export.export(layer, (torch.randn(3, 16, 2, 1),), dynamic_shapes=dynamic, strict=strict)
    for batch in (least, 7):
        x = torch.randn(batch, 16, 2, 1)
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
