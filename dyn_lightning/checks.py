"""Checks of what users give: counts, pairs of numbers, padding, channels, batches, names."""

import difflib
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

import torch

from dyn_lightning.per_sample.geometry import Pair


def check_batched(shape: torch.Size) -> None:
    """Check that an input is a batch of maps.

    Raises:
        ValueError: its shape is not ``(B, C, H, W)``.
    """
    if len(shape) != 4:
        raise ValueError(f"input of shape {tuple(shape)} must be (B, C_in, H, W); x[None] adds a batch axis")


def as_pair(name: str, value: int | Pair | list[int]) -> Pair:
    """Bring one number, or two as a tuple or list, to (rows, columns).

    Raises:
        ValueError: neither one nor two whole numbers.
    """
    values = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(values) != 2 or type(values[0]) is not int or type(values[1]) is not int:
        raise ValueError(f"{name}={value!r} must be a whole number or two of them, (rows, columns)")
    return values


def as_steps(name: str, value: int | Pair | list[int]) -> Pair:
    """Bring a kernel size, stride or dilation to (rows, columns).

    Raises:
        ValueError: not whole numbers, or one below 1.
    """
    steps = as_pair(name, value)
    check_count(name, min(steps))
    return steps


def as_padding(value: int | Pair | list[int] | str) -> Pair | str:
    """Bring padding to (rows, columns), or keep ``"same"`` and ``"valid"``.

    Raises:
        ValueError: another string, not whole numbers, or one below 0.
    """
    if isinstance(value, str):
        if value not in ("same", "valid"):
            raise ValueError(f"padding={value!r} must be 'same', 'valid', a whole number or two of them")
        return value
    padding = as_pair("padding", value)
    check_count("padding", min(padding), least=0)
    return padding


def as_geometry(
    kernel_size: int | Pair,
    stride: int | Pair,
    padding: int | Pair | str,
    dilation: int | Pair,
    strided_same: bool = False,
) -> tuple[Pair, Pair, Pair | str, Pair]:
    """Bring kernel size, stride, padding and dilation to what ``nn.Conv2d`` holds.

    Raises:
        ValueError: not whole numbers, one below 1, an unknown padding, or ``"same"`` with a stride where the layer has
            no ``strided_same``.
    """
    strides, paddings = as_steps("stride", stride), as_padding(padding)
    if paddings == "same" and strides != (1, 1) and not strided_same:
        raise ValueError(f"padding='same' needs stride=1, not stride={strides}; give the padding as numbers")
    return as_steps("kernel_size", kernel_size), strides, paddings, as_steps("dilation", dilation)


def check_channels(in_channels: int, out_channels: int, groups: int) -> None:
    """Check what ``nn.Conv2d`` checks.

    Raises:
        ValueError: the groups do not divide both channel counts, or a count is below 1.
    """
    for name, value in (("in_channels", in_channels), ("out_channels", out_channels), ("groups", groups)):
        check_count(name, value)
    if in_channels % groups or out_channels % groups:
        raise ValueError(f"groups={groups} must divide in_channels={in_channels} and out_channels={out_channels}")


def check_count(name: str, value: float, least: int = 1) -> None:
    """Check a count.

    Raises:
        ValueError: it is no whole number, or below the least.
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be a whole number")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}")


def matches(name: str, globs: Iterable[str]) -> bool:
    """Say whether a name matches one of the globs."""
    return any(fnmatchcase(name, glob) for glob in globs)


def check_globs(argument: str, globs: Iterable[str], names: Collection[str], kind: str) -> None:
    """Check that each glob matches a name.

    Raises:
        ValueError: one matches none; the message lists the names.
    """
    for glob in globs:
        if not any(fnmatchcase(name, glob) for name in names):
            raise ValueError(f"{argument}={glob!r} matches no {kind}; there are {', '.join(names)}")


def unknown(name: str, known: Iterable[str], kind: str = "key") -> str:
    """Say that a name does not exist, and which does.

    Example:
        >>> unknown("trainer.max_epoch", ["trainer.max_epochs", "seed"])
        "there is no key 'trainer.max_epoch', did you mean 'trainer.max_epochs'?"
    """
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f", did you mean {near[0]!r}?" if near else f"; there are {', '.join(known)}"
    return f"there is no {kind} {name!r}{hint}"
