import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dyn_lightning import allocator, functional
from dyn_lightning.cost import peak_bytes
from dyn_lightning.functional import choose_method, dynamic_conv2d
from dyn_lightning.layers import DynamicConv2d
from dyn_lightning.per_sample import by_name, choice, depthwise, processor
from dyn_lightning.per_sample.case import Case
from dyn_lightning.per_sample.choice import methods_within
from dyn_lightning.per_sample.chunked import CACHED_BYTES, CACHED_BYTES_OF_ONE, chunk_size, chunked
from dyn_lightning.per_sample.geometry import Geometry
from tests.command_line import ROOT
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
        ((1, 256, 2, 2), (4, 256, 256, 3, 3), PADDED, "grouped"),
        ((1, 96, 8, 8), (4, 96, 1, 3, 3), {"padding": 1, "groups": 96}, "grouped"),
        ((1, 96, 14, 14), (4, 96, 1, 3, 3), {"padding": 1, "groups": 96}, "grouped"),
        # MobileNetV2: 1x1 over large and over single pixels, depthwise over large and small maps
        ((32, 24, 56, 56), (4, 144, 24, 1, 1), {}, "cpp"),
        ((32, 8, 112, 112), (4, 48, 8, 1, 1), {}, "cpp"),
        ((32, 960, 1, 1), (4, 160, 960, 1, 1), {}, "mixture"),
        ((32, 96, 112, 112), (4, 96, 1, 3, 3), {"padding": 1, "stride": 2, "groups": 96}, "grouped"),
        ((32, 192, 14, 14), (4, 192, 1, 3, 3), {"padding": 1, "groups": 192}, "grouped"),
        ((32, 960, 1, 1), (4, 960, 1, 3, 3), {"padding": 1, "groups": 960}, "matmul"),
        ((32, 192, 2, 2), (4, 192, 1, 3, 3), {"padding": 1, "groups": 192}, "grouped"),
        ((32, 576, 2, 2), (4, 576, 1, 3, 3), {"padding": 1, "groups": 576}, "grouped"),
        ((32, 192, 28, 28), (4, 192, 1, 3, 3), {"padding": 1, "groups": 192}, "grouped"),
        (
            (32, 192, 28, 28),
            (4, 384, 1, 3, 3),
            {"padding": 1, "groups": 192},
            "chunked",
        ),  # which the C++ does not serve
        # ResNet: few and many weights beside the pixels
        ((32, 64, 56, 56), (4, 64, 64, 3, 3), PADDED, "cpp"),
        ((32, 256, 14, 14), (4, 256, 256, 3, 3), PADDED, "cpp"),
        ((32, 256, 2, 2), (4, 256, 256, 3, 3), PADDED, "mixture"),
        ((32, 512, 1, 1), (4, 512, 512, 3, 3), PADDED, "mixture"),
        ((32, 512, 7, 7), (4, 2048, 512, 1, 1), {}, "cpp"),
        ((32, 1024, 15, 15), (4, 64, 1024, 1, 1), {"stride": (8, 15)}, "mixture"),
    ],
)
def test_choose_method(input: tuple, weight: tuple, geometry: dict[str, Any], method: str) -> None:
    assert choose_method(torch.empty(input), torch.empty(weight), **geometry) == method


@pytest.mark.parametrize(
    ("input", "weight", "geometry", "method"),
    [
        ((32, 960, 7, 7), (4, 960, 1, 3, 3), {"padding": 1, "groups": 960}, "grouped"),
        ((1, 960, 14, 14), (4, 960, 1, 3, 3), {"padding": 1, "groups": 960}, "grouped"),
        ((32, 96, 112, 112), (4, 96, 1, 3, 3), {"padding": 1, "groups": 96}, "grouped"),  # both maps: more than allowed
        ((16, 128, 32, 32), (4, 128, 64, 3, 3), {"padding": 1, "groups": 2}, "grouped"),
        ((32, 512, 7, 7), (4, 512, 512, 3, 3), PADDED, "cpp"),
    ],
)
def test_channels_last_does_not_choose_otherwise(
    input: tuple, weight: tuple, geometry: dict[str, Any], method: str
) -> None:
    x, kernels = torch.empty(input), torch.empty(weight)
    layouts = x, x.contiguous(memory_format=torch.channels_last)
    assert [choose_method(laid_out, kernels, **geometry) for laid_out in layouts] == [method, method]


