"""Backbones by name: the package's own, torchvision's, timm's, or any callable by its dotted path."""

import difflib
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn

from dyn_lightning.models.cifar_resnet import CifarResNet
from dyn_lightning.rules import first_convolution

MODELS: dict[str, Callable[..., nn.Module]] = {"cifar_resnet": CifarResNet}


def build_backbone(name: str, num_classes: int, channels: int, /, **options: Any) -> nn.Module:
    """Build a network that classifies images.

    Args:
        name: a name in ``MODELS``, of a torchvision classification model, of a timm model (``timm/NAME`` where
            torchvision has the same name), or the dotted path of a callable that returns a module; looked for in this
            order. A callable gets ``num_classes`` and ``in_channels`` if its signature has them.
        num_classes: classes; torchvision's pretrained weights get a new last layer where they have other classes.
        channels: of the images; torchvision's pretrained weights are adapted so that an image with equal channels is
            seen as before.
        options: handed to the model, as ``width_mult=0.5``, ``weights="DEFAULT"`` (torchvision) or ``pretrained=True``.

    Raises:
        ValueError: no model has this name (the message lists those that exist), or it refuses its options.

    Example:
        >>> build_backbone("resnet18", 10, 1).conv1
        Conv2d(1, 64, kernel_size=(7, 7), stride=(2, 2), padding=(3, 3), bias=False)
    """
    try:
        if name in MODELS:
            return _call(MODELS[name], num_classes, channels, options)
        if name in _torchvision_names():
            return _torchvision(name, num_classes, channels, options)
        # A path is followed before timm is imported; timm's names have dots too, but no package is called resnet18.
        path = "." in name and importlib.util.find_spec(name.partition(".")[0]) is not None
        timm_name = name.removeprefix("timm/")
        if not path and _is_timm(timm_name):
            import timm

            return timm.create_model(timm_name, **{"num_classes": num_classes, "in_chans": channels, **options})
        return _call(import_object(name), num_classes, channels, options)
    except UnknownNameError as error:
        known = [*MODELS, *_torchvision_names(), *_timm_names()]
        near = difflib.get_close_matches(name, known, n=3)
        hint = f", did you mean {' or '.join(map(repr, near))}?" if near else ""
        raise ValueError(
            f"backbone={name!r} does not exist{hint} ({error}). There are {', '.join(MODELS)}; torchvision's "
            f"{', '.join(_torchvision_names())}; timm's names (if installed); and dotted paths as my_package.MyNet"
        ) from error
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise ValueError(f"backbone={name!r} with {options}: {error}") from error


def load_weights(backbone: nn.Module, path: str) -> None:
    """Load a state dict, or the backbone in a checkpoint of ours, strictly.

    Raises:
        ValueError: the file is missing or unreadable, or its weights are another network's.
    """
    if not Path(path).is_file():
        raise ValueError(f"weights={path!r} is no file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if "state_dict" in state:
            names = {name: name.removeprefix("backbone.") for name in state["state_dict"]}
            state = {name: state["state_dict"][key] for key, name in names.items() if key != name}
        backbone.load_state_dict(state)
    except Exception as error:
        raise ValueError(f"weights={path!r}: {error}") from error


class UnknownNameError(ValueError):
    """A dotted path that leads to nothing."""


def import_object(path: str) -> Any:
    """Import what a dotted path names.

    Raises:
        UnknownNameError: the module or the name in it does not exist.

    Example:
        >>> import_object("torch.optim.SGD").__name__
        'SGD'
    """
    module, _, attribute = path.rpartition(".")
    if not module:
        raise UnknownNameError(f"{path!r} is no known name and has no dot as a path would")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        # A module that exists but lacks a dependency must say so itself.
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise
        raise UnknownNameError(f"there is no module {error.name!r}") from error
    except AttributeError as error:
        raise UnknownNameError(f"the module {module!r} has no {attribute!r}") from error


def _call(make: Callable[..., nn.Module], num_classes: int, channels: int, options: dict[str, Any]) -> nn.Module:
    accepted = inspect.signature(make).parameters
    known = {"num_classes": num_classes, "in_channels": channels}
    model = make(**{name: value for name, value in known.items() if name in accepted} | options)
    if not isinstance(model, nn.Module):
        raise ValueError(f"it gives a {type(model).__name__}, not a torch.nn.Module")
    return model


def _torchvision_names() -> list[str]:
    return torchvision.models.list_models(module=torchvision.models)


def _torchvision(name: str, num_classes: int, channels: int, options: dict[str, Any]) -> nn.Module:
    if options.get("weights") is None:
        model = torchvision.models.get_model(name, **{"num_classes": num_classes, **options})
    else:
        model = torchvision.models.get_model(name, **options)
        _replace_head(model, num_classes)
    if getattr(model, "aux_logits", False):  # in training, GoogLeNet and Inception would give more than the logits
        model.aux_logits = False
        for branch in {"aux1", "aux2", "AuxLogits"} & {name for name, _ in model.named_children()}:
            setattr(model, branch, None)
    _adapt_stem(model, channels, trained=options.get("weights") is not None)
    return model


@torch.no_grad()
def _adapt_stem(model: nn.Module, channels: int, trained: bool) -> None:
    name = first_convolution(model)
    old: Any = model.get_submodule(name)
    if not name or old.in_channels == channels:
        return
    if trained:
        # Each new channel carries its share of the old sum, so an image with equal channels gives what it gave before.
        weight = old.weight.sum(1, keepdim=True).expand(-1, channels, -1, -1) / channels
    else:
        weight = torch.randn(old.out_channels, channels, *old.kernel_size) * old.weight.std()
    old.weight = nn.Parameter(weight)
    old.in_channels = channels


def _replace_head(model: nn.Module, num_classes: int) -> None:
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    linear = [(name, module) for name, module in layers if isinstance(module, nn.Linear)]
    name, head = (linear or layers)[-1]  # SqueezeNet classifies by a convolution
    if isinstance(head, nn.Linear) and head.out_features != num_classes:
        model.set_submodule(name, nn.Linear(head.in_features, num_classes, bias=head.bias is not None))
    if isinstance(head, nn.Conv2d) and head.out_channels != num_classes:
        model.set_submodule(name, nn.Conv2d(head.in_channels, num_classes, 1))


def _is_timm(name: str) -> bool:
    try:
        import timm
    except ImportError:
        return False
    return timm.is_model(name)


def _timm_names() -> list[str]:
    try:
        import timm
    except ImportError:
        return []
    return timm.list_models()
