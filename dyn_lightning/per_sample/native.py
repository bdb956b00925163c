"""Our C++, compiled where it is first used."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from dyn_lightning.per_sample.tracing import remembered

SOURCES = [Path(__file__).with_name(name) for name in ("depthwise.cpp", "mixed.cpp", "one_sample.cpp", "products.cpp")]
HEADERS = [Path(__file__).with_name(name) for name in ("vectors.h", "pixels.h", "mixed.h")]
# By what torch says of the processor, so that machines of several kinds can share a folder.
FLAGS = {
    "AVX512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}


@functools.cache
def library() -> ctypes.CDLL | None:
    """Compile the functions of our C++, if that was not done before, and load them.

    The compiler is what the variable CXX names, otherwise g++; the folder is ``dyn_lightning`` in that of
    XDG_CACHE_HOME, otherwise in ``~/.cache``.

    Returns:
        None on other systems than Linux, and, with a warning, where there is no such compiler or it fails.
    """
    if sys.platform != "linux":  # there g++ is another compiler, or another OpenMP
        return None
    try:
        compiler = shlex.split(os.environ.get("CXX", "")) or ["g++"]
        if shutil.which(compiler[0]) is None:
            raise FileNotFoundError(f"there is no compiler {compiler[0]!r}; install g++, or name one in CXX")
        capability = torch.backends.cpu.get_cpu_capability()
        command = [*compiler, "-std=c++17", "-O3", "-fPIC", "-fopenmp", *FLAGS.get(capability, [])]
        texts = [path.read_text(encoding="utf-8") for path in (*HEADERS, *SOURCES)]
        version = hashlib.sha256("\n".join([*texts, *command, platform.machine(), capability]).encode()).hexdigest()
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dyn_lightning"
        path = folder / f"per_sample-{version[:16]}.so"
        if (found := _load(path)) is None:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder):
                if (found := _load(path)) is None:  # nor has another process compiled it
                    path.unlink(missing_ok=True)
                    _compile(command, compiler, path)
                    found = ctypes.CDLL(str(path))
        return found
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        text = error.stderr.strip() if isinstance(error, subprocess.CalledProcessError) else str(error)
        warnings.warn(
            f"dynamic convolutions are slower: our C++ could not be compiled and loaded: {text}", stacklevel=2
        )
        return None


def call(name: str, sizes: Any, first: Tensor, *others: Tensor | None) -> None:
    """Call a function of the library for the first tensor's type of numbers.

    Args:
        name: of the function, without the type.
        sizes: the ``Sizes`` that it takes first.
        first: a dense tensor.
        others: likewise, or None for what is not wanted.
    """
    tensors = (first, *others)
    places = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    if 0 in places:  # that of an empty tensor, or of one whose memory was freed
        for tensor in tensors:
            if tensor is not None and tensor.numel() and not tensor.data_ptr():
                raise RuntimeError(f"a tensor of shape {tuple(tensor.shape)} has no memory (anymore)")
    _function(name, first.dtype, 1 + len(places))(sizes, *places)


@remembered
def _function(name: str, dtype: torch.dtype, count: int) -> Callable[..., None]:
    function = getattr(library(), f"{name}_{str(dtype).removeprefix('torch.')}")
    function.argtypes = [ctypes.c_void_p] * count
    return cast(Callable[..., None], function)


@torch.compiler.assume_constant_result
def is_compiled() -> bool:
    """Tell whether ``library`` gives one."""
    return library() is not None


def _load(path: Path) -> ctypes.CDLL | None:
    """Load a library, unless it is not there, damaged, or of a machine with newer libraries that shares the folder."""
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        return None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process compile while others wait: many compilers at once might run out of time or memory, and ranks
    without our C++ would take other methods than those that have it.
    """
    import fcntl  # exists on POSIX alone

    opened = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(opened, fcntl.LOCK_EX)
        yield
    finally:
        with contextlib.suppress(OSError):  # said, since a process that was forked meanwhile has it open too
            fcntl.flock(opened, fcntl.LOCK_UN)
        os.close(opened)


def _compile(command: list[str], linker: list[str], path: Path) -> None:
    """Compile into a file that is there when it is complete and was loaded once.

    Where there are no locks other processes may do the same: the first one's stays, since others may run it already.
    """
    # A network's file system keeps what is loaded in the folder until it is not anymore.
    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as folder:
        parts, whole = [f"{folder}/{source.stem}.o" for source in SOURCES], f"{folder}/whole.so"
        run = functools.partial(subprocess.run, check=True, capture_output=True, text=True, timeout=600)
        jobs = [[*command, "-c", str(source), "-o", part] for source, part in zip(SOURCES, parts, strict=True)]
        with ThreadPoolExecutor() as pool:
            list(pool.map(run, jobs))  # raises what one of them raised
        # Without OpenMP's library: the one that torch has loaded serves, and its threads.
        run([*linker, "-shared", *parts, "-o", whole])
        ctypes.CDLL(whole)
        try:
            os.link(whole, path)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            os.replace(whole, path)
