"""Layers that share a router, or feed the next one: CondConv's ablation of routing functions, arXiv 1904.04971."""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from dyn_lightning.protocols import Routed
from dyn_lightning.routing import Router, SigmoidRouter, as_router, pooled

CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


class SharedRouter(nn.Module):
    """Stands in a layer for the router of an earlier layer, and gives the weights that this one gave last.

    The router itself runs, is saved and is counted once, in its own layer. ``aggregation`` changes the weights through
    ``source``; a forward hook of your own that changes the router's output needs ``prepend=True`` to reach those who
    share. Activation checkpointing may recompute layers that share a router; where it could take the weights
    of another forward pass, it is refused.

    Args:
        router: of the earlier layer.

    Raises:
        RuntimeError: in ``forward``, when the other layer has not run before, or as said above.
    """

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.latest = _Latest(router)

    @property
    def source(self) -> nn.Module:
        """The router that runs."""
        return self.latest.router

    def forward(self, x: Tensor) -> Tensor:
        """Give the routing weights of each sample."""
        return self.latest.weights()

    def constant_(self) -> Tensor:
        """Make the weights of the shared router the same for every image, and give them, ``(K,)``."""
        source: Any = self.source
        return source.constant_()


class HierarchicalRouter(nn.Module):
    """A router that also sees the routing weights of the layer before, ``r([GAP(x), alpha])``.

    Args:
        in_channels: channels of the feature map.
        num_experts: K.
        previous: the router of the layer before, of as many experts.
        make: the routing function, which gets ``in_channels + K`` numbers.

    Shape:
        ``(B, in_channels, H, W)`` to ``(B, K)``.

    Raises:
        RuntimeError: in ``forward``, when the layer before has not run, or as for ``SharedRouter``.
    """

    def __init__(self, in_channels: int, num_experts: int, previous: nn.Module, make: Router = SigmoidRouter) -> None:
        super().__init__()
        self.router = make(in_channels + num_experts, num_experts)
        self.latest = _Latest(previous)

    def forward(self, x: Tensor) -> Tensor:
        """Give the routing weights of each sample."""
        features = pooled(x)
        return self.router(torch.cat([features, self.latest.weights().to(features.dtype)], 1))

    def constant_(self) -> Tensor:
        """Make the weights the same for every image, and give them, ``(K,)``."""
        router: Any = self.router
        return router.constant_()


class _Latest:
    """The routing weights that a router gave last.

    It is no module, so that the router is not part of those who ask; copies and pickles begin without weights. They are
    kept until the next forward pass, as activation checkpointing recomputes layers in the backward pass. Then they must
    be those of the pass that is recomputed: each pass with gradients has a token that lives as long as its graph.
    """

    router: nn.Module
    _weights: Tensor | None
    _pass: "_Pass | None"  # the latest; None is one without gradients
    _passes: "WeakSet[_Pass]"  # those whose graph lives
    _recomputed: int | None  # the number of the backward pass that recomputed the weights

    def __init__(self, router: nn.Module) -> None:
        self.__setstate__({"router": router})
        router.register_forward_hook(self._keep)

    def weights(self) -> Tensor:
        """Give them, as they were in the forward pass that asks."""
        if self._weights is None:
            raise RuntimeError(
                "the layer takes the routing weights of an earlier layer, which has not run before it: run the whole "
                "model, or choose another share (or hierarchical=False) in convert"
            )
        backward = _backward_pass()
        if backward is not None and backward != self._recomputed and not self._is_certain():
            raise RuntimeError(
                "activation checkpointing recomputes a layer that takes the routing weights of an earlier layer, and "
                "they may be those of another forward pass, or lack their gradient: checkpoint these layers together, "
                "or use use_reentrant=False and call backward before the next forward pass"
            )
        return self._weights

    def forget(self) -> None:
        """Begin a forward pass."""
        self._weights = None

    def _is_certain(self) -> bool:
        """Say whether a backward pass without these weights' router can only be that of the latest forward pass."""
        others = set(self._passes) - {self._pass}
        if self._pass is None or self._pass not in self._passes:
            return False
        return not others if self._pass.is_over else all(other.is_over for other in others)

    def _keep(self, router: nn.Module, args: object, weights: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            if torch.is_grad_enabled() and not weights.requires_grad:
                weights = weights + _ANCHOR  # all is frozen up to here, but the graph has to hold the pass
            self._recomputed = _backward_pass()
            if self._recomputed is None:
                self._pass = self._new_pass(weights) if weights.requires_grad else None
        self._weights = weights
        return weights

    def _new_pass(self, weights: Tensor) -> "_Pass":
        one = _Pass()
        self._passes.add(one)
        weights.register_hook(partial(self._release, one))
        return one

    def _release(self, one: "_Pass", gradient: Tensor) -> None:
        one.is_over = True
        if self._weights is not None and one is self._pass:
            self._weights = self._weights.detach()  # lets go of the graph

    def __getstate__(self) -> dict[str, Any]:
        return {"router": self.router}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.router = state["router"]
        self._weights = self._pass = self._recomputed = None
        self._passes = WeakSet()


class _Pass:
    is_over = False  # whether its backward pass has reached the router


_ANCHOR = torch.zeros((), requires_grad=True)


def _backward_pass() -> int | None:
    """Number the backward pass in which this runs, that is, recomputes; None outside of one."""
    if torch.compiler.is_compiling():
        return None
    number = torch._C._current_graph_task_id()
    return None if number == -1 else number


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
