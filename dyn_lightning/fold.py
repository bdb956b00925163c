"""fold(): the exact static form of a network for inference."""

import copy
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from dyn_lightning import functional
from dyn_lightning.layers import CondConv2d, DynamicConv2d
from dyn_lightning.layers.dg_conv import PermutedConv2d
from dyn_lightning.layers.involution import involve
from dyn_lightning.protocols import Foldable

BatchNorm = nn.modules.batchnorm._BatchNorm
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, functional.BatchNorm2d)
# By name, since timm need not be installed: it is a batch norm with dropout and activation behind it.
NORM_WITH_ACTIVATION = "BatchNormAct2d"


def fold(model: nn.Module, *, batch_norm: bool = True) -> nn.Module:
    """Replace every Foldable layer by its static form, and move batch norms into the layers that they follow.

    Args:
        model: any module; it is left as it is.
        batch_norm: whether batch norms are moved. Without, the result has the parameters of the plain network, so that
            its state dict can be loaded there strictly (DO-Conv's ResNet into torchvision's).

    Returns:
        A copy in eval mode, whose outputs are those of ``model`` in eval mode. A batch norm stays where the model's
        code cannot be followed (``torch.fx``), where something else uses the layer's output too, and behind a layer
        that is not linear in its weights.

    Example:
        >>> from dyn_lightning.layers import DOConv2d
        >>> fold(nn.Sequential(DOConv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)))
        Sequential(
          (0): Conv2d(4, 6, kernel_size=(3, 3), stride=(1, 1))
          (1): Identity()
        )
    """
    model = copy.deepcopy(model).eval()
    folded: dict[int, nn.Module] = {}
    for name, layer in list(_outermost_foldable(model)):
        static = folded.setdefault(id(layer), layer.fold().eval())
        if not name:
            return static
        model.set_submodule(name, static)
    if batch_norm:
        for name, norm_name in norms_behind(model).items():
            norm = model.get_submodule(norm_name)
            rest = _absorb(model.get_submodule(name), norm)
            if rest is not None:
                model.set_submodule(norm_name, rest.eval())
    return model


def norms_behind(model: nn.Module) -> dict[str, str]:
    """Name, for each layer whose output goes into a batch norm and nowhere else, that batch norm.

    Each module's own code is traced symbolically, its children taken as they are. Where that fails, as it does for code
    that looks at values or shapes, nothing is found at this level.

    Example:
        >>> norms_behind(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
        {'0': '1'}
    """
    paths = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    found = {}
    for path, module in model.named_modules():
        calls = _calls(module)
        used = Counter(node.target for node in calls)
        for node in calls:
            before = node.args[0] if node.args else None
            if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) != 1:
                continue
            prefix = f"{path}." if path else ""
            name, norm_name = _last(model, f"{prefix}{before.target}"), f"{prefix}{node.target}"
            layer, norm = model.get_submodule(name), model.get_submodule(norm_name)
            once = all(used[call.target] == 1 for call in (before, node)) and paths[id(layer)] == paths[id(norm)] == 1
            if once and isinstance(norm, BatchNorm):
                found[name] = norm_name
    return found


class ChannelShift(nn.Module):
    """What is left of a batch norm behind kernels that are mixed by weights without a fixed sum: ``x + shift``."""

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        """Shift ``(B, C, H, W)``."""
        return functional.add_bias(x, self.shift)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        # These cannot be followed: they ask for the layout, or differentiate by themselves.
        super().__init__(autowrap_functions=(functional.in_format_of, involve))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _calls(module: nn.Module) -> list[fx.Node]:
    """List the calls of submodules in a module's own code, none where it cannot be traced."""
    if not any(isinstance(child, BatchNorm) for child in module.modules()):
        return []
    arguments = inspect.signature(module.forward).parameters.values()
    defaults = {one.name: one.default for one in arguments if one.default is not inspect.Parameter.empty}
    try:
        graph = _Tracer().trace(module, concrete_args=defaults)
    except Exception:  # a user's code may raise anything when its inputs are symbols
        return []
    return [node for node in graph.nodes if node.op == "call_module"]


def _last(model: nn.Module, name: str) -> str:
    """Name the module that gives the output of another: in a plain sequence it is the last one."""
    module = model.get_submodule(name)
    while type(module) is nn.Sequential and len(module):
        name = f"{name}.{list(module._modules)[-1]}"
        module = model.get_submodule(name)
    return name


def _outermost_foldable(model: nn.Module) -> Iterator[tuple[str, Foldable]]:
    inside: str | None = None
    for name, module in model.named_modules(remove_duplicate=False):
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, Foldable):
            inside = f"{name}."
            yield name, module


@torch.no_grad()
def _absorb(layer: Any, norm: Any) -> nn.Module | None:
    """Move a batch norm into a layer, and give what stays in its place; None where that cannot be done."""
    with_activation = type(norm).__name__ == NORM_WITH_ACTIVATION
    if not (type(norm) in NORMS or with_activation) or norm.running_mean is None:
        return None
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    rest: nn.Module = nn.Identity()
    if type(layer) in (nn.Conv2d, PermutedConv2d) or type(layer).__name__ == functional.SAME_PADDED:
        _scale_(layer, scale, shift)
    elif isinstance(layer, (CondConv2d, DynamicConv2d)):
        layer.weight.copy_(layer.weight * scale[:, None, None, None])
        if layer.bias is not None:
            layer.bias.copy_(layer.bias * scale)
        rest = ChannelShift(shift.to(layer.weight.dtype))
    else:
        return None
    return nn.Sequential(rest, norm.drop, norm.act) if with_activation else rest


def _scale_(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    if isinstance(conv, PermutedConv2d):  # whose kernels are in the order of its groups
        scale, shift = (values[conv.outputs.argsort()] for values in (scale, shift))
    bias = shift if conv.bias is None else conv.bias * scale + shift
    conv.weight.copy_(conv.weight * scale[:, None, None, None])
    conv.bias = nn.Parameter(bias.to(conv.weight.dtype))
