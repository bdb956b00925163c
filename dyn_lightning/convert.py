"""convert(): replaces the convolutions of any network by a layer from a paper, and reports what it did."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from dyn_lightning.conv2d import conv2d_arguments, with_kernel_size
from dyn_lightning.fold import norms_behind
from dyn_lightning.layers import CONVS, CondConv2d, CondLinear
from dyn_lightning.rules import NO_NORM, RULES, SQUEEZE, Rule, Selection, find_convolutions, reasons_to_leave
from dyn_lightning.sharing import Sharing

CLASSIFIERS: dict[Any, Any] = {CondConv2d: CondLinear}


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
    """What ``convert`` did, a row a convolution; ``print`` shows it as a table.

    Attributes:
        rows: what became of each convolution.
        methods: by a layer's name, how it computes its per-sample convolution; another column once it is filled, as by
            ``report.methods = cost.methods(model, (3, 224, 224))``.
    """

    rows: list[Conversion] = field(default_factory=list)
    methods: dict[str, str] = field(default_factory=dict)

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
        table = [("name", "before", "after", "parameters", "method" if self.methods else "")]
        for row in self.rows:
            after = (row.reason and f"left: {row.reason}") or row.after
            counts = f"{row.parameters_before:,} -> {row.parameters_after:,}"
            table.append((row.name, row.before, after, counts, self.methods.get(row.name, "")))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in table]
        return "\n".join([*(line.rstrip() for line in lines), self.summary()])


def convert(
    model: nn.Module,
    conv: str | Callable[..., nn.Module],
    *,
    include: Selection | None = None,
    exclude: Selection | None = None,
    upcycle: bool = False,
    share: str = "layer",
    hierarchical: bool = False,
    classifier: bool = False,
    **options: Any,
) -> ConversionReport:
    """Replace convolutions of a network, in place.

    Without ``include``, the paper's own rule says which (``RULES``): all but the first convolution, the 1x1 projections
    of shortcuts and what is in a squeeze-and-excitation (CondConv, Dynamic Convolution, and layers of your own); all
    but the first and depthwise ones (Ghost); those larger than 1x1 (DO-Conv), of these all but the first and depthwise
    ones (DGConv, self-calibrated, split attention; CompConv leaves all grouped ones) and only those that keep the
    number of channels (involution, with 7x7 kernels in the place of 3x3 unless ``kernel_size`` says otherwise). DGConv
    and involution have groups of their own in the place of a convolution's. Split attention takes the place of the
    batch norm behind it too, and only of convolutions with a batch norm and a ReLU behind them, as it contains both. By
    its rule, a convolution that the layer refuses is left. Always left are subclasses of ``nn.Conv2d``, padding modes
    other than zeros and convolutions with forward hooks, since the new layer would not do the same; of the subclasses
    timm's ``Conv2dSame`` is known and replaced where the layer has its padding.

    Args:
        model: any module, changed in place.
        conv: a name in ``CONVS``, or a callable with ``nn.Conv2d``'s signature.
        include: which convolutions to replace, in place of the rule above: globs over module names
            (``"layer3.*"`` or a list of them; what is in a squeeze-and-excitation has to be named in full), or a
            predicate ``(name, conv) -> bool``.
        exclude: which of those to leave, given likewise.
        upcycle: start from the network's weights, by ``conv.from_conv``, so that a trained network's output is kept by
            the layers that can (CondConv, Dynamic Convolution, DGConv, DO-Conv; the others say what they keep).
        share: ``"layer"`` gives each layer a router of its own, ``"block"``, ``"stage"`` and ``"model"`` one to all
            replaced layers there, which sees the input of the first of them (in the order of registration, which has to
            be that of running). A block is the innermost module around a layer that has several convolutions and is no
            container (``nn.Sequential``); a stage is blocks of one container up to the next one with a stride. Needs a
            layer with the option ``router``, as CondConv has.
        hierarchical: let each router also see the routing weights of the one before.
        classifier: replace the last ``nn.Linear`` too (by ``CondLinear``, for CondConv); with ``exclude="*"`` it alone.
        options: the layer's own, as ``num_kernels=4``, or arguments in the place of the convolution's, as
            ``kernel_size=5`` (the padding is adapted).

    Returns:
        A row for each convolution: name, before and after, parameters, or why it was left.

    Raises:
        ValueError: ``conv`` is no name that exists, a glob matches no convolution, nothing would be replaced or shared,
            or the layer refuses its arguments.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1))
        >>> print(convert(model, "dynamic", num_kernels=4))
        name  before               after                        parameters
        0     Conv2d(3, 8, k=3x3)  left: the first convolution  224 -> 224
        2     Conv2d(8, 8, k=3x3)  DynamicConv2d(8, 8, k=3x3)   584 -> 2,364
        1 of 2 convolutions replaced; parameters in convolutions 808 -> 2,588
    """
    layer = resolve_conv(conv) if isinstance(conv, str) else conv
    rule = RULES.get(layer, Rule())
    make = _maker(layer, rule, upcycle)
    convolutions = find_convolutions(model)
    if not convolutions:
        raise ValueError(f"{type(model).__name__} has no nn.Conv2d to replace")
    reasons = reasons_to_leave(model, convolutions, rule, include, exclude)
    behind = norms_behind(model, with_relu=True) if rule.takes_norm else {}
    if rule.takes_norm and include is None:
        reasons |= {name: NO_NORM for name, reason in reasons.items() if not reason and name not in behind}
    layers = [name for name, reason in reasons.items() if reason != SQUEEZE]
    sharing = Sharing(model, layers, share, hierarchical, options.get("router", "sigmoid"))
    made = _make_layers(make, convolutions, reasons, {**rule.options, **options}, sharing, by_rule=include is None)
    if not made and not classifier:
        raise ValueError(f"no convolution would be replaced: {reasons}")
    new_pass = sharing.finish()
    linears = _make_classifier(model, layer, upcycle, options) if classifier else {}

    # Only now, when every new layer could be built, is the network touched.
    report = _report(convolutions, made, reasons, behind)
    for name, new in made.items():
        model.set_submodule(name, new)
        if name in behind:
            model.set_submodule(behind[name], nn.Identity())
    for name, (static, new) in linears.items():
        model.set_submodule(name, new)
        counts = (_parameters(static), _parameters(new))
        report.rows.append(Conversion(name, type(static).__name__, type(new).__name__, *counts))
    if new_pass is not None:
        model.register_forward_pre_hook(new_pass)
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


def _maker(layer: Callable[..., nn.Module], rule: Rule, upcycle: bool) -> Callable[..., nn.Module]:
    if not upcycle:

        def fresh(old: nn.Conv2d, *, kernel_size: Any = None, **options: Any) -> nn.Module:
            arguments = conv2d_arguments(old)
            if kernel_size is not None:
                arguments = with_kernel_size(arguments, kernel_size)
            return layer(**{**arguments, **rule.arguments, **options}).to(old.weight)

        return fresh
    name = getattr(layer, "__name__", layer)
    if not hasattr(layer, "from_conv"):
        raise ValueError(f"upcycle=True needs {name}.from_conv, which does not exist")

    def upcycled(old: nn.Conv2d, **options: Any) -> nn.Module:
        if "kernel_size" in options and "kernel_size" not in inspect.signature(layer.from_conv).parameters:
            raise ValueError(f"kernel_size={options['kernel_size']}: upcycle=True keeps the kernels in {name}")
        return layer.from_conv(old, **options)

    return upcycled


def _make_layers(
    make: Callable[..., nn.Module],
    convolutions: dict[str, nn.Conv2d],
    reasons: dict[str, str],
    options: dict[str, Any],
    sharing: Sharing,
    by_rule: bool,
) -> dict[str, nn.Module]:
    """Build the layers, by name, of the convolutions that have no reason to be left.

    By a paper's rule, what the layer refuses gets a reason; where the user chose, that is an error.
    """
    made: dict[str, nn.Module] = {}
    instead: dict[int, nn.Module] = {}
    refusal: ValueError | None = None
    for name, old in convolutions.items():
        if reasons[name]:
            continue
        if id(old) not in instead:
            try:
                instead[id(old)] = make(old, **{**options, **sharing.options(name)}).train(old.training)
            except TypeError as error:
                raise ValueError(f"{name} = {old}: {error}") from error
            except ValueError as error:
                refusal = refusal or ValueError(f"{name} = {old}: {error}")
                if not by_rule:
                    raise refusal from error
                reasons[name] = f"refused: {error}"
                continue
            sharing.made(name, instead[id(old)])
        made[name] = instead[id(old)]
    if refusal and not made:
        raise refusal
    return made


def _report(
    convolutions: dict[str, nn.Conv2d], made: dict[str, nn.Module], reasons: dict[str, str], behind: dict[str, str]
) -> ConversionReport:
    report, seen = ConversionReport(), set[int]()
    for name, old in convolutions.items():
        new = made.get(name, old)
        counts = (0, 0) if id(old) in seen else (_parameters(old), _parameters(new))
        seen.add(id(old))
        norm = f", in the place of {behind[name].rpartition('.')[2]} too" if name in made and name in behind else ""
        report.rows.append(Conversion(name, _shape(old), _shape(new) + norm, *counts, reasons[name]))
    return report


def _make_classifier(
    model: nn.Module, layer: Any, upcycle: bool, options: dict[str, Any]
) -> dict[str, tuple[nn.Linear, nn.Module]]:
    """Build the new classifier, by the name of the old one."""
    if layer not in CLASSIFIERS:
        name, names = getattr(layer, "__name__", layer), ", ".join(one.__name__ for one in CLASSIFIERS)
        raise ValueError(f"classifier=True needs a layer with a linear form ({names}), which {name} has not")
    linears = {name: one for name, one in model.named_modules(remove_duplicate=False) if type(one) is nn.Linear}
    if not linears:
        raise ValueError(f"classifier=True, but {type(model).__name__} has no nn.Linear")
    old = list(linears.values())[-1]
    own = {name: options[name] for name in ("num_experts", "router") if name in options}
    if upcycle:
        new = CLASSIFIERS[layer].from_linear(old, **own)
    else:
        new = CLASSIFIERS[layer](old.in_features, old.out_features, old.bias is not None, **own).to(old.weight)
    return {name: (old, new) for name, one in linears.items() if one is old}


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
