"""What every layer owes its caller. The test class of a layer inherits ``LayerContract`` and supplies ``layer``,
``options`` and ``slowly``.
"""

import copy
import re
import shutil
from itertools import product
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dyn_lightning.cost import methods
from dyn_lightning.routing import named_routers, watch
from tests.noise import fill_with_noise_
from tests.tolerances import TOLERANCES, assert_close

# (stride, padding, dilation): all that nn.Conv2d takes.
GEOMETRIES = [
    (stride, padding, dilation)
    for stride, padding, dilation in product([1, 2, (2, 1)], [0, 1, (2, 1), "same"], [1, (2, 1)])
    if stride == 1 or padding != "same"
]

# (kernel size, image size): each takes another method of dynamic_conv2d.
SHAPES = [(3, (7, 6)), (3, (17, 15)), (1, (7, 6))]


class LayerContract:
    """The tests of any drop-in for ``nn.Conv2d``; unequal sizes everywhere, so that no swapped axis passes."""

    layer: ClassVar[Any]  # the class
    options: ClassVar[dict[str, Any]] = {}  # its own, small
    geometry: ClassVar[dict[str, Any]] = {"in_channels": 4, "out_channels": 6, "kernel_size": 3}
    scale: ClassVar[float] = 1.0  # of the noise in the parameters; layers of several convolutions need a smaller one
    straight_through: ClassVar[tuple[str, ...]] = ()  # parameters whose gradient is not that of the output
    keeps_output: ClassVar[bool] = True  # whether from_conv does
    takes_one_image: ClassVar[bool] = False  # without a batch axis, as nn.Conv2d does

    def excluded(self, **geometry: Any) -> str:
        """Give what the constructor says of a geometry that the layer's definition excludes, else nothing."""
        return ""

    def excluded_conv(self, **geometry: Any) -> str:
        """Give what ``from_conv`` says of a convolution that it cannot take, else nothing."""
        return self.excluded(**geometry)

    def make(self, **kw: Any) -> nn.Module:
        """Build the layer: ``geometry``, ``options``, and over both what ``kw`` says."""
        return self.layer(**{**self.geometry, **self.options, **kw})

    def from_conv(self, conv: nn.Conv2d) -> nn.Module:
        return self.layer.from_conv(conv, **self.options)

    def slowly(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Give the paper's equation, one sample at a time."""
        raise NotImplementedError

    def noisy(self, dtype: torch.dtype = torch.float64, seed: int = 0, **kw: Any) -> nn.Module:
        return fill_with_noise_(self.make(**kw).to(dtype), seed, self.scale).eval()

    def refuses(self, **geometry: Any) -> bool:
        """Check that the layer refuses what its definition excludes, and say whether it does."""
        message = self.excluded(**{**self.geometry, "groups": 1, **geometry})
        if message:
            with pytest.raises(ValueError, match=re.escape(message)):
                self.make(**geometry)
        return bool(message)

    def static(self, dtype: torch.dtype = torch.float64, **kw: Any) -> nn.Conv2d:
        return fill_with_noise_(nn.Conv2d(**{**self.geometry, **kw}).to(dtype))

    def images(self, batch: int = 2, size: tuple[int, int] = (7, 6), dtype: torch.dtype = torch.float64) -> Tensor:
        return torch.randn(batch, self.geometry["in_channels"], *size, dtype=dtype)

    def assert_equals_the_equation(self, x: Tensor, **geometry: Any) -> None:
        if self.refuses(**geometry):
            return
        layer = self.noisy(**geometry)
        assert layer(x).shape == self.static(**geometry)(x).shape
        assert_close(layer(x), self.slowly(layer, x))

    # Values

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("groups", [1, 2])
    @pytest.mark.parametrize(("stride", "padding", "dilation"), GEOMETRIES)
    def test_equals_the_equation(self, stride: Any, padding: Any, dilation: Any, groups: int, bias: bool) -> None:
        self.assert_equals_the_equation(
            self.images(), stride=stride, padding=padding, dilation=dilation, groups=groups, bias=bias
        )

    @pytest.mark.parametrize("stride", [1, 2, (2, 1)])
    @pytest.mark.parametrize("kernel_size", [1, 3, (3, 1), (1, 5)])
    @pytest.mark.parametrize("size", [(7, 6), (15, 13), (5, 9), (1, 1)])
    def test_equals_the_equation_at_any_size(self, size: tuple[int, int], kernel_size: Any, stride: Any) -> None:
        self.assert_equals_the_equation(self.images(size=size), kernel_size=kernel_size, stride=stride, padding=2)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("multiplier", [1, 2])
    def test_equals_the_equation_with_a_group_a_channel(self, multiplier: int, bias: bool) -> None:
        self.assert_equals_the_equation(self.images(), out_channels=4 * multiplier, groups=4, stride=2, bias=bias)

    def test_takes_one_input_channel(self) -> None:
        self.assert_equals_the_equation(self.images()[:, :1], in_channels=1)

    def test_trains_with_the_batch_s_statistics(self) -> None:
        layer, x = self.noisy(stride=2, padding=1).train(), self.images(3)
        norms = [module for module in layer.modules() if isinstance(module, nn.BatchNorm2d)]
        seen = {}

        def see(norm: nn.Module, args: tuple[Tensor]) -> None:
            seen[norm] = torch.var_mean(args[0].detach(), (0, 2, 3), correction=0)

        hooks = [norm.register_forward_pre_hook(see) for norm in norms]
        y = layer(x)
        for norm, hook in zip(norms, hooks, strict=True):
            hook.remove()
            norm.running_var, norm.running_mean = seen[norm]
        assert_close(layer.eval()(x), y)

    def test_takes_a_batch_only_or_what_conv2d_takes(self) -> None:
        layer, x = self.noisy(padding=1), self.images()[0]
        if self.takes_one_image:
            assert_close(layer(x), layer(x[None])[0])
        else:
            with pytest.raises(ValueError, match=r"must be \(B, C_in, H, W\); x\[None\] adds a batch axis"):
                layer(x)

    def test_samples_do_not_see_each_other(self) -> None:
        layer, x = self.noisy(), self.images(3)
        assert_close(layer(x)[1:2], layer(x[1:2]))

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("batch", [0, 1])
    def test_takes_a_small_batch(self, batch: int, training: bool) -> None:
        layer, x = self.noisy(stride=2, padding=1).train(training), self.images(batch).requires_grad_()
        y = layer(x)
        y.sum().backward()
        assert y.shape == (batch, self.geometry["out_channels"], 4, 3)
        assert y.isfinite().all()
        assert x.grad.shape == x.shape
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())

    # Gradients

    def test_gradcheck(self) -> None:
        groups = 1 if self.refuses(groups=2) else 2
        layer, x = self.noisy(groups=groups), self.images(size=(4, 3)).requires_grad_()
        named = [(name, value) for name, value in layer.named_parameters() if name not in self.straight_through]
        names, parameters = zip(*named, strict=True)

        def function(x: Tensor, *values: Tensor) -> Tensor:
            return functional_call(layer, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(function, (x, *parameters))

    def test_every_parameter_gets_a_gradient(self) -> None:
        layer, x = self.noisy(), self.images(5)
        y = layer(x)
        (y * torch.randn_like(y)).sum().backward()
        assert [name for name, parameter in layer.named_parameters() if not parameter.grad.any()] == []

    # Copies

    def test_state_dict_restores_the_layer(self) -> None:
        layer, other, x = self.noisy(), self.noisy(seed=1), self.images()
        assert not torch.equal(layer(x), other(x))
        other.load_state_dict(layer.state_dict(), strict=True)
        assert torch.equal(layer(x), other(x))

    def test_deepcopy_is_independent(self) -> None:
        layer, x = self.noisy(), self.images()
        before, other = layer(x), copy.deepcopy(layer)
        assert torch.equal(other(x), before)
        fill_with_noise_(other, seed=1)
        assert torch.equal(layer(x), before)

    # Memory formats, dtypes, compilation

    @pytest.mark.parametrize(("kernel_size", "size"), SHAPES)
    def test_channels_last_stays(self, kernel_size: int, size: tuple[int, int]) -> None:
        layer, x = self.noisy(kernel_size=kernel_size, padding=1), self.images(size=size)
        y = layer(x.contiguous(memory_format=torch.channels_last))
        assert y.is_contiguous(memory_format=torch.channels_last)
        assert layer(x).is_contiguous()
        assert_close(y, layer(x))
        expected = layer(x)
        layer.to(memory_format=torch.channels_last)
        assert_close(layer(x.contiguous(memory_format=torch.channels_last)), expected)

    @pytest.mark.parametrize("dtype", TOLERANCES)
    def test_module_in_any_dtype(self, dtype: torch.dtype) -> None:
        layer, x = self.noisy(dtype), self.images(dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert_close(y.double(), layer.double()(x.double()), dtype)

    @pytest.mark.parametrize(("kernel_size", "size"), SHAPES)
    def test_bfloat16_autocast(self, kernel_size: int, size: tuple[int, int]) -> None:
        layer, x = self.noisy(torch.float32, kernel_size=kernel_size), self.images(size=size, dtype=torch.float32)
        with watch(layer) as routing, torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        y.float().sum().backward()
        assert y.dtype == torch.bfloat16
        assert_close(y.float(), layer(x), torch.bfloat16)
        assert all(parameter.grad.isfinite().all() for parameter in layer.parameters())
        assert {name: weights.dtype for name, weights in routing.items()} == dict.fromkeys(
            named_routers(layer), torch.float32
        )

    @pytest.mark.parametrize(
        ("backend", "kernel_size", "training"),
        [pytest.param("inductor", 3, False, marks=pytest.mark.slow), ("aot_eager", 1, True)],
    )
    def test_compiles_to_one_graph(self, backend: str, kernel_size: int, training: bool) -> None:
        if backend == "inductor" and not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")):
            pytest.skip("inductor needs a C++ compiler")
        layer, x = self.noisy(torch.float32, kernel_size=kernel_size), self.images(dtype=torch.float32).requires_grad_()
        layer.train(training)
        torch.compiler.reset()
        compiled = torch.compile(layer, fullgraph=True, backend=backend)
        inputs = (x, *layer.parameters())
        assert_close(compiled(x), layer(x))
        assert_close(
            torch.autograd.grad(compiled(x).square().mean(), inputs),
            torch.autograd.grad(layer(x).square().mean(), inputs),
        )

    # from_conv

    @pytest.mark.parametrize("dtype", TOLERANCES)
    @pytest.mark.parametrize(
        "geometry",
        [
            {},
            {"kernel_size": 1, "stride": 2},
            {"kernel_size": (3, 1), "padding": "same", "dilation": (2, 1), "bias": False},
            {"stride": (2, 1), "padding": (2, 1), "groups": 2},
        ],
        ids=str,
    )
    def test_from_conv(self, geometry: dict[str, Any], dtype: torch.dtype) -> None:
        conv, x = self.static(dtype, **geometry), self.images(dtype=dtype)
        if message := self.excluded_conv(**{**self.geometry, "groups": 1, **geometry}):
            with pytest.raises(ValueError, match=re.escape(message)):
                self.from_conv(conv)
            return
        before = copy.deepcopy(conv)
        layer = self.from_conv(conv).eval()
        assert layer(x).shape == conv(x).shape
        if self.keeps_output:
            assert_close(layer(x), conv(x))
        elif conv.bias is not None:
            assert torch.equal(layer.bias, conv.bias)
        assert {value.dtype for name, value in layer.named_parameters() if name not in self.straight_through} == {dtype}
        assert all(parameter.requires_grad for parameter in layer.parameters())
        fill_with_noise_(layer, seed=1)
        assert torch.equal(conv(x), before(x))

    def test_from_conv_refuses_what_is_no_conv2d(self) -> None:
        with pytest.raises(ValueError, match=r"ConvTranspose2d is no Conv2d: leave this layer static"):
            self.from_conv(nn.ConvTranspose2d(4, 4, 3))

    def test_from_conv_refuses_a_padding_mode(self) -> None:
        with pytest.raises(ValueError, match="padding_mode='reflect' is not supported, only 'zeros' is"):
            self.from_conv(self.static(padding_mode="reflect", padding=1))

    # Constructor and description

    @pytest.mark.parametrize(
        ("geometry", "message"),
        [
            ({"groups": 5}, "groups=5 must divide in_channels={in_channels} and out_channels={out_channels}"),
            ({"groups": 2, "in_channels": 3}, "groups=2 must divide in_channels=3 and out_channels={out_channels}"),
            ({"groups": 2, "out_channels": 5}, "groups=2 must divide in_channels={in_channels} and out_channels=5"),
            ({"groups": 0}, "groups=0 must be at least 1"),
            ({"in_channels": 0}, "in_channels=0 must be at least 1"),
            ({"out_channels": -1}, "out_channels=-1 must be at least 1"),
            ({"padding": "some"}, "padding='some' must be 'same', 'valid', a whole number or two of them"),
            ({"padding": -1}, "padding=-1 must be at least 0"),
            (
                {"kernel_size": (3, 3, 3)},
                "kernel_size=(3, 3, 3) must be a whole number or two of them, (rows, columns)",
            ),
            ({"stride": (1, 2.5)}, "stride=(1, 2.5) must be a whole number or two of them"),
            ({"dilation": 2.5}, "dilation=2.5 must be a whole number or two of them"),
            ({"groups": True}, "groups=True must be a whole number"),
        ],
        ids=str,
    )
    def test_constructor_refuses(self, geometry: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=re.escape(message.format(**self.geometry))):
            self.make(**geometry)

    @pytest.mark.parametrize(
        "geometry",
        [{}, {"stride": 2, "padding": (2, 1), "dilation": 3, "groups": 2, "bias": False}, {"padding": "same"}],
        ids=str,
    )
    def test_describes_itself_as_conv2d_does(self, geometry: dict[str, Any]) -> None:
        if self.refuses(**geometry):
            return
        layer, conv = self.make(**geometry), nn.Conv2d(**{**self.geometry, **geometry})
        assert conv.extra_repr() in layer.extra_repr()
        assert layer.extra_repr() in repr(layer)
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        assert {name: getattr(layer, name) for name in names} == {name: getattr(conv, name) for name in names}
        assert (layer.bias is None) == (conv.bias is None)

    def test_prints_without_data(self) -> None:
        with torch.device("meta"):
            assert self.make().extra_repr() in repr(self.make())


class MixtureContract(LayerContract):
    """The further tests of a layer whose ``weight`` holds K kernels, mixed by routing weights for each sample."""

    count: str  # the option that says how many kernels there are

    def route(self, layer: nn.Module, pooled: Tensor) -> Tensor:
        """Give the routing weights ``(K,)`` of one sample, from its mean over the pixels ``(C_in,)``."""
        raise NotImplementedError

    def slowly(self, layer: nn.Module, x: Tensor) -> Tensor:
        outputs = []
        for image in x:
            routing = self.route(layer, image.mean((1, 2)))
            kernel = sum(routing[k] * layer.weight[k] for k in range(len(routing)))
            bias = None if layer.bias is None else sum(routing[k] * layer.bias[k] for k in range(len(routing)))
            outputs.append(
                F.conv2d(image[None], kernel, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
            )
        return torch.cat(outputs)

    def test_method_and_bytes_reach_the_convolution(self) -> None:
        speed = {"method": "mixture", "max_mixed_bytes": 7}
        for layer in (self.make(**speed), self.layer.from_conv(self.static(), **self.options, **speed)):
            assert list(methods(layer, (self.geometry["in_channels"], 7, 6)).values()) == ["mixture"]
            assert layer.max_mixed_bytes == 7
            assert ", method=mixture" in repr(layer)
            layer.method = "auto"
            assert "method" not in repr(layer)
            assert list(methods(layer, (self.geometry["in_channels"], 7, 6)).values()) == ["chunked"]

    @pytest.mark.parametrize("index", range(3))
    def test_one_open_kernel_is_a_convolution(self, index: int) -> None:
        layer, x = self.noisy(stride=2, padding=1, groups=2), self.images()
        layer.router.register_forward_hook(lambda *_: F.one_hot(torch.tensor([index, index]), 3))
        assert_close(layer(x), F.conv2d(x, layer.weight[index], layer.bias[index], stride=2, padding=1, groups=2))

    @pytest.mark.parametrize("groups", [1, 4])
    def test_each_kernel_starts_as_conv2d_does(self, groups: int) -> None:
        layer = self.make(in_channels=16, out_channels=64, groups=groups)
        expected = nn.Conv2d(16, 64, 3, groups=groups).weight
        assert [kernel.std().item() for kernel in layer.weight] == [pytest.approx(expected.std().item(), rel=0.1)] * 3
        assert layer.weight.abs().max().item() == pytest.approx(expected.abs().max().item(), rel=0.01)
        assert not torch.equal(layer.weight[0], layer.weight[1])
        assert not layer.bias.any()

    def test_upcycled_kernels_part_after_one_step(self) -> None:
        layer, x = self.from_conv(self.static()), self.images(5)
        before = layer.weight.detach().clone()
        layer(x).square().mean().backward()
        torch.optim.SGD(layer.parameters(), lr=0.1).step()
        step = (layer.weight - before).abs().max()
        for k, other in product(range(len(before)), repeat=2):
            assert k == other or (layer.weight[k] - layer.weight[other]).abs().max() > 1e-4 * step > 0

    def test_refuses_no_kernels(self) -> None:
        with pytest.raises(ValueError, match=f"{self.count}=0 must be at least 1"):
            self.make(**{self.count: 0})

    def test_describes_its_kernels(self) -> None:
        assert f"{self.count}=3" in self.make().extra_repr()
