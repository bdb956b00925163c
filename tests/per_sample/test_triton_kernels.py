"""Triton's kernels in Triton's interpreter, on the CPU. What they are worth on a GPU, a GPU has to show."""

from typing import Any

import pytest
import torch

from dyn_lightning.functional import dynamic_conv2d
from tests.contract import GEOMETRIES
from tests.per_sample.loop import assert_equals_the_loop, draw
from tests.tolerances import assert_close

pytest.importorskip("triton", reason="the package triton exists for Linux only")


class TestTriton:
    @pytest.mark.parametrize(("kernel_size", "groups"), [((3, 3), 2), ((1, 1), 2), ((1, 3), 1)])
    @pytest.mark.parametrize(("stride", "padding", "dilation"), GEOMETRIES[::2])
    def test_equals_a_loop_over_samples(
        self, stride: Any, padding: Any, dilation: Any, kernel_size: Any, groups: int
    ) -> None:
        tensors = draw(kernel_size=kernel_size, groups=groups)
        geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
        assert_equals_the_loop(tensors, "triton", **geometry)

    def test_several_tiles_of_channels_and_positions(self) -> None:
        tensors = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in SEVERAL_TILES]
        assert_equals_the_loop(tuple(tensors), "triton", padding=1)

    @pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True)])
    def test_frozen_parts_get_no_gradient(self, needed: tuple[bool, ...]) -> None:
        tensors = [t.detach().requires_grad_(need) for t, need in zip(draw(bias=False), needed, strict=True)]
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        gradients = [
            torch.autograd.grad(dynamic_conv2d(*tensors, method=method).square().sum(), wanted)
            for method in ("triton", "grouped")
        ]
        assert_close(*gradients)

    def test_float32(self) -> None:
        tensors = draw(dtype=torch.float32)
        assert_equals_the_loop(tensors, "triton", padding=1)


# 35 -> 33 channels, 9 x 8 positions: two tiles of channels and of positions each, none of them full.
SEVERAL_TILES = [(2, 35, 9, 8), (2, 3), (3, 33, 35, 3, 3), (3, 33)]


def test_other_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    message = r"method='triton' needs a CUDA device and the package triton, not cpu: take \['grouped', .*'chunked'\]"
    with pytest.raises(ValueError, match=message):
        dynamic_conv2d(*draw(), method="triton")