@pytest.mark.parametrize(
    ("input", "weight", "geometry", "by_glibc", "kept"),
    [
        ((32, 96, 112, 112), (4, 96, 1, 3, 3), {"padding": 1, "stride": 2, "groups": 96}, "grouped", "grouped"),
        ((32, 256, 14, 14), (4, 256, 256, 3, 3), PADDED, "cpp", "cpp"),
        ((32, 64, 56, 56), (4, 64, 64, 3, 3), PADDED, "cpp", "cpp"),
        ((32, 256, 14, 14), (4, 256, 128, 3, 3), {"padding": 1, "groups": 2}, "chunked", "grouped"),
        ((32, 256, 14, 14), (4, 1024, 256, 1, 1), {}, "cpp", "cpp"),
        ((1, 256, 14, 14), (4, 512, 256, 3, 3), PADDED, "grouped", "grouped"),
        ((1, 512, 1, 1), (4, 512, 512, 3, 3), PADDED, "cpp", "cpp"),
        ((1, 16, 56, 56), (4, 96, 16, 1, 1), {}, "cpp", "cpp"),
        ((1, 2048, 1, 1), (4, 512, 2048, 1, 1), {}, "cpp", "cpp"),
        ((1, 512, 1, 1), (4, 2048, 512, 1, 1), {}, "cpp", "cpp"),
        ((128, 512, 7, 7), (4, 512, 256, 3, 3), {"padding": 1, "groups": 2}, "chunked", "chunked"),  # more than allowed
    ],
)
def test_it_matters_whether_freed_memory_is_kept(
    input: tuple, weight: tuple, geometry: dict[str, Any], by_glibc: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = torch.empty(input), torch.empty(weight)
    for keeps, method in ((False, by_glibc), (True, kept)):
        monkeypatch.setattr(allocator, "_kept", keeps)
        assert choose_method(*tensors, **geometry, training=input[0] > 1) == method


@pytest.mark.parametrize(
    ("input", "weight", "geometry", "method"),
    [
        ((32, 256, 56, 56), (4, 128, 256, 1, 1), {}, "matmul"),
        ((32, 64, 14, 14), (4, 384, 64, 1, 1), {}, "matmul"),
        ((1, 16, 56, 56), (4, 96, 16, 1, 1), {}, "matmul"),
        ((1, 40, 4, 4), (4, 240, 40, 1, 1), {}, "matmul"),
        ((1, 480, 1, 1), (4, 80, 480, 1, 1), {}, "matmul"),
        ((1, 512, 1, 1), (4, 2048, 512, 1, 1), {}, "cpp"),
        ((1, 1024, 2, 2), (4, 512, 1024, 1, 1), {}, "cpp"),
        ((1, 128, 4, 4), (4, 128, 128, 3, 3), PADDED, "cpp"),
        ((1, 512, 7, 7), (4, 512, 512, 3, 3), PADDED, "cpp"),
        ((1, 256, 14, 14), (4, 256, 256, 3, 3), PADDED, "grouped"),
        ((32, 960, 1, 1), (4, 160, 960, 1, 1), {}, "mixture"),
        ((32, 256, 14, 14), (4, 256, 256, 3, 3), PADDED, "cpp"),
        ((32, 192, 14, 14), (4, 192, 1, 3, 3), {"padding": 1, "groups": 192}, "grouped"),
    ],
)
def test_on_intel_s_processors(
    input: tuple, weight: tuple, geometry: dict[str, Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processor, "_vendor", lambda: "GenuineIntel")
    assert choose_method(torch.empty(input), torch.empty(weight), **geometry, training=input[0] > 1) == method


def test_on_a_gpu_it_does_not_matter() -> None:
    with torch.device("meta"):
        tensors = torch.empty(32, 256, 14, 14), torch.empty(4, 256, 256, 3, 3)
    assert choose_method(*tensors) == "mixture"


def test_evaluation_may_choose_otherwise() -> None:
    tensors = torch.empty(32, 256, 2, 2), torch.empty(4, 256, 256, 3, 3)
    methods = [choose_method(*tensors, padding=1, training=training) for training in (True, False)]
    assert methods == ["mixture", "cpp"]


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({}, "grouped"),
        ({"compiled": False}, "matmul"),
        ({"compiled": False, "layout": torch.channels_last}, "grouped"),
        ({"training": True}, "grouped"),
        ({"training": True, "layout": torch.channels_last}, "grouped"),
        ({"device": "meta"}, "matmul"),  # as on a GPU
        ({"device": "meta", "layout": torch.channels_last}, "matmul"),
        ({"outputs": 2}, "matmul"),
        ({"channels": 1500, "size": 2}, "grouped"),
        ({"channels": 1500, "size": 2, "dtype": torch.bfloat16}, "grouped"),
        ({"dtype": torch.float16}, "matmul"),
        ({"dtype": torch.complex64}, "matmul"),
    ],
)
def test_small_depthwise_convolutions_of_one_image(
    changes: dict[str, Any], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_all = {"compiled": True, "layout": torch.contiguous_format, "training": False, "device": "cpu", "outputs": 1}
    given = {**with_all, "channels": 96, "size": 8, "dtype": torch.float32, **changes}
    monkeypatch.setattr(depthwise, "is_compiled", lambda: given["compiled"])
    kind = {"device": given["device"], "dtype": given["dtype"]}
    x = torch.empty(1, given["channels"], given["size"], given["size"], **kind)
    weight = torch.empty(4, given["channels"] * given["outputs"], 1, 3, 3, **kind)
    options = {"padding": 1, "groups": given["channels"], "training": given["training"]}
    assert choose_method(x.to(memory_format=given["layout"]), weight, **options) == method


def test_chunks_of_one_image() -> None:
    image, weight = torch.empty(1, 256, 14, 14), torch.empty(4, 512, 256, 3, 3)
    geometry = Geometry((1, 1), (1, 1), (1, 1), 1)
    assert chunk_size(image, weight, geometry, CACHED_BYTES_OF_ONE) == (3, 256)


def test_what_chunks_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    def note(input: Tensor, routing: Tensor, weight: Tensor, geometry: Geometry, limit: int) -> Tensor:
        limits.append(limit)
        return chunked(input, routing, weight, geometry, limit)

    monkeypatch.setattr(by_name, "chunked", note)
    for images in (1, 2):
        tensors = torch.randn(images, 4, 9, 9), torch.rand(images, 2), torch.randn(2, 4, 4, 3, 3)
        dynamic_conv2d(*tensors, method="chunked")
        dynamic_conv2d(*tensors, method="chunked", max_mixed_bytes=10_000)
    assert limits == [CACHED_BYTES_OF_ONE, 10_000, CACHED_BYTES, 10_000]


def test_an_exported_network_of_one_image_has_no_operation_of_ours() -> None:
    layer = DynamicConv2d(256, 512, 3, padding=1, num_kernels=4).eval()
    image = (torch.randn(1, 256, 14, 14),)
    with torch.no_grad():
        exported = torch.export.export(layer, image, strict=False)
        assert "dyn_lightning" not in str(exported.graph)
        assert_close(exported.module()(*image), layer(*image))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(("channels", "size"), [(24, (9, 8)), (512, (7, 7))])
def test_nor_has_one_that_may_hold_little(channels: int, size: tuple[int, int], strict: bool) -> None:
    layer = DynamicConv2d(channels, 32, 3, padding=1, max_mixed_bytes=1).eval()
    x = torch.randn(4, channels, *size)
    with torch.no_grad():
        exported = torch.export.export(layer, (x,), strict=strict)
        assert "dyn_lightning" not in str(exported.graph)
        assert_close(exported.module()(x), layer(x))


def test_an_export_takes_what_it_may_hold_or_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "how_exported", lambda: "traced")
    x, weight = torch.empty(4, 512, 7, 7), torch.empty(2, 32, 512, 3, 3)
    mixed, outputs = 4 * 4 * 32 * 512 * 9, 4 * 4 * 32 * 7 * 7
    for limit, method in ((8 * mixed, "grouped"), (mixed - 1, "mixture"), (2 * outputs - 1, "grouped")):
        assert choose_method(x, weight, padding=1, training=False, max_mixed_bytes=limit) == method


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("last", [True, False])
def test_triton_s_kernels_hold_something_too(
    dtype: torch.dtype, training: bool, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choice, "has_triton", lambda: True)
    input, weight, geometry = (8, 64, 14, 14), (4, 96, 64, 3, 3), Geometry((1, 1), (1, 1), (1, 1), 1)
    pixels, outputs, weights, wide = 8 * 64 * 14**2, 8 * 96 * 14**2, 4 * 96 * 64 * 9, 4 // dtype.itemsize
    parts = 9 * (3 * 2) * 8 * 4  # for each tap and tile of 32 x 32 channels the routing weights' gradients
    needed = weights + (pixels + outputs) * last
    if training:  # the gradients of the weights in another order, and of 16 bits in the weight's, in float32
        needed += wide * (weights + parts) + (wide * weights if wide > 1 else 0)
    for less, serves in ((0, True), (2, False)):
        limit = (needed - less) * dtype.itemsize
        given = Case(input, weight, geometry, dtype, "cuda", last, True, training, limit, False, False)
        assert ("triton" in methods_within(given)) == serves
    assert "triton" not in methods_within(given._replace(device="cpu", max_mixed_bytes=1 << 30))


