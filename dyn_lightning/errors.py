"""Errors of a command line in a sentence, before anything runs: what is wrong, and what exists."""

import inspect
import itertools
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytorch_lightning.callbacks
import pytorch_lightning.loggers
from jsonargparse import ArgumentParser

import dyn_lightning.callbacks
import dyn_lightning.data
from dyn_lightning.checks import unknown
from dyn_lightning.models.backbone import import_object

TRACEBACK = "DYN_LIGHTNING_TRACEBACK"


@contextmanager
def readable_errors(begun: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """End with exit code 2 and one paragraph where something is wrong before the work has begun."""
    try:
        yield
    except Exception as error:
        if begun() or os.environ.get(TRACEBACK):
            raise
        text = first_error(str(error)) or type(error).__name__
        print(f"error: {text} ({TRACEBACK}=1 shows the traceback)", file=sys.stderr)
        raise SystemExit(2) from error


def first_error(text: str) -> str:
    """Take the first of the errors that jsonargparse lists, a type that a value might have had each, or all."""
    text = " ".join(text.split())
    found = re.search(r"Errors: - (.*?) - ", text)
    return found[1] if found else text


def config_files(args: list[str] | None) -> list[str]:
    """Find the configuration files on a command line, whether or not it can be parsed."""
    words = sys.argv[1:] if args is None else args
    following = [file for flag, file in itertools.pairwise(words) if flag in ("-c", "--config")]
    return following + [word.partition("=")[2] for word in words if word.startswith("--config=")]


def explain(text: str, parser: ArgumentParser, files: list[str]) -> str:
    """Say in a sentence what jsonargparse says in a page: the key, and the nearest that exists."""
    text = " ".join(text.split())
    if text.startswith(("Problems parsing config", "Unexpected config", "'utf-8' codec")):
        return f"{' or '.join(files)} is no configuration (YAML, a mapping of keys): {text}"
    where = ".".join(re.findall(r'Parser key "([\w.]+)"', text))
    if found := re.search(r"class_path '([\w.]+)': Option '([\w.]+)' is not accepted", text):
        if found[1].endswith("LightningDataModule"):
            return f"data: there is no class_path; there are {', '.join(dyn_lightning.data.__all__)}"
        return f"{where} = {found[1]}: {unknown(found[2], inspect.signature(import_object(found[1])).parameters)}"
    if found := re.search(r"Expected a dot import path string: (\S+)", text):
        classes = {"data": dyn_lightning.data.__all__, "trainer.logger": pytorch_lightning.loggers.__all__}
        known = classes.get(where, [*dyn_lightning.callbacks.__all__, *pytorch_lightning.callbacks.__all__])
        return f"{where}: {unknown(found[1], known, 'class')}"
    keys = list(parser.get_defaults().keys())
    if found := re.search(r"Group '([\w.]+)' does not accept option '([\w.]+)'", text):
        return unknown(f"{found[1]}.{found[2]}", [key for key in keys if key.startswith(f"{found[1]}.")])
    if found := re.search(r"(?:unrecognized arguments: -*|^Option '|[Kk]ey ')([\w.+-]+)", text):
        group, _, rest = (key := found[1].rstrip("+")).partition(".")
        groups = {name.partition(".")[0] for name in keys}
        return unknown(key, keys) if rest and group in groups else unknown(group, groups)
    types = re.findall(r"Expected an? <class '([\w.]+)'>", text)
    kinds = " or ".join(dict.fromkeys(name for name in types if "." not in name and name != "NoneType"))
    if kinds and "Expected a one of" not in text and (value := re.search(r"(?:Got|Given) value: ([^\s{[]+)", text)):
        return f"{where}: {value[1]!r} is no {kinds}"
    return text if first_error(text) == text else f"{where}: {first_error(text)}".removeprefix(": ")
