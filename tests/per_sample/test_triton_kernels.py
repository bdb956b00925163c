"""Triton's kernels: on a GPU where there is one, else in Triton's interpreter, whose products of bfloat16 are wrong in
Triton 3.9, so that 16 bits are tested by float16.
"""

from typing import Any

import pytest
import torch

from dyn_lightning.cost import peak_bytes
from dyn_lightning.functional import dynamic_conv2d
from dyn_lightning.per_sample.case import Case
from dyn_lightning.per_sample.geometry import Geometry
from tests.contract import GEOMETRIES
from tests.per_sample.loop import assert_equals_the_loop, draw, loop
from tests.tolerances import assert_close

pytest.importorskip("triton", reason="the package triton exists for Linux only")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class TestTriton:
    @pytest.mark.parametrize(("kernel_size", "groups"), [((3, 3), 2), ((1, 1), 2), ((1, 3), 1)])
    @pytest.mark.parametrize(("stride", "padding", "dilation"), GEOMETRIES[::3])
    def test_equals_a_loop_over_samples(
        self, stride: Any, padding: Any, dilation: Any, kernel_size: Any, groups: int
    ) -> None:
        tensors = draw(kernel_size=kernel_size, groups=groups, device=DEVICE)
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        assert_equals_the_loop(tensors, "triton", **geometry)

    def test_several_tiles_of_channels_and_positions(self) -> None:
        tensors = [
            torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True) for shape in SEVERAL_TILES
        ]
        assert_equals_the_loop(tuple(tensors), "triton", padding=1)

    @pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
    def test_frozen_parts_get_no_gradient(self, needed: tuple[bool, ...]) -> None:
        tensors = [
            t.detach().requires_grad_(need) for t, need in zip(draw(bias=False, device=DEVICE), needed, strict=True)
        ]
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        gradients = [
            torch.autograd.grad(dynamic_conv2d(*tensors, method=method).square().sum(), wanted)
            for method in ("triton", "grouped")
        ]
        assert_close(*gradients)

    def test_float32(self) -> None:
        tensors = draw(dtype=torch.float32, device=DEVICE)
        assert_equals_the_loop(tensors, "triton", padding=1)

    def test_float16(self) -> None:
        half = [tensor.detach().half().requires_grad_() for tensor in draw(3, device=DEVICE)]
        wide = [tensor.detach().double().requires_grad_() for tensor in half]
        y, expected = dynamic_conv2d(*half, padding=1, method="triton"), loop(*wide, padding=1)
        assert_close(y.double(), expected, torch.float16)
        found = torch.autograd.grad(y, half, torch.ones_like(y))
        for ours, theirs in zip(found, torch.autograd.grad(expected.sum(), wide), strict=True):
            assert ours.dtype == torch.float16
            assert_close(ours.double() / theirs.abs().max(), theirs / theirs.abs().max(), torch.float16)

    def test_compiled_to_one_graph(self) -> None:
        torch.compiler.reset()
        tensors = draw(3, device=DEVICE)
        compiled = torch.compile(dynamic_conv2d, fullgraph=True, backend="aot_eager")
        y, expected = compiled(*tensors, padding=1, method="triton"), loop(*tensors, padding=1)
        assert_close(y, expected)
        assert_close(*(torch.autograd.grad(output.square().sum(), tensors) for output in (y, expected)))

    @pytest.mark.parametrize("batch", [1, 3])
    def test_depthwise(self, batch: int) -> None:
        input, routing, weight, bias = draw(batch, groups=4, device=DEVICE)
        assert_equals_the_loop((input, routing, weight[:, :4], bias[:, :4]), "triton", padding=1, groups=4)

    @pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # of torch's own check
    def test_is_a_well_formed_operation(self) -> None:
        assert_equals_the_loop(draw(device=DEVICE), "triton")  # which loads it
        operands = (*draw(2, (4, 3), bias=False, device=DEVICE), [1, 1, 0, 0, 1, 1, 1])
        torch.library.opcheck(torch.ops.dyn_lightning.triton.default, operands)
        grad = torch.randn_like(torch.ops.dyn_lightning.triton(*operands))
        gradients = (grad, *(tensor.detach() for tensor in operands[:3]), operands[3], [True, True, True])
        torch.library.opcheck(torch.ops.dyn_lightning.triton_backward.default, gradients)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_holds_no_more_than_is_counted(
        self, layout: torch.memory_format, training: bool, dtype: torch.dtype
    ) -> None:
        sizes = SEVERAL_TILES[:3]
        x, routing, weight = (torch.randn(size, dtype=dtype, device=DEVICE) for size in sizes)
        tensors = [tensor.requires_grad_(training) for tensor in (x.contiguous(memory_format=layout), routing, weight)]
        y = dynamic_conv2d(*tensors, padding=1, method="triton")
        cotangent, last = torch.randn_like(y), layout == torch.channels_last

        def step() -> None:
            y = dynamic_conv2d(*tensors, padding=1, method="triton")
            if training:
                torch.autograd.grad(y, tensors, cotangent)

        beyond = peak_bytes(step, x.device) - sum(tensor.nbytes for tensor in (y, *(tensors if training else ())))
        geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
        case = Case(sizes[0], sizes[2], geometry, dtype, "cuda", last, True, training, 1, False, False)
        assert beyond <= (2 if training else 1) * case.bytes_of(case.held()["triton"])

    def test_channels_last(self) -> None:
        input, *others = draw(device=DEVICE)
        last = input.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
        assert_equals_the_loop((last, *others), "triton", padding=1)


# 35 -> 33 channels, 9 x 8 positions: two tiles of channels and of positions each, none of them full.
SEVERAL_TILES = [(2, 35, 9, 8), (2, 3), (3, 33, 35, 3, 3), (3, 33)]


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = r"method='triton' needs a CUDA device and the package triton, not cpu: take \['grouped', .*, 'cpp'\]"
    with pytest.raises(ValueError, match=message):
        dynamic_conv2d(*draw(), method="triton")
    with pytest.raises(ValueError, match=r"not meta: take \['grouped', 'matmul', 'mixture', 'chunked'\]"):
        dynamic_conv2d(*(tensor.to("meta") for tensor in draw()), method="triton")
