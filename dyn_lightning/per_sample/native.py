"""The C++ of depthwise convolutions, compiled where it is first used."""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("depthwise.cpp")
# By what torch says of the processor, so that machines of several kinds can share a folder.
FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Compile the functions of ``depthwise.cpp``, if that was not done before, and load them.

    The compiler is what the variable CXX names, otherwise g++; the folder is ``dyn_lightning`` in that of
    XDG_CACHE_HOME, otherwise in ``~/.cache``.

    Returns:
        None on other systems than Linux, where there is no such compiler, or, with a warning, where it fails.
    """
    if sys.platform != "linux":  # there g++ is another compiler, or another OpenMP
        return None
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
        if shutil.which(compiler[0]) is None:
            logging.getLogger(__name__).info("depthwise convolutions are slower: no compiler %s", compiler[0])
            return None
        capability = torch.backends.cpu.get_cpu_capability()
        command = [*compiler, "-std=c++17", "-O3", "-fPIC", "-fopenmp", *FLAGS.get(capability, [])]
        of = [SOURCE.read_text(encoding="utf-8"), *command, platform.machine(), capability]
        version = hashlib.sha256("\n".join(of).encode()).hexdigest()[:16]
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dyn_lightning"
        path = folder / f"{SOURCE.stem}-{version}.so"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            _compile(command, compiler, path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        text = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        warnings.warn(f"depthwise convolutions are slower: {SOURCE.name} could not be compiled: {text}", stacklevel=2)
        return None


@torch.compiler.assume_constant_result
def is_compiled() -> bool:
    """Tell whether ``library`` gives one."""
    return library() is not None


def _compile(command: list[str], linker: list[str], path: Path) -> None:
    """Compile into a file that is there when it is complete and was loaded once.

    Other processes may do the same at the same time: the first one's stays, since others may run it already.
    """
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        part, whole = f"{folder}/part.o", f"{folder}/whole.so"
        run = functools.partial(subprocess.run, check=True, capture_output=True, text=True, timeout=120)
        run([*command, "-c", str(SOURCE), "-o", part])
        # Without OpenMP's library: the one that torch has loaded serves, and its threads.
        run([*linker, "-shared", part, "-o", whole])
        ctypes.CDLL(whole)
        with contextlib.suppress(FileExistsError):
            os.link(whole, path)
