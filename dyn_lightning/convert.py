"""convert(): replaces the convolutions of any network by a layer from a paper, and reports what it did."""

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from dyn_lightning.functional import conv2d_arguments
from dyn_lightning.layers import CONVS
from dyn_lightning.protocols import Routed

Predicate = Callable[[str, nn.Conv2d], bool]
Selection = str | Iterable[str] | Predicate

# A 1x1 convolution with one of these in its name projects a shortcut (torchvision, timm, and the usual copies).
SHORTCUTS = ("downsample", "shortcut", "skip", "proj")
# The 1x1 convolutions inside these see one pixel and belong to an attention of their own (torchvision, timm).
SQUEEZE_EXCITATIONS = ("SqueezeExcitation", "SqueezeExcite", "SEModule", "EffectiveSEModule")


@dataclass(frozen=True)
class Conversion:
    """What became of one convolution: ``reason`` says why it was left, and is empty where it was replaced.

    A convolution that has several names has its parameters counted with the first.
    """

    name: str
    before: str
    after: str
    parameters_before: int
    parameters_after: int
    reason: str = ""


@dataclass
class ConversionReport:
    """What ``convert`` did, a row a convolution; ``print`` shows it as a table."""

    rows: list[Conversion] = field(default_factory=list)

    @property
    def replaced(self) -> list[str]:
        """Names of the layers that were replaced."""
        return [row.name for row in self.rows if not row.reason]

    @property
    def left(self) -> dict[str, str]:
        """Names of the convolutions that were left, and why."""
        return {row.name: row.reason for row in self.rows if row.reason}

    def summary(self) -> str:
        """Say in one line how many were replaced, and the parameters of all convolutions before and after."""
        before, after = (sum(getattr(row, f"parameters_{when}") for row in self.rows) for when in ("before", "after"))
        return (
            f"{len(self.replaced)} of {len(self.rows)} convolutions replaced; "
            f"parameters in convolutions {before:,} -> {after:,}"
        )

    def __str__(self) -> str:
        table = [("name", "before", "after", "parameters")]
        for row in self.rows:
            after = (row.reason and f"left: {row.reason}") or row.after
            table.append((row.name, row.before, after, f"{row.parameters_before:,} -> {row.parameters_after:,}"))
        widths = [max(len(line[column]) for line in table) for column in range(4)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        return "\n".join([*(line.rstrip() for line in lines), self.summary()])


def convert(
    model: nn.Module,
    conv: str | Callable[..., nn.Module],
    *,
    include: Selection | None = None,
    exclude: Selection | None = None,
    upcycle: bool = False,
    **options: Any,
) -> ConversionReport:
    """Replace convolutions of a network, in place.

    Without ``include``, every ``nn.Conv2d`` is replaced but the first, the 1x1 projections of shortcuts and what is in
    a squeeze-and-excitation: the papers of CondConv and Dynamic Convolution leave these static. A subclass of
    ``nn.Conv2d`` (one that pads by itself, standardises its weight, ...) and a padding mode other than zeros are always
    left, since the new layer would not do the same.

    Args:
        model: any module, changed in place.
        conv: a name in ``CONVS``, or a callable with ``nn.Conv2d``'s signature.
        include: which convolutions to replace, in place of the rule above: globs over module names
            (``"layer3.*"`` or a list of them), or a predicate ``(name, conv) -> bool``.
        exclude: which of those to leave, given likewise.
        upcycle: start from the network's weights, by ``conv.from_conv``, so that a trained network's output is kept.
        options: the layer's own, as ``num_kernels=4``.

    Returns:
        A row for each convolution: name, before and after, parameters, or why it was left.

    Raises:
        ValueError: ``conv`` is no name that exists, a glob matches no convolution, nothing would be replaced, or the
            layer refuses its arguments.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        >>> print(convert(model, "dynamic", num_kernels=4))
        name  before               after                        parameters
        0     Conv2d(3, 8, k=3x3)  left: the first convolution  224 -> 224
        2     Conv2d(8, 8, k=3x3)  DynamicConv2d(8, 8, k=3x3)   584 -> 2,364
        1 of 2 convolutions replaced; parameters in convolutions 808 -> 2,588
    """
    make = _maker(conv, upcycle)
    convolutions = _find(model)
    if not convolutions:
        raise ValueError(f"{type(model).__name__} has no nn.Conv2d to replace")
    include, exclude = _as_selection(include), _as_selection(exclude)
    _check_globs("include", include, convolutions)
    _check_globs("exclude", exclude, convolutions)

    report, made, seen = ConversionReport(), dict[int, nn.Module](), set[int]()
    first = next(iter(convolutions))
    for name, old in convolutions.items():
        reason = _reason(name, old, model, first, include, exclude)
        new: nn.Module = old
        if not reason:
            new = made[id(old)] if id(old) in made else made.setdefault(id(old), _make(make, old, name, options))
        counts = (0, 0) if id(old) in seen else (_parameters(old), _parameters(new))
        seen.add(id(old))
        report.rows.append(Conversion(name, _shape(old), _shape(new), *counts, reason))
    if not made:
        raise ValueError(f"no convolution would be replaced: {report.left}")
    # Only now, when every new layer could be built, is the network touched.
    for name, old in convolutions.items():
        if name in report.replaced:
            model.set_submodule(name, made[id(old)])
    return report


def resolve_conv(conv: str) -> Callable[..., nn.Module]:
    """Find a layer by its name in ``CONVS``.

    Raises:
        ValueError: there is none; the message lists the names and the nearest.
    """
    if conv not in CONVS:
        near = difflib.get_close_matches(conv, CONVS, n=1)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"conv={conv!r} does not exist{hint} (choose one of {sorted(CONVS)}, or pass a class)")
    return CONVS[conv]


