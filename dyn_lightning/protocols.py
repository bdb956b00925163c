"""How tools find layers without knowing them: protocols of one method each; a layer takes part by having the method."""

import re
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn


@runtime_checkable
class Routed(Protocol):
    """A layer that weighs its kernels by the input."""

    def routers(self) -> dict[str, nn.Module]:
        """Give, by name, the submodules whose forward returns routing weights ``(B, K)``."""


@runtime_checkable
class Annealed(Protocol):
    """A layer with a softmax temperature."""

    def set_temperature(self, value: float) -> None:
        """Set the temperature, kept in a float32 buffer so that it travels with the checkpoint."""


@runtime_checkable
class Grouped(Protocol):
    """A layer that learns which channels are connected."""

    def membership(self) -> Tensor:
        """Give a binary ``(C_out, C_in)``: which channel pairs are connected."""


@runtime_checkable
class Foldable(Protocol):
    """A layer with an exact static form."""

    def fold(self) -> nn.Module:
        """Give the exact static form for inference."""


def named_layers(model: nn.Module, protocol: type) -> Iterator[tuple[str, Any]]:
    """Find the layers of a model that have a protocol's method, by the names they have without ``torch.compile``."""
    for path, layer in model.named_modules():
        compiled = "_orig_mod" in layer._modules  # torch.compile's shell around the layer
        if isinstance(layer, protocol) and not compiled:
            yield re.sub(r"(^|\.)_orig_mod(?=\.|$)", "", path).lstrip("."), layer
