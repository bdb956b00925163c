"""fold(): the exact static form of a network for inference."""

import copy
import inspect
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from dyn_lightning import checks, conv2d
from dyn_lightning.layers import CondConv2d, DynamicConv2d
from dyn_lightning.layers.dg_conv import PermutedConv2d
from dyn_lightning.layers.involution import involve
from dyn_lightning.protocols import Foldable

BatchNorm = nn.modules.batchnorm._BatchNorm
NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm, conv2d.BatchNorm2d)
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
        code cannot be followed (``torch.fx``), where something else uses the layer, its output or the norm too, where
        there are hooks, and behind anything but a convolution that is linear in its weights (``nn.Conv2d``, CondConv,
        Dynamic Convolution, and what DO-Conv and DGConv fold to). A forward that asks for a convolution's bias, or for
        the grad mode, may be misled.

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


def norms_behind(model: nn.Module, *, with_relu: bool = False) -> dict[str, str]:
    """Name, for each layer whose output goes into a batch norm and nowhere else, that batch norm.

    Each module's own code is traced symbolically, its children taken as they are. Where that fails, as it does for code
    that looks at values or shapes, nothing is found at this level. Neither is a layer or norm with hooks, or one that
    is used, or looked into, in two places.

    Args:
        model: any module; a copy of it is traced, since tracing runs its code.
        with_relu: whether only norms are named whose output goes into a ReLU and nowhere else.

    Example:
        >>> norms_behind(nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.ReLU()))
        {'0': '1'}
    """
    model = copy.deepcopy(model)
    names = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    uses: Counter[int] = Counter()
    called_otherwise: set[int] = set()  # than the traces assume: with more than the required arguments
    pairs: list[tuple[nn.Module, str, str]] = []
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for node in _trace(module):
            name = f"{prefix}{node.target}"
            used = model.get_submodule(name if node.op == "call_module" else name.rpartition(".")[0])
            uses[id(used)] += used is not module
            if node.op == "call_module" and len(node.args) + len(node.kwargs) > len(_required(used)):
                called_otherwise.add(id(used))
            before: Any = node.args[0] if node.op == "call_module" and node.args else None
            follows = isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1
            if follows and isinstance(used, BatchNorm) and (not with_relu or _has_relu(node, module, used)):
                pairs.append((module, f"{prefix}{before.target}", name))
    found = {}
    for module, name, norm_name in pairs:
        name, between = _last(model, name)
        involved = [*between, model.get_submodule(name), model.get_submodule(norm_name)]
        once = all(names[id(one)] == uses[id(one)] == 1 and not _is_hooked(one) for one in involved)
        if once and id(module) not in called_otherwise:
            found[name] = norm_name
    return found


class ChannelShift(nn.Module):
    """What is left of a batch norm behind kernels that are mixed by weights without a fixed sum: ``x + shift``."""

    def __init__(self, shift: Tensor) -> None:
        super().__init__()
        self.shift = nn.Parameter(shift)

    def forward(self, x: Tensor) -> Tensor:
        """Shift ``(B, C, H, W)``."""
        return conv2d.add_bias(x, self.shift)


class _Tracer(fx.Tracer):
    def __init__(self) -> None:
        # These cannot be followed: they ask for dimensions or the layout, or differentiate by themselves.
        super().__init__(autowrap_functions=(checks.check_batched, conv2d.in_format_of, involve))

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def _trace(module: nn.Module) -> list[fx.Node]:
    """List the uses of submodules and parameters in a module's own code, none where it cannot be traced."""
    if not module._modules:
        return []
    arguments = inspect.signature(module.forward).parameters.values()
    defaults = {one.name: one.default for one in arguments if one.default is not inspect.Parameter.empty}
    try:
        graph = _Tracer().trace(module, concrete_args=defaults)
    except Exception:  # a user's code may raise anything when its inputs are symbols
        return []
    # A symbol that the code put away may be used elsewhere.
    kept = [value for one in vars(module).values() for value in (one if isinstance(one, list) else [one])]
    if any(isinstance(value, fx.Proxy) for value in kept):
        return []
    return [node for node in graph.nodes if node.op in ("call_module", "get_attr")]


def _required(module: nn.Module) -> list[str]:
    parameters = inspect.signature(module.forward).parameters.values()
    return [one.name for one in parameters if one.default is inspect.Parameter.empty]


def _has_relu(norm_call: fx.Node, module: nn.Module, norm: Any) -> bool:
    """Say whether a norm's output goes into a ReLU and nowhere else."""
    if type(norm).__name__ == NORM_WITH_ACTIVATION:
        return isinstance(norm.act, nn.ReLU)
    if len(norm_call.users) != 1:
        return False
    (user,) = norm_call.users
    if user.op == "call_module":
        return isinstance(module.get_submodule(str(user.target)), nn.ReLU)
    return user.target in (torch.relu, torch.relu_, nn.functional.relu, "relu", "relu_")


def _is_hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _last(model: nn.Module, name: str) -> tuple[str, list[nn.Module]]:
    """Name the module that gives the output of another, in a plain sequence the last one, and list those around it."""
    around: list[nn.Module] = []
    module = model.get_submodule(name)
    while type(module) is nn.Sequential and len(module):
        around.append(module)
        name = f"{name}.{list(module._modules)[-1]}"
        module = model.get_submodule(name)
    return name, around


def _outermost_foldable(model: nn.Module) -> Iterator[tuple[str, Foldable]]:
    inside: str | None = None
    for name, module in model.named_modules(remove_duplicate=False):
        if inside is not None and name.startswith(inside):
            continue
        if isinstance(module, Foldable) and not inspect.signature(module.fold).parameters:
            inside = f"{name}."
            yield name, module


@torch.no_grad()
def _absorb(layer: Any, norm: Any) -> nn.Module | None:
    """Move a batch norm into a layer, and give what stays in its place; None where that cannot be done."""
    with_activation = type(norm).__name__ == NORM_WITH_ACTIVATION
    if not (type(norm) in NORMS or with_activation) or norm.running_mean is None or norm.training:
        return None
    scale = torch.rsqrt(norm.running_var.double() + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight
    shift = -norm.running_mean * scale
    if norm.bias is not None:
        shift = shift + norm.bias
    rest: nn.Module = nn.Identity()
    if type(layer) in (nn.Conv2d, PermutedConv2d) or type(layer).__name__ == conv2d.SAME_PADDED:
        _scale_(layer, scale, shift)
    elif isinstance(layer, (CondConv2d, DynamicConv2d)):
        dtype = layer.weight.dtype
        layer.weight = nn.Parameter((layer.weight * scale[:, None, None, None]).to(dtype))
        if layer.bias is not None:
            layer.bias = nn.Parameter((layer.bias * scale).to(dtype))
        rest = ChannelShift(shift.to(dtype))
    else:
        return None
    return nn.Sequential(rest, norm.drop, norm.act) if with_activation else rest


def _scale_(conv: nn.Conv2d, scale: Tensor, shift: Tensor) -> None:
    if isinstance(conv, PermutedConv2d):  # whose kernels are in the order of its groups
        scale, shift = (values[conv.outputs.argsort()] for values in (scale, shift))
    bias = shift if conv.bias is None else conv.bias * scale + shift
    # New parameters, as the old ones may be those of another layer too.
    dtype = conv.weight.dtype
    conv.weight = nn.Parameter((conv.weight * scale[:, None, None, None]).to(dtype))
    conv.bias = nn.Parameter(bias.to(dtype))
