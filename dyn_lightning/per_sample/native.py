"""The package's C++, compiled where it is first used."""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("depthwise.cpp")
# By what torch says of the processor: with these, a folder that several machines share serves each with its own.
FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Compile the functions of ``depthwise.cpp``, once, and load them.

    Taken are the compiler that the variable CXX names, otherwise g++, and the folder ``dyn_lightning`` in that of
    XDG_CACHE_HOME, otherwise of ``~/.cache``.

    Returns:
        None where there is no such compiler, or where it fails, with a warning.
    """
    compiler = shlex.split(os.environ.get("CXX") or "g++")
    if shutil.which(compiler[0]) is None:
        logging.getLogger(__name__).info("depthwise kernels train more slowly: there is no compiler %s", compiler[0])
        return None
    command = [*compiler, "-std=c++17", "-O3", "-fPIC", "-fopenmp"]
    command += FLAGS.get(torch.backends.cpu.get_cpu_capability(), [])
    version = hashlib.sha256("\n".join([SOURCE.read_text(), *command]).encode()).hexdigest()[:16]
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dyn_lightning"
        path = folder / f"{SOURCE.stem}-{version}.so"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _compile(command, compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        text = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        reason = f"{SOURCE.name} was not compiled: {text}"
        warnings.warn(f"depthwise kernels train more slowly, since {reason}", stacklevel=2)
        return None


@torch.compiler.assume_constant_result
def is_compiled() -> bool:
    """Tell whether ``library`` gives one."""
    return library() is not None


def _compile(command: list[str], linker: list[str], path: Path) -> None:
    """Compile into a file that is there when it is complete: other processes may do the same at the same time."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part, whole = f"{folder}/part.o", f"{folder}/whole.so"
        run = functools.partial(subprocess.run, check=True, capture_output=True, text=True, timeout=120)
        run([*command, "-c", str(SOURCE), "-o", part])
        # Without OpenMP's library: the one that torch has loaded serves, and its threads.
        run([*linker, "-shared", part, "-o", whole])
        os.replace(whole, path)