class TestMemory:
    """64 samples' kernels of 64 -> 64 channels take 9.4 MB, a chunk's gradients as much as the chunk."""

    KERNELS = 64 * 64 * 64 * 9 * 4

    def beyond(
        self,
        input: tuple,
        weight: tuple,
        geometry: dict[str, Any],
        training: bool = True,
        memory_format: torch.memory_format = torch.contiguous_format,
        **options: Any,
    ) -> int:
        """Give the bytes that are held at once beyond the output and the gradients."""
        x, stacked = torch.randn(input), torch.randn(weight, requires_grad=training)
        x = x.to(memory_format=memory_format).requires_grad_(training)
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
            ((64, 64, 4, 4), (4, 64, 64, 3, 3), PADDED, True, 12 * 10**6),  # room for the unfolded input
            ((64, 64, 4, 4), (4, 64, 64, 3, 3), PADDED, False, 6 * 10**6),
            ((64, 64, 4, 4), (4, 64, 64, 3, 3), PADDED, False, 10**6),
            ((16, 32, 14, 14), (4, 32, 32, 3, 3), PADDED, True, 700_000),
            ((8, 64, 32, 32), (4, 8, 64, 1, 1), {"stride": 2}, False, 200_000),  # rows that have to be copied
            ((8, 64, 32, 32), (4, 96, 64, 1, 1), {}, False, 20_000),  # less than a sample's kernel
            ((1, 64, 16, 16), (4, 32, 64, 1, 1), {}, True, 20_000),
            ((64, 64, 4, 4), (4, 64, 32, 3, 3), {"padding": 1, "groups": 2}, False, 1_100_000),
            ((8, 512, 2, 2), (4, 512, 256, 3, 3), {"padding": 1, "groups": 2}, False, 6 * 10**6),  # all K are copied
            ((32, 512, 2, 2), (4, 16, 512, 1, 1), {}, False, 40_000),
            ((32, 512, 1, 1), (4, 64, 512, 1, 1), {}, True, 300_000),
            ((32, 64, 14, 14), (4, 64, 1, 5, 5), {"padding": 2, "groups": 64}, True, 3 * 10**6),  # its input is padded
            ((32, 64, 14, 14), (4, 64, 1, 5, 5), {"padding": 2, "groups": 64}, True, 10**6),
            ((32, 576, 2, 2), (4, 576, 1, 3, 3), {"padding": 1, "groups": 576}, True, 2 * 10**6),
            ((32, 240, 4, 4), (4, 240, 1, 5, 5), {"padding": 2, "groups": 240}, True, 2 * 10**6),
        ],
    )
    def test_no_more_than_is_allowed(
        self, input: tuple, weight: tuple, geometry: dict[str, Any], training: bool, limit: int, method: str
    ) -> None:
        # A convolution's library may take as much again as the kernels, in a layout of its own.
        times = 1 if weight[3:] == (1, 1) else 1.5 if training else 2
        assert self.beyond(input, weight, geometry, training, method=method, max_mixed_bytes=limit) <= times * limit

    @pytest.mark.parametrize("method", ["auto", "chunked"])
    def test_the_map_of_one_image_counts_too(self, method: str) -> None:
        shapes = (1, 128, 56, 56), (4, 1024, 128, 3, 3)  # a kernel of 4.7 MB, an output of 12.8 MB
        limit = 4_600_000
        assert self.beyond(*shapes, PADDED, training=False, method=method, max_mixed_bytes=limit) <= 2 * limit

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize(
        ("input", "weight", "geometry", "limit"),
        [
            ((8, 4, 20, 20), (4, 64, 4, 3, 3), PADDED, 220_000),
            ((8, 4, 20, 20), (4, 64, 4, 3, 3), PADDED, 4 * 10**6),
            ((8, 64, 20, 20), (4, 64, 1, 3, 3), {"padding": 1, "groups": 64}, 10**6),
            ((8, 64, 20, 20), (4, 64, 64, 1, 1), {}, 10**6),
            ((8, 16, 40, 40), (4, 64, 16, 1, 1), {"stride": 2}, 237_568),
            ((2, 64, 56, 56), (32, 64, 64, 3, 3), PADDED, 6 * 10**6),  # a convolution for each sample
            ((8, 64, 56, 56), (4, 64, 64, 3, 3), PADDED, 40 * 10**6),
        ],
    )
    def test_channels_last_takes_no_more(
        self, input: tuple, weight: tuple, geometry: dict[str, Any], limit: int, training: bool
    ) -> None:
        options: dict[str, Any] = {"memory_format": torch.channels_last, "max_mixed_bytes": limit}
        last = self.beyond(input, weight, geometry, training, method="chunked", **options)
        assert self.beyond(input, weight, geometry, training, **options) <= max(limit, last)

    def test_a_bias_is_added_in_place_where_nothing_is_differentiated(self) -> None:
        shapes: tuple[tuple, ...] = (8, 64, 20, 20), (4, 64, 64, 1, 1)
        options: dict[str, Any] = {"training": False, "method": "matmul"}
        plain, added = (self.beyond(*shapes, {"bias": bias}, **options) for bias in (None, torch.randn(4, 64)))
        assert added - plain < 8 * 64 * 20 * 20 * 4 / 4  # the output

    def test_kernels_and_unfolded_input_count_together(self) -> None:
        tensors = torch.empty(2, 12, 4, 4), torch.empty(16, 12, 12, 3, 3)
        needed = 4 * 2 * (12 * 12 * 9 + 12 * 9 * 4 * 4 + 12 * 4 * 4)
        for limit, method in ((needed, "matmul"), (needed - 1, "chunked")):
            assert choose_method(*tensors, **PADDED, training=False, max_mixed_bytes=limit) == method

    def test_an_input_that_is_copied_into_the_groups_counts(self) -> None:
        weight, x = torch.empty(4, 8, 8, 3, 3), torch.empty(2, 8, 20, 20)
        limits: dict[str, Any] = {"training": False, "max_mixed_bytes": 10_000}
        assert choose_method(x, weight, **PADDED, **limits) == "grouped"
        last = x.contiguous(memory_format=torch.channels_last)
        for copied in (x[:, :, :, ::2], last):
            assert choose_method(copied, weight, **PADDED, **limits) == "chunked"

    @pytest.mark.parametrize("intel", [True, False])
    def test_few_columns_that_are_laid_out_side_by_side_count(
        self, intel: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(processor, "_vendor", lambda: "GenuineIntel" if intel else "")
        x, weight = torch.empty(1, 640, 2, 2), torch.empty(16, 15, 640, 1, 1)  # fewer channels than our C++ computes
        needed = 4 * (15 * 640 + (0 if intel else 640 * 4))
        for limit, method in ((needed, "matmul"), (needed - 1, "chunked")):
            assert choose_method(x, weight, training=False, max_mixed_bytes=limit) == method

    @pytest.mark.parametrize(("size", "laid_out"), [(2, 4), (7, 64)])
    def test_what_few_positions_see_counts(self, size: int, laid_out: int, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(processor, "_vendor", lambda: "GenuineIntel")
        shapes: tuple[tuple, ...] = (1, 256, size, size), (4, 256, 256, 3, 3)
        needed = 4 * laid_out * 9 * 256
        tensors = [torch.empty(shape) for shape in shapes]
        for limit, method in ((needed, "cpp"), (needed - 1, "chunked")):
            assert choose_method(*tensors, **PADDED, training=False, max_mixed_bytes=limit) == method
        assert needed <= self.beyond(*shapes, PADDED, training=False, method="cpp") <= needed + 2**10

    def test_unfolded_input_counts(self) -> None:
        tensors = torch.empty(2, 512, 4, 4), torch.empty(16, 1, 512, 3, 3)
        assert choose_method(*tensors, **PADDED, training=False) == "matmul"
        assert choose_method(*tensors, **PADDED, training=False, max_mixed_bytes=20_000) == "chunked"


def test_processes_choose_alike(tmp_path: Path) -> None:
    """As DDP ranks have to, whatever their seeds and threads are; without a compiler, those that are in C++ differ."""
    program = """
import itertools
import torch
from dyn_lightning.functional import choose_method
channels, sizes = (16, 96, 512), (1, 2, 4, 7, 14, 28, 56)
geometries = itertools.product(channels, channels, (1, 3, 5), (1, 2), sizes, (0, 1))
for ins, outs, kernel, stride, size, depthwise in geometries:
    for batch, training in ((32, True), (32, False), (1, False)):
        depthwise &= ins == outs
        groups = ins if depthwise else 1
        x, weight = torch.empty(batch, ins, size, size), torch.empty(4, outs, ins // groups, kernel, kernel)
        print(depthwise, choose_method(x, weight, stride, kernel // 2, 1, groups, training=training))
x, weight = torch.empty(1, 200, 16, 16), torch.empty(4, 200, 1, 16, 16)
print(1, choose_method(x, weight, groups=200, training=False))
"""
    changes = [
        {"PYTHONHASHSEED": "1", "OMP_NUM_THREADS": "1"},
        {"PYTHONHASHSEED": "3", "OMP_NUM_THREADS": "3"},
        {"CXX": "no-such-compiler", "XDG_CACHE_HOME": str(tmp_path)},
    ]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=os.environ | change, cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        for change in changes
    ]
    one, other, without = (process.communicate()[0].splitlines() for process in started)
    assert one == other
    assert len(one) == len(without) == 3**3 * 2 * 7 * 2 * 3 + 1
    assert {line.split()[1] for line in one} == {"grouped", "matmul", "mixture", "chunked", "cpp"}
    different = [pair for pair in zip(one, without, strict=True) if pair[0] != pair[1]]
    assert {line.split()[0] for line, _ in different if not line.endswith("cpp")} == {"1"}
    assert not any(line.endswith("cpp") for line in without)
