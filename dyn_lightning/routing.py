"""Routers, which turn a feature map into routing weights ``(B, K)``, and the two ways to reach them from outside:
``watch`` reads their outputs, ``aggregation`` changes them.
"""

import math
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Generator, Tensor, nn

from dyn_lightning.functional import check_count
from dyn_lightning.protocols import Routed


class SigmoidRouter(nn.Module):
    """CondConv's routing function, ``sigmoid(GAP(x) R)`` (arXiv 1904.04971); the weights need not sum to one.

    Args:
        in_channels: channels of the feature map.
        num_experts: K.

    Shape:
        ``(B, in_channels, H, W)`` to ``(B, K)``, each in (0, 1), at least float32.

    Example:
        >>> SigmoidRouter(4, 3)(torch.randn(2, 4, 7, 6)).shape
        torch.Size([2, 3])
    """

    def __init__(self, in_channels: int, num_experts: int) -> None:
        super().__init__()
        check_count("num_experts", num_experts)
        self.fc = nn.Linear(in_channels, num_experts)

    def forward(self, x: Tensor) -> Tensor:
        """Give the routing weights of each sample."""
        return torch.sigmoid(_at_least_float32(self.fc(x.mean((2, 3)))))


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
        logits = self.fc2(torch.relu(self.fc1(x.mean((2, 3)))))
        return torch.softmax(_at_least_float32(logits) / self.temperature, dim=1)

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
        Routers by the name of their layer; a layer that has several gives ``layer.router``.
    """
    found = {}
    for path, layer in model.named_modules():
        compiled = "_orig_mod" in layer._modules  # torch.compile's shell around the layer
        if isinstance(layer, Routed) and not compiled:
            name = re.sub(r"(^|\.)_orig_mod(?=\.|$)", "", path).lstrip(".")
            routers = layer.routers()
            for key, router in routers.items():
                found[name if name and len(routers) == 1 else f"{name}.{key}".lstrip(".")] = router
    return found


@contextmanager
def watch(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Read routing weights while the model runs.

    Args:
        model: any module; its Routed layers are watched. A compiled model runs uncompiled inside the context, because
            a compiled one silently skips hooks that were added after its first call.

    Yields:
        A dict that holds, after each forward pass, the latest routing weights ``(B, K)`` by layer name, detached.

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

    with _hooked({name: (router, record(name)) for name, router in named_routers(model).items()}):
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
    if mode not in AGGREGATIONS:
        raise ValueError(f"mode={mode!r} does not exist, choose one of {list(AGGREGATIONS)}")
    generator = generator or Generator().manual_seed(0)

    def hook(router: nn.Module, args: object, output: Tensor) -> Tensor:
        return AGGREGATIONS[mode](output, generator)

    # A router that several layers share is hooked once, or its weights would be shuffled twice.
    routers = {id(router): router for router in named_routers(model).values()}
    with _hooked({name: (router, hook) for name, router in routers.items()}):
        yield


def _average(weights: Tensor, generator: Generator) -> Tensor:
    return weights.mean(1, keepdim=True).expand_as(weights)


def _max(weights: Tensor, generator: Generator) -> Tensor:
    return torch.zeros_like(weights).scatter(1, weights.argmax(1, keepdim=True), weights.sum(1, keepdim=True))


def _shuffle_per_image(weights: Tensor, generator: Generator) -> Tensor:
    order = torch.rand(weights.shape, generator=generator).argsort(1)
    return weights.gather(1, order.to(weights.device))


def _shuffle_across_images(weights: Tensor, generator: Generator) -> Tensor:
    batch = weights.shape[0]
    if batch == 1:
        raise ValueError("mode='shuffle_across_images' needs at least 2 images in a batch, this one has 1")
    # A random cycle through the batch: no image keeps its own weights.
    cycle = torch.randperm(batch, generator=generator)
    other = torch.empty_like(cycle)
    other[cycle] = cycle.roll(1)
    return weights[other.to(weights.device)]


AGGREGATIONS: dict[str, Callable[[Tensor, Generator], Tensor]] = {
    "attention": lambda weights, generator: weights,
    "average": _average,
    "max": _max,
    "shuffle_per_image": _shuffle_per_image,
    "shuffle_across_images": _shuffle_across_images,
}


@contextmanager
def _hooked(hooks: dict) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for router, hook in hooks.values():
            stack.callback(router.register_forward_hook(hook).remove)
        yield


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
