"""Which convolutions of a network each paper replaces, and why the others are left."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dyn_lightning.checks import check_globs, matches
from dyn_lightning.conv2d import SAME_PADDED
from dyn_lightning.layers import (
    CONVS,
    CompConv2d,
    CondConv2d,
    DGConv2d,
    DOConv2d,
    DynamicConv2d,
    GhostConv2d,
    Involution2d,
    SelfCalibratedConv2d,
    SplitAttentionConv2d,
)
from dyn_lightning.protocols import Routed

Predicate = Callable[[str, nn.Conv2d], bool]
Selection = str | Iterable[str] | Predicate

FIRST = "the first convolution"
SHORTCUT = "projection of a shortcut"
SQUEEZE = "squeeze-and-excitation"
POINTWISE = "1x1"
DEPTHWISE = "depthwise"
GROUPED = "grouped"
CHANNELS = "changes the number of channels"
NO_NORM = "no batch norm and ReLU behind it"


@dataclass(frozen=True)
class Rule:
    """How a paper replaces convolutions: which it leaves, and what it does beside."""

    leaves: tuple[str, ...] = (FIRST, SHORTCUT, SQUEEZE)
    arguments: Mapping[str, Any] = field(default_factory=dict)  # in the place of the convolution's
    options: Mapping[str, Any] = field(default_factory=dict)  # of the layer, unless the user says otherwise
    takes_norm: bool = False  # the layer contains the batch norm that follows


RULES: dict[Any, Rule] = {
    CompConv2d: Rule((FIRST, POINTWISE, GROUPED)),
    CondConv2d: Rule(),
    DGConv2d: Rule((FIRST, POINTWISE, DEPTHWISE), arguments={"groups": 1}),  # which it learns
    DOConv2d: Rule((POINTWISE,)),
    DynamicConv2d: Rule(),
    GhostConv2d: Rule((FIRST, SQUEEZE, DEPTHWISE)),
    Involution2d: Rule((FIRST, POINTWISE, DEPTHWISE, CHANNELS), arguments={"groups": 1}, options={"kernel_size": 7}),
    SelfCalibratedConv2d: Rule((FIRST, POINTWISE, DEPTHWISE)),
    SplitAttentionConv2d: Rule((FIRST, POINTWISE, DEPTHWISE), takes_norm=True),
}

# A 1x1 convolution with one of these in its name projects a shortcut (torchvision, timm, and the usual copies).
SHORTCUTS = ("downsample", "shortcut", "skip", "proj")
# The 1x1 convolutions inside these see one pixel and belong to an attention of their own (torchvision, timm).
SQUEEZE_EXCITATIONS = (
    "SqueezeExcitation",
    "SqueezeExcite",
    "SEModule",
    "EffectiveSEModule",
    "ChannelAttn",
    "SelectiveKernelAttn",
)
# What convert put in, or a user's own routed layer: convolutions inside are theirs.
REPLACED: Any = (Routed, *(layer for layer in CONVS.values() if layer is not nn.Conv2d))


def find_convolutions(model: nn.Module) -> dict[str, nn.Conv2d]:
    """List the network's convolutions by every name, without those inside layers that were replaced before."""
    found: dict[str, nn.Conv2d] = {}
    inside: str | None = None
    for name, module in model.named_modules(remove_duplicate=False):
        if inside is not None and name.startswith(inside):
            continue
        inside = f"{name}." if name and isinstance(module, REPLACED) else None
        if isinstance(module, nn.Conv2d) and name:
            found[name] = module
    return found


def first_convolution(model: nn.Module) -> str:
    """Name the network's first convolution; empty if there is none, or it was replaced before."""
    for name, module in model.named_modules():
        if name and isinstance(module, (nn.Conv2d, *REPLACED)):
            return name if isinstance(module, nn.Conv2d) else ""
    return ""


def reasons_to_leave(
    model: nn.Module,
    convolutions: Mapping[str, nn.Conv2d],
    rule: Rule,
    include: Selection | None,
    exclude: Selection | None,
) -> dict[str, str]:
    """Say of each convolution why it is left; nothing where it is to be replaced.

    Raises:
        ValueError: a glob matches no convolution.
    """
    chosen, spared = _as_selection(include), _as_selection(exclude)
    for argument, selection in (("include", chosen), ("exclude", spared)):
        if isinstance(selection, list):
            check_globs(argument, selection, convolutions, "convolution")
    first = first_convolution(model)
    return {
        name: _reason(name, conv, model, rule.leaves, name == first, chosen, spared)
        for name, conv in convolutions.items()
    }


def _reason(
    name: str,
    conv: nn.Conv2d,
    model: nn.Module,
    leaves: tuple[str, ...],
    is_first: bool,
    include: list[str] | Predicate | None,
    exclude: list[str] | Predicate | None,
) -> str:
    if type(conv) is not nn.Conv2d and type(conv).__name__ != SAME_PADDED:
        return f"{type(conv).__name__} is a subclass of Conv2d and does something of its own"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}"
    if conv._forward_hooks or conv._forward_pre_hooks:
        return "has forward hooks (weight norm, pruning, or your own), which would be lost"
    parent = type(model.get_submodule(name.rpartition(".")[0])).__name__
    pointwise = conv.kernel_size == (1, 1)
    kinds = {
        FIRST: is_first,
        SHORTCUT: pointwise and bool(set(name.split(".")) & set(SHORTCUTS)),
        SQUEEZE: parent in SQUEEZE_EXCITATIONS,
        DEPTHWISE: 1 < conv.groups == conv.in_channels,
        GROUPED: conv.groups > 1,
        POINTWISE: pointwise,
        CHANNELS: conv.in_channels != conv.out_channels,
    }
    if include is None:
        for kind in leaves:
            if kinds[kind]:
                return kind
    elif not _matches(name, conv, include):
        return "not in include"
    elif kinds[SQUEEZE] and not callable(include) and name not in include:
        return SQUEEZE
    return "in exclude" if exclude is not None and _matches(name, conv, exclude) else ""


def _as_selection(selection: Selection | None) -> list[str] | Predicate | None:
    if selection is None or callable(selection):
        return selection
    return [selection] if isinstance(selection, str) else list(selection)


def _matches(name: str, conv: nn.Conv2d, selection: list[str] | Predicate) -> bool:
    return selection(name, conv) if callable(selection) else matches(name, selection)
