"""Which layers of a network share a router, or feed the next one: CondConv's ablation of routing functions."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from dyn_lightning.protocols import Routed
from dyn_lightning.routing import HierarchicalRouter, Router, SharedRouter, as_router

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class Sharing:
    """Gives new layers, made in the order in which they run, their routers.

    Args:
        model: the network.
        names: of its convolutions, in the order in which they run, without those of a squeeze-and-excitation.
        share: a name in ``SHARES``: what the layers that share a router have in common.
        hierarchical: whether each router sees the routing weights of the one before.
        router: the routing function, a name in ``ROUTERS`` or a callable.

    Raises:
        ValueError: an unknown ``share``.
    """

    def __init__(
        self, model: nn.Module, names: list[str], share: str, hierarchical: bool, router: str | Router
    ) -> None:
        if share not in SHARES:
            raise ValueError(f"share={share!r} must be one of {list(SHARES)}")
        self.share, self.hierarchical, self.router = share, hierarchical, router
        self.scopes = SHARES[share](model, names)
        self.shared: dict[str, SharedRouter] = {}  # by scope
        self.previous: nn.Module | None = None
        self.takers: list[SharedRouter | HierarchicalRouter] = []  # of the weights of another layer
        self.followers = 0

    def options(self, name: str) -> dict[str, Any]:
        """Give the options of the next layer: a router that others have, one that sees the one before, or nothing."""
        scope = self.scopes.get(name, name)
        if scope in self.shared:
            shared = self.shared[scope]
            return {"router": lambda in_channels, num_experts: shared}
        if self.hierarchical and self.previous is not None:
            return {"router": partial(HierarchicalRouter, previous=self.previous, make=as_router(self.router))}
        return {}

    def made(self, name: str, layer: nn.Module) -> None:
        """Remember the router of a layer that was made with ``options``.

        Raises:
            ValueError: the layer has no router that could be shared.
        """
        if self.share == "layer" and not self.hierarchical:
            return
        takes_router = "router" in inspect.signature(type(layer)).parameters
        if not takes_router or not isinstance(layer, Routed) or list(layer.routers()) != ["router"]:
            raise ValueError(
                "share and hierarchical need a layer with one router, given by the option `router`, as CondConv2d has; "
                f"{type(layer).__name__} has not"
            )
        router, scope = layer.routers()["router"], self.scopes.get(name, name)
        if isinstance(router, (SharedRouter, HierarchicalRouter)) and router not in self.takers:
            self.takers.append(router)
        if scope not in self.shared:
            self.previous, self.shared[scope] = router, SharedRouter(router)
        elif router is self.shared[scope]:
            self.followers += 1

    def finish(self) -> "_NewPass | None":
        """Give what has to run before each forward pass of the model, when all layers are made.

        Raises:
            ValueError: no two layers share a router, though it was asked for.
        """
        if self.share != "layer" and not self.followers:
            raise ValueError(
                f"share={self.share!r} would share no router: no two of the replaced layers are in one {self.share}; "
                "use share='layer', or 'model'"
            )
        return _NewPass(self.takers) if self.takers else None


class _NewPass:
    """A forward pre-hook of the model: weights of an earlier pass are none of this one."""

    def __init__(self, takers: list[SharedRouter | HierarchicalRouter]) -> None:
        self.takers = takers

    def __call__(self, model: nn.Module, args: object) -> None:
        for taker in self.takers:
            taker.latest.forget()


def _model(model: nn.Module, names: list[str]) -> dict[str, str]:
    return dict.fromkeys(names, "")


def _blocks(model: nn.Module, names: list[str], least: int = 2) -> dict[str, str]:
    """Name for each convolution the innermost module that holds several and is no container, where there is one."""
    blocks = {}
    for name in names:
        parent = name
        while parent := parent.rpartition(".")[0]:
            count = sum(other.startswith(f"{parent}.") for other in names)
            if count >= least and not isinstance(model.get_submodule(parent), CONTAINERS):
                blocks[name] = parent
                break
    return blocks


def _stages(model: nn.Module, names: list[str]) -> dict[str, str]:
    """Name for each convolution in a block the first block of its stage: of one container, up to the next stride."""
    blocks = {**_blocks(model, names, least=1), **_blocks(model, names)}  # one is enough where none has several
    convs: dict[str, Any] = {name: model.get_submodule(name) for name in blocks}
    strided = {block for name, block in blocks.items() if max(convs[name].stride) > 1}
    stages: dict[str, str] = {}
    stage, container = "", None
    for block in dict.fromkeys(blocks.values()):
        if block in strided or block.rpartition(".")[0] != container:
            stage, container = block, block.rpartition(".")[0]
        stages[block] = stage
    return {name: stages[block] for name, block in blocks.items()}


# For each convolution the name of its scope; without one, it is a scope of its own.
SHARES: dict[str, Callable[[nn.Module, list[str]], dict[str, str]]] = {
    "layer": lambda model, names: {},
    "block": _blocks,
    "stage": _stages,
    "model": _model,
}