def _maker(conv: str | Callable[..., nn.Module], upcycle: bool) -> Callable[..., nn.Module]:
    layer = resolve_conv(conv) if isinstance(conv, str) else conv
    if not upcycle:
        return lambda old, **options: layer(**conv2d_arguments(old), **options).to(old.weight)
    if not hasattr(layer, "from_conv"):
        raise ValueError(f"upcycle=True needs {getattr(layer, '__name__', layer)}.from_conv, which does not exist")
    return layer.from_conv


def _make(make: Callable[..., nn.Module], old: nn.Conv2d, name: str, options: dict[str, Any]) -> nn.Module:
    try:
        return make(old, **options).train(old.training)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{name} = {old}: {error}") from error


def _find(model: nn.Module) -> dict[str, nn.Conv2d]:
    """List the network's convolutions by every name, without those inside layers that were replaced before."""
    done: Any = (Routed, *(layer for layer in CONVS.values() if layer is not nn.Conv2d))
    found: dict[str, nn.Conv2d] = {}
    inside: str | None = None
    for name, module in model.named_modules(remove_duplicate=False):
        if inside is not None and name.startswith(inside):
            continue
        inside = f"{name}." if name and isinstance(module, done) else None
        if isinstance(module, nn.Conv2d) and name:
            found[name] = module
    return found


def _reason(
    name: str,
    conv: nn.Conv2d,
    model: nn.Module,
    first: str,
    include: list[str] | Predicate | None,
    exclude: list[str] | Predicate | None,
) -> str:
    """Say why a convolution is left, or nothing."""
    if type(conv) is not nn.Conv2d:
        return f"{type(conv).__name__} is a subclass of Conv2d and does something of its own"
    if conv.padding_mode != "zeros":
        return f"padding_mode={conv.padding_mode!r}"
    if include is not None:
        if not _matches(name, conv, include):
            return "not in include"
    elif name == first:
        return "the first convolution"
    elif conv.kernel_size == (1, 1) and set(name.split(".")) & set(SHORTCUTS):
        return "projection of a shortcut"
    elif type(model.get_submodule(name.rpartition(".")[0])).__name__ in SQUEEZE_EXCITATIONS:
        return "squeeze-and-excitation"
    return "in exclude" if exclude is not None and _matches(name, conv, exclude) else ""


def _as_selection(selection: Selection | None) -> list[str] | Predicate | None:
    if selection is None or callable(selection):
        return selection
    return [selection] if isinstance(selection, str) else list(selection)


def _matches(name: str, conv: nn.Conv2d, selection: list[str] | Predicate) -> bool:
    return selection(name, conv) if callable(selection) else any(fnmatchcase(name, glob) for glob in selection)


def _check_globs(argument: str, selection: list[str] | Predicate | None, convolutions: dict[str, nn.Conv2d]) -> None:
    for glob in selection if isinstance(selection, list) else []:
        if not any(fnmatchcase(name, glob) for name in convolutions):
            raise ValueError(f"{argument}={glob!r} matches no convolution; there are {', '.join(convolutions)}")


def _parameters(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _shape(layer: nn.Module) -> str:
    """Describe a layer in a table's cell: ``Conv2d(64, 64, k=3x3, s=2)``."""
    if not isinstance(getattr(layer, "kernel_size", None), tuple):
        return type(layer).__name__
    described: Any = layer
    text = f"{described.in_channels}, {described.out_channels}, k={'x'.join(map(str, described.kernel_size))}"
    for letter, value in (("s", described.stride), ("d", described.dilation)):
        if value != (1, 1):
            text += f", {letter}={value[0] if value[0] == value[1] else 'x'.join(map(str, value))}"
    if described.groups > 1:
        text += f", g={described.groups}"
    return f"{type(layer).__name__}({text})"
