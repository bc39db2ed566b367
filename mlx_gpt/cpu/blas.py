"""Loads a tuned BLAS before MLX is imported.

The Linux CPU build of MLX links a reference BLAS, a hundred times slower than a tuned one. It leaves the `cblas_*`
symbols open, so a library that is loaded globally *before* the first import of mlx provides them. PyPI's OpenBLAS has
them under other names, so `cblas.cpp` connects the two. It is compiled on first use, by the compiler that MLX itself
needs. macOS has Accelerate, which MLX uses by itself, so there this module does nothing.

`MLX_GPT_BLAS` names another library to load, or `off`.
"""

import contextlib
import ctypes
import importlib.util
import os
import platform
import sys
import zlib
from pathlib import Path

COMPILER = ("g++", "-std=c++17", "-O2", "-march=native", "-shared", "-fPIC")

live: str = "MLX's own"
"""The library that computes matrix products: the one that was loaded, or MLX's own choice."""

problem: str = ""
"""Why the library named by `MLX_GPT_BLAS` was not loaded. The first command that computes reports it."""

_library: ctypes.CDLL | None = None


def load() -> None:
    """Load the BLAS named by `MLX_GPT_BLAS`, else the OpenBLAS of this environment."""
    global live, problem, _library
    wanted = os.environ.get("MLX_GPT_BLAS", "")
    if wanted == "off" or sys.platform != "linux":
        return
    if "mlx.core" in sys.modules:
        live = "MLX's own, since mlx was imported before mlx_gpt"
        return
    try:
        if wanted:
            # MKL reads this. It makes equal operands give equal products in every run, which an exact resume needs.
            os.environ.setdefault("MKL_CBWR", "AUTO")
            _library = ctypes.CDLL(wanted, ctypes.RTLD_GLOBAL)
            live = wanted
        elif package := importlib.util.find_spec("scipy_openblas32"):
            _library = _openblas(Path(str(package.origin)).parent / "lib" / "libscipy_openblas.so")
            live = _name(_library)
        else:
            live = "MLX's own, since scipy-openblas32 is not installed"
    except OSError as error:
        if wanted:
            problem = f"MLX_GPT_BLAS={wanted} can't be loaded ({error}): name a BLAS library, or `off`."
        else:
            live = f"MLX's own, since OpenBLAS can't be used ({error})"


def set_threads(count: int) -> None:
    """Let one matrix product use this many cores; without a tuned BLAS it uses one."""
    for name in ("scipy_openblas_set_num_threads", "openblas_set_num_threads", "MKL_Set_Num_Threads"):
        if _library and hasattr(_library, name):
            getattr(_library, name)(count)


def _openblas(path: Path) -> ctypes.CDLL:
    """Load the library, and the code that gives its function the name that MLX calls.

    Raises:
        OSError: one of them can't be loaded or compiled.
    """
    library = ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
    source = Path(__file__).with_name("cblas.cpp")
    # Path's own `expanduser` would fail if there is no home.
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "mlx-gpt")  # noqa: PTH111
    made_of = " ".join([*COMPILER, _processor()]).encode() + source.read_bytes()
    compiled = cache / f"cblas-{zlib.crc32(made_of):08x}-{platform.machine()}.so"
    if cache.is_absolute():
        with contextlib.suppress(OSError):
            cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    private = _is_private(cache)
    try:
        if not private:
            raise OSError(f"{compiled} may be somebody else's")
        ctypes.CDLL(str(compiled), ctypes.RTLD_GLOBAL)
    except OSError:
        _compile(source, compiled if private else None)
    return library


def _is_private(folder: Path) -> bool:
    """Return whether nobody else can have put anything there. Without a home, the path is relative: not private."""
    try:
        facts = folder.stat()
    except OSError:
        return False
    return folder.is_absolute() and facts.st_uid == os.getuid() and not facts.st_mode & 0o022


def _processor() -> str:
    """Return the instructions that the processor knows: code compiled for one may not run on another."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open() as lines:
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return ""


def _compile(source: Path, compiled: Path | None) -> None:
    """Compile and load `source`, and keep the result as `compiled` for the next time, if that file can be written."""
    import shutil
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder, "cblas.so")
        command = [*COMPILER, "-o", str(made), str(source)]
        try:
            subprocess.run(command, check=True, capture_output=True)
        except subprocess.CalledProcessError as error:
            raise OSError(f"{' '.join(command)}: {error.stderr.decode(errors='replace').strip()}") from None
        ctypes.CDLL(str(made), ctypes.RTLD_GLOBAL)
        if not compiled:
            return
        with contextlib.suppress(OSError):
            whole = compiled.with_name(f"{compiled.name}.{os.getpid()}")
            shutil.copyfile(made, whole)
            whole.replace(compiled)


def _name(openblas: ctypes.CDLL) -> str:
    """Return OpenBLAS's version and the kernels that it chose for this processor."""
    openblas.scipy_openblas_get_config.restype = openblas.scipy_openblas_get_corename.restype = ctypes.c_char_p
    version = openblas.scipy_openblas_get_config().decode().split()[1]
    return f"OpenBLAS {version} ({openblas.scipy_openblas_get_corename().decode()})"
