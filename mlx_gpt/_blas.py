"""Puts a tuned BLAS in place before MLX is imported.

The Linux CPU build of MLX links a reference BLAS, about forty times slower than a tuned one. It leaves the `cblas_*`
symbols open, so a library loaded globally *before* the first import of mlx serves them. macOS has Accelerate, which
MLX uses by itself: there this module does nothing.

`MLX_GPT_BLAS` names another library to load, or `off`.
"""

import ctypes
import os
import sys
from pathlib import Path

SYSTEM_OPENBLAS = ("libopenblas.so.0", "libopenblas.so")

live: str = "MLX's own"
"""What serves matrix products: the library that was loaded, or MLX's own choice."""

_library: ctypes.CDLL | None = None

problem: str = ""
"""Why the library named by `MLX_GPT_BLAS` was not loaded; said by the first command that computes."""


def load() -> None:
    """Load the BLAS named by `MLX_GPT_BLAS`, else a system OpenBLAS, else the `mkl` of this environment."""
    global live, problem, _library
    wanted = os.environ.get("MLX_GPT_BLAS", "")
    if wanted == "off" or sys.platform != "linux":
        return
    if "mlx.core" in sys.modules:
        live = "MLX's own, since mlx was imported before mlx_gpt"
        return
    # Equal products on equal operands, run after run, which exact resume relies on. MKL reads this when it is loaded.
    os.environ.setdefault("MKL_CBWR", "AUTO")
    installed = sorted(map(str, Path(sys.prefix, "lib").glob("libmkl_rt.so*")))
    for library in [wanted] if wanted else [*SYSTEM_OPENBLAS, *installed]:
        try:
            _library = ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
        except OSError as error:
            problem = (
                f"MLX_GPT_BLAS={wanted} can't be loaded ({error}): name a BLAS library, or `off`." if wanted else ""
            )
            continue
        live = library
        return


def set_threads(count: int) -> None:
    """Let one matrix product use so many cores; without a tuned BLAS it uses one."""
    for name in ("MKL_Set_Num_Threads", "openblas_set_num_threads"):
        if _library and hasattr(_library, name):
            getattr(_library, name)(count)
