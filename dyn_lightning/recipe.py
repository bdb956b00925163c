"""The recipe of a training: schedule, what decays, and the budget of connections."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from dyn_lightning.protocols import Grouped
from dyn_lightning.routing import named_routers


def warmup_cosine(step: int, warmup: float, total: float) -> float:
    """Give the learning rate's factor: linear to 1 over ``warmup`` steps, then half a cosine to 0 at step ``total``.

    Example:
        >>> [round(warmup_cosine(step, 2, 6), 3) for step in range(7)]
        [0.333, 0.667, 1.0, 0.854, 0.5, 0.146, 0.0]
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return (1 + math.cos(math.pi * min(1.0, (step - warmup) / max(1.0, total - warmup)))) / 2


def group_complexity(model: nn.Module, divisor: float) -> Tensor:
    """Count the connected pairs of channels in all Grouped layers, relative to the budget: all pairs / ``divisor``."""
    memberships = [layer.membership() for layer in model.modules() if isinstance(layer, Grouped)]
    pairs = sum(membership.numel() for membership in memberships)
    return torch.stack([membership.sum() for membership in memberships]).sum() * divisor / pairs


def over_budget(complexity: Tensor) -> Tensor:
    """Give the loss's factor: 1 within the budget, ``complexity ** 0.02`` above it (DGConv, arXiv 1908.05867).

    Example:
        >>> over_budget(torch.tensor([0.5, 1, 2]))
        tensor([1.0000, 1.0000, 1.0140])
    """
    return torch.where(complexity > 1, complexity**0.02, 1.0)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the trainable parameters into those that decay, and norms, biases, routers and gates, which do not.

    Args:
        model: any module; routers are found through the Routed protocol, norms and gates by having one axis at most.
        weight_decay: of the first group.
    """
    routers = {id(parameter) for router in named_routers(model).values() for parameter in router.parameters()}
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            free = parameter.ndim <= 1 or name.rpartition(".")[2] == "bias" or id(parameter) in routers
            (rest if free else decay).append(parameter)
    groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
