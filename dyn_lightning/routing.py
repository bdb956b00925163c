"""Routers, which turn a feature map into routing weights ``(B, K)``, and the two ways to reach them from outside:
``watch`` reads their outputs, ``aggregation`` and ``replaced`` change them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from dyn_lightning.checks import check_batched, check_count
from dyn_lightning.per_sample.tracing import autocasts
from dyn_lightning.protocols import Routed, named_layers


class SigmoidRouter(nn.Module):
    """CondConv's routing function, ``sigmoid(GAP(x) R)`` (arXiv 1904.04971); the weights need not sum to one.

    Args:
        in_channels: channels of the feature map.
        num_experts: K.
        hidden: units of a hidden layer with ReLU before R, as a multiple of ``in_channels``; 0 is none.

    Shape:
        ``(B, in_channels, H, W)`` or pooled ``(B, in_channels)`` to ``(B, K)``, each in (0, 1), at least float32.

    Raises:
        ValueError: no experts, or a hidden that is not a finite number from 0 on.

    Example:
        >>> SigmoidRouter(4, 3)(torch.randn(2, 4, 7, 6)).shape
        torch.Size([2, 3])
    """

    def __init__(self, in_channels: int, num_experts: int, hidden: float = 0) -> None:
        super().__init__()
        self.fc = _perceptron(in_channels, num_experts, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Give the routing weights of each sample."""
        return torch.sigmoid(_logits(x, self.fc, self))

    def constant_(self) -> Tensor:
        """Make the weights the same for every image, and give them, ``(K,)``."""
        return torch.sigmoid(_zero_last_weight_(self.fc))


