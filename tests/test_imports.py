"""Imports run one way: what a user needs for a layer never pulls in what trains it."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "dyn_lightning"

# A module imports from its own line and those above it. `callbacks` is the folder /callbacks.
ORDER = [
    {"per_sample", "protocols"},
    {"allocator", "checks", "conv2d"},
    {"functional"},
    {"routing"},
    {"layers"},
    {"rules", "sharing", "convert", "fold", "cost", "analysis", "recipe"},
    {"models"},
    {"callbacks", "data", "record"},
    {"classifier"},
    {"ablation"},
    {"errors", "cli", "page", "fit", "analyze", "evaluate", "ablate"},
]
TRAINING = ("lightning", "pytorch_lightning", "tensorboard", "torchmetrics")
FIRST_THAT_TRAINS = 7


def sources(root: Path) -> Iterator[tuple[str, Path]]:
    """Give every file of the package by its dotted name."""
    for folder, package in ((root / PACKAGE, PACKAGE), (root / "callbacks", f"{PACKAGE}.callbacks")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(part for part in parts if part != "__init__"))), path


def imported(name: str, path: Path) -> Iterator[str]:
    """Give the dotted name of everything that a file imports, inside its functions too."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{origin}.{alias.name}" for alias in node.names) if origin == PACKAGE else [origin]


def violations(root: Path) -> list[str]:
    found = []
    for name, path in sources(root):
        if name == PACKAGE:
            continue
        own = name.split(".")[1]
        lines = [number for number, line in enumerate(ORDER) if own in line]
        assert lines, f"{own} is not in ORDER: add it in tests/test_imports.py, below all that it imports"
        allowed = set().union(*ORDER[: lines[0] + 1])
        for target in imported(name, path):
            top, _, rest = target.partition(".")
            upwards = top == PACKAGE and rest.split(".")[0] not in allowed
            if upwards or (top in TRAINING and lines[0] < FIRST_THAT_TRAINS):
                found.append(f"{name} imports {target}")
    return found


def test_imports_run_one_way() -> None:
    assert violations(ROOT) == []


@pytest.mark.parametrize(
    "path", [path for _, path in sources(ROOT) if path.name == "__init__.py"], ids=lambda path: path.parent.name
)
def test_init_files_only_re_export(path: Path) -> None:
    docstring, *rest = ast.parse(path.read_text()).body
    assert isinstance(docstring, ast.Expr)
    assert {type(node) for node in rest} <= {ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign}


@pytest.mark.parametrize(
    ("file", "text", "expected"),
    [
        ("dyn_lightning/layers/own.py", "from dyn_lightning.routing import watch", []),
        ("dyn_lightning/layers/own.py", "from ..routing import watch", []),
        ("dyn_lightning/layers/own.py", "from ..convert import x", ["layers.own imports dyn_lightning.convert"]),
        (
            "dyn_lightning/routing.py",
            "def f():\n import dyn_lightning.layers.x",
            ["routing imports dyn_lightning.layers.x"],
        ),
        ("dyn_lightning/routing.py", "from dyn_lightning import layers", ["routing imports dyn_lightning.layers"]),
        ("dyn_lightning/routing.py", "import dyn_lightning", ["routing imports dyn_lightning"]),
        ("dyn_lightning/cost.py", "import pytorch_lightning as pl", ["cost imports pytorch_lightning"]),
        ("dyn_lightning/data/own.py", "import dyn_lightning.classifier", ["data.own imports dyn_lightning.classifier"]),
        (
            "callbacks/own.py",
            "from dyn_lightning import classifier",
            ["callbacks.own imports dyn_lightning.classifier"],
        ),
        ("dyn_lightning/classifier.py", "from dyn_lightning.callbacks.own import x\nimport lightning", []),
        ("dyn_lightning/__init__.py", "from dyn_lightning.cost import x", []),
    ],
)
def test_a_wrong_import_is_found(tmp_path: Path, file: str, text: str, expected: list[str]) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(text)
    assert violations(tmp_path) == [f"{PACKAGE}.{line}" for line in expected]


def test_an_unknown_module_must_be_added(tmp_path: Path) -> None:
    (tmp_path / PACKAGE).mkdir()
    (tmp_path / PACKAGE / "surprise.py").touch()
    with pytest.raises(AssertionError, match=r"surprise is not in ORDER: add it in tests/test_imports.py"):
        violations(tmp_path)


def test_layers_load_torch_alone() -> None:
    code = "import sys, dyn_lightning.layers, dyn_lightning.convert, dyn_lightning.cost; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert "dyn_lightning.layers.cond_conv" in loaded.split()
    assert not {"torchvision", "timm", *TRAINING} & set(loaded.split())
