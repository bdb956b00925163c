import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dyn_lightning.functional import dynamic_conv2d
from dyn_lightning.per_sample import native
from dyn_lightning.per_sample.convolution import convolve
from dyn_lightning.per_sample.geometry import Geometry
from tests.per_sample.loop import loop
from tests.per_sample.test_depthwise import SMALL, calls, draw, is_compiled, remember_nothing
from tests.tolerances import assert_close


@pytest.fixture(autouse=True)
def _anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    remember_nothing(monkeypatch)
    native.library.cache_clear()
    yield
    native.library.cache_clear()


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    tensors = draw()
    with pytest.warns(UserWarning, match="there is no compiler 'no-such-compiler'; install g"):
        y = dynamic_conv2d(*tensors, **SMALL)
    assert_close(y, loop(*tensors, **SMALL))
    assert calls("aten::convolution_backward", lambda: torch.autograd.grad(y.sum(), tensors)) == 1


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", f"{sys.executable} -c 'import sys; sys.exit(\"no such option\")'")
    tensors = draw()
    with pytest.warns(UserWarning, match=r"could not be compiled and loaded: no such option"):
        y = dynamic_conv2d(*tensors, **SMALL)
    assert_close(y, loop(*tensors, **SMALL))
    assert not list((tmp_path / "dyn_lightning").iterdir())


@pytest.mark.slow  # compiles the library
def test_a_folder_without_links(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert native.is_compiled()
    assert len([*(tmp_path / "dyn_lightning").iterdir()]) == 1


@pytest.mark.slow  # compiles the library
def test_by_several_processes_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler, calls = tmp_path / "compiler", tmp_path / "calls"
    compiler.write_text(f'#!/bin/sh\necho >> "{calls}"\nexec g++ "$@"\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    _compile_in_other_processes(3)
    assert len(calls.read_text().splitlines()) == len(native.SOURCES) + 1  # and the linker's
    (one,) = (tmp_path / "dyn_lightning").iterdir()
    written = one.stat().st_mtime_ns
    assert native.is_compiled()
    assert one.stat().st_mtime_ns == written


@pytest.mark.parametrize(("variable", "value"), [("XDG_CACHE_HOME", os.devnull), ("CXX", '"')])
def test_what_cannot_be_used(monkeypatch: pytest.MonkeyPatch, variable: str, value: str) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.warns(UserWarning, match="dynamic convolutions are slower"):
        assert not native.is_compiled()


@pytest.mark.slow  # compiles the library
def test_a_library_that_does_not_load(tmp_path: Path) -> None:
    _compile_in_other_processes(1)
    (one,) = (tmp_path / "dyn_lightning").iterdir()
    one.write_bytes(b"nothing")
    assert native.is_compiled()
    assert one.stat().st_size > 10_000


@pytest.mark.slow  # compiles the library
def test_backward_where_there_is_no_library_anymore(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, weight, _ = draw(1)
    geometry = Geometry((1, 1), (1, 2), (1, 1), 4)
    y = convolve(x, weight[0], geometry)
    assert is_compiled(y)
    monkeypatch.setenv("CXX", "no-such-compiler")
    native.library.cache_clear()
    with pytest.warns(UserWarning, match="no compiler"):
        found = torch.autograd.grad(y.square().sum(), (x, weight))
    expected = F.conv2d(x, weight[0], None, *geometry)
    assert_close(found, torch.autograd.grad(expected.square().sum(), (x, weight)))


def test_on_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert not native.is_compiled()


def _compile_in_other_processes(count: int) -> None:
    command = [sys.executable, "-c", "from dyn_lightning.per_sample.native import library; assert library()"]
    started = [subprocess.Popen(command) for _ in range(count)]
    assert {process.wait() for process in started} == {0}