class SoftmaxRouter(nn.Module):
    """CondConv's routing function with a softmax in the sigmoid's place, one of its paper's ablations.

    Arguments, shapes and errors are those of ``SigmoidRouter``; the weights sum to one.

    Example:
        >>> SoftmaxRouter(4, 3)(torch.randn(2, 4, 7, 6)).shape
        torch.Size([2, 3])
    """

    def __init__(self, in_channels: int, num_experts: int, hidden: float = 0) -> None:
        super().__init__()
        self.fc = _perceptron(in_channels, num_experts, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Give the routing weights of each sample."""
        return torch.softmax(_logits(x, self.fc, self), dim=1)

    def constant_(self) -> Tensor:
        """Make the weights the same for every image, and give them, ``(K,)``."""
        return torch.softmax(_zero_last_weight_(self.fc), dim=0)


Router = Callable[[int, int], nn.Module]

# The routing functions of CondConv's ablation, by the name that the option ``router`` takes.
ROUTERS: dict[str, Router] = {
    "sigmoid": SigmoidRouter,
    "softmax": SoftmaxRouter,
    "hidden_small": partial(SigmoidRouter, hidden=1 / 8),
    "hidden_medium": partial(SigmoidRouter, hidden=1),
    "hidden_large": partial(SigmoidRouter, hidden=8),
}


def as_router(router: str | Router) -> Router:
    """Find a routing function by its name in ``ROUTERS``, or take it as it is.

    Raises:
        ValueError: there is none of that name.
    """
    if callable(router):
        return router
    if router not in ROUTERS:
        raise ValueError(f"router={router!r} does not exist, choose one of {list(ROUTERS)}, or pass a callable")
    return ROUTERS[router]


def pooled(x: Tensor) -> Tensor:
    """Average a feature map ``(B, C, H, W)`` over its pixels; ``(B, C)`` is pooled already."""
    if x.dim() == 2:
        return x
    check_batched(x.shape)
    # Its gradient stays a view of (B, C) numbers; that of x.mean is as large as the map, and that of a sum of another
    # type than the map's. The sum of float16 could exceed its range.
    wide = torch.float32 if x.dtype == torch.float16 else x.dtype
    return (x.sum((2, 3), dtype=wide) / (x.shape[2] * x.shape[3])).to(x.dtype)


def _perceptron(in_channels: int, num_experts: int, hidden: float) -> nn.Module:
    check_count("num_experts", num_experts)
    if not isinstance(hidden, (int, float)) or not 0 <= hidden < math.inf:
        raise ValueError(f"hidden={hidden!r} must be a finite number, 0 or more")
    if hidden == 0:
        return nn.Linear(in_channels, num_experts)
    units = max(1, round(hidden * in_channels))
    return nn.Sequential(nn.Linear(in_channels, units), nn.ReLU(), nn.Linear(units, num_experts))


def _logits(x: Tensor, perceptron: Callable[[Tensor], Tensor], router: nn.Module) -> Tensor:
    """Apply a router's perceptron to a pooled feature map; what it gives is at least float32.

    Under autocast it computes in its weights' type: its products are so small that to cast these takes longer than it
    saves.
    """
    features, device = pooled(x), x.device.type
    if autocasts(device) and (weight := next(router.parameters(), features)).is_floating_point():  # not quantized
        with torch.autocast(device, enabled=False):
            logits = perceptron(features.to(weight.dtype))
    else:
        logits = perceptron(features)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _zero_last_weight_(fc: nn.Module) -> Tensor:
    """Make a perceptron's output the same for every input, and give it."""
    last: Any = fc if isinstance(fc, nn.Linear) else fc[-1]  # type: ignore[index]
    nn.init.zeros_(last.weight)
    return last.bias.detach()


class SoftmaxAttention(nn.Module):
    """Dynamic Convolution's attention, ``softmax(FC(ReLU(FC(GAP(x)))) / temperature)`` (arXiv 1912.03458).

    Args:
        in_channels: channels of the feature map.
        num_kernels: K.
        reduction: the hidden layer has ``in_channels / reduction`` units, rounded, at least 1.
        temperature: above 0; large values spread the attention evenly, 1 is the plain softmax.

    Shape:
        ``(B, in_channels, H, W)`` to ``(B, K)``, rows that sum to one, at least float32 also under autocast.

    Raises:
        ValueError: a count below 1, or a temperature that is not above 0.

    Example:
        >>> SoftmaxAttention(4, 3)(torch.randn(2, 4, 7, 6)).shape
        torch.Size([2, 3])
    """

    temperature: Tensor

    def __init__(self, in_channels: int, num_kernels: int, reduction: float = 4, temperature: float = 30.0) -> None:
        super().__init__()
        check_count("num_kernels", num_kernels)
        if not isinstance(reduction, (int, float)) or not 1 <= reduction < math.inf:
            raise ValueError(f"reduction={reduction!r} must be at least 1")
        hidden = max(1, round(in_channels / reduction))
        self.fc1 = nn.Linear(in_channels, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, num_kernels)
        self.register_buffer("temperature", torch.ones(()))
        self.set_temperature(temperature)

    def forward(self, x: Tensor) -> Tensor:
        """Give the routing weights of each sample."""
        logits = _logits(x, lambda features: self.fc2(torch.relu(self.fc1(features))), self)
        return torch.softmax(logits / self.temperature, dim=1)

    def set_temperature(self, value: float) -> None:
        """Set the softmax temperature.

        Raises:
            ValueError: the value is not a finite number above 0.
        """
        check_temperature(value)
        self.temperature.fill_(value)

    def extra_repr(self) -> str:
        """Describe the layer inside its name."""
        return "" if self.temperature.is_meta else f"temperature={self.temperature.item():g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SoftmaxAttention":
        # The temperature follows to another device, but stays in float32 when the layer becomes bfloat16.
        temperature = self.temperature
        super()._apply(fn, recurse)
        if not temperature.is_meta:
            self.temperature = temperature.to(self.temperature.device)
        return self


def check_temperature(value: float, name: str = "temperature") -> None:
    """Check a softmax temperature.

    Raises:
        ValueError: the value is not a finite number above 0.
    """
    if not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{name}={value!r} must be a finite number above 0 (1 is the plain softmax)")


def named_routers(model: nn.Module) -> dict[str, nn.Module]:
    """Find the routers of every Routed layer.

    Args:
        model: any module.

    Returns:
        Routers by the name of their layer; a layer that has several gives ``layer.router``, and layers that share one
        give the same.
    """
    # Of a SharedRouter, the one that runs.
    return {name: getattr(router, "source", router) for name, router in _own_routers(model)}


def _own_routers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Give the routers as the layers have them, which may be SharedRouters."""
    for name, layer in named_layers(model, Routed):
        routers = layer.routers()
        for key, router in routers.items():
            yield name if name and len(routers) == 1 else f"{name}.{key}".lstrip("."), router


@contextmanager
def watch(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Read routing weights while the model runs.

    Args:
        model: any module; its Routed layers are watched. A compiled model runs uncompiled inside the context, because
            a compiled one silently skips hooks that were added after its first call.

    Yields:
        A dict that holds, after each forward pass, the latest routing weights ``(B, K)`` by layer name, detached, in
        the order in which the layers first ran.

    Example:
        >>> router = SoftmaxAttention(4, 3)
        >>> class Layer(nn.Module):  # any module with this method takes part
        ...     def routers(self):
        ...         return {"router": router}
        >>> with watch(nn.Sequential(Layer())) as routing:
        ...     _ = router(torch.randn(2, 4, 7, 6))
        >>> routing["0"].shape
        torch.Size([2, 3])
    """
    weights: dict[str, Tensor] = {}

    def record(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(router: nn.Module, args: object, output: Tensor) -> None:
            weights[name] = output.detach()

        return hook

    with _hooked([(router, record(name)) for name, router in _own_routers(model)]):
        yield weights


@contextmanager
def aggregation(model: nn.Module, mode: str, generator: Generator | None = None) -> Iterator[None]:
    """Replace the routing weights of every Routed layer while the model runs.

    Args:
        model: any module.
        mode: ``"attention"`` leaves the weights as they are; ``"average"`` gives each kernel the sample's mean (for
            softmax 1/K); ``"max"`` moves all of the sample's mass to its largest kernel; ``"shuffle_per_image"``
            permutes each sample's weights over the kernels; ``"shuffle_across_images"`` takes another image's weights,
            by a permutation of the batch without fixed points, drawn anew at each layer.
        generator: a CPU generator that the shuffles draw from; None starts one with seed 0.

    Raises:
        ValueError: the mode does not exist; while the model runs, ``shuffle_across_images`` on a batch of one.
    """
    check_mode(mode)
    source = generator or Generator().manual_seed(0)

    def random(shape: Sequence[int]) -> Tensor:
        return torch.rand(shape, generator=source)

    with replaced(model, lambda layer, x, weights: AGGREGATIONS[mode](weights, random)):
        yield


def check_mode(mode: str) -> None:
    """Check the name of an aggregation mode.

    Raises:
        ValueError: there is none of that name.
    """
    if mode not in AGGREGATIONS:
        raise ValueError(f"mode={mode!r} does not exist, choose one of {list(AGGREGATIONS)}")


@contextmanager
def replaced(model: nn.Module, change: Callable[[str, Tensor | None, Tensor], Tensor]) -> Iterator[None]:
    """Replace the routing weights of every Routed layer while the model runs.

    Args:
        model: any module. A compiled one runs uncompiled inside the context, as with ``watch``.
        change: gives what routing weights become, from the name of their layer (of those that share a router, the
            first), the router's first positional argument, mostly ``(B, C, H, W)``, and the weights ``(B, K)``.
    """

    def hooked(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        return lambda router, inputs, output: change(name, next(iter(inputs), None), output)

    # A router that several layers share is hooked once, or its weights would be shuffled twice.
    routers: dict[int, tuple[nn.Module, Any]] = {}
    for name, router in named_routers(model).items():
        routers.setdefault(id(router), (router, hooked(name)))
    # They come before the hooks of those who share the router, so that they get what it becomes.
    with _hooked(routers.values(), prepend=True):
        yield


# Gives a tensor of this shape on the CPU, drawn evenly from [0, 1).
Random = Callable[[Sequence[int]], Tensor]


def _average(weights: Tensor, random: Random) -> Tensor:
    return weights.mean(1, keepdim=True).expand_as(weights)


def _max(weights: Tensor, random: Random) -> Tensor:
    return torch.zeros_like(weights).scatter(1, weights.argmax(1, keepdim=True), weights.sum(1, keepdim=True))


def _shuffle_per_image(weights: Tensor, random: Random) -> Tensor:
    return weights.gather(1, random(weights.shape).argsort(1).to(weights.device))


def _shuffle_across_images(weights: Tensor, random: Random) -> Tensor:
    batch = weights.shape[0]
    if batch == 1:
        raise ValueError("mode='shuffle_across_images' needs at least 2 images in a batch, this one has 1")
    # A random cycle through the batch: no image keeps its own weights.
    cycle = random((batch,)).argsort()
    other = torch.empty_like(cycle)
    other[cycle] = cycle.roll(1)
    return weights[other.to(weights.device)]


AGGREGATIONS: dict[str, Callable[[Tensor, Random], Tensor]] = {
    "attention": lambda weights, random: weights,
    "average": _average,
    "max": _max,
    "shuffle_per_image": _shuffle_per_image,
    "shuffle_across_images": _shuffle_across_images,
}


class _Eager:
    """Runs compiled models uncompiled while at least one is inside, in whatever order they leave.

    ``torch.compiler.set_stance`` alone restores what it found, which is wrong if the first to come is the first to go.
    """

    def __init__(self) -> None:
        self.inside = 0
        self.stance = ExitStack()

    @contextmanager
    def __call__(self) -> Iterator[None]:
        if self.inside == 0:
            self.stance.enter_context(torch.compiler.set_stance("force_eager"))
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1
            if self.inside == 0:
                self.stance.close()


_eager = _Eager()


@contextmanager
def _hooked(hooks: Iterable[tuple[nn.Module, Any]], prepend: bool = False) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(_eager())
        for router, hook in hooks:
            stack.callback(router.register_forward_hook(hook, prepend=prepend).remove)
        yield
