"""The process as the system sees it, and several of them on one host."""

import contextlib
import functools
import os
import tempfile
from pathlib import Path


def keep_streams_busy() -> None:
    """Set the width of a level of the graph up to which MLX hands out operations level by level.

    Beyond it MLX takes one branch after the other, and a second stream would wait for the first. The gradients of all
    parameters are such a level. MLX reads the variable when it first computes.
    """
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "100000")


@functools.cache
def all_cores() -> tuple[int, ...]:
    """The cores that the system let this process use before `take_cores`."""
    return tuple(sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def take_cores(number: int, processes: int) -> None:
    """Use only this process's part of the cores from now on, at least one.

    Linux keeps all threads of the process on them. MLX's ring waits busily, and so takes no time from the others.

    Args:
        number: this process's, from 0.
        processes: how many processes divide the cores.
    """
    cores = all_cores()
    count = max(1, len(cores) // processes)
    if hasattr(os, "sched_setaffinity"):
        first = number * len(cores) // processes
        for thread in Path("/proc/self/task").iterdir():
            with contextlib.suppress(OSError):  # it has ended
                os.sched_setaffinity(int(thread.name), cores[first : first + count])
    asked = os.environ.get("OMP_NUM_THREADS", "")
    os.environ["OMP_NUM_THREADS"] = str(min(count, int(asked)) if asked.isdecimal() and int(asked) else count)


def use_own_kernels(number: int) -> None:
    """Keep the kernels that process number `number` compiles in a folder of its own, the same each time.

    MLX writes a kernel in place, so another process could load half a file. Number 0 stays in the usual folder.
    """
    name = f"mlx-gpt-{os.getuid()}-{number}"
    folder = Path(tempfile.gettempdir())
    if number and folder.name != name:
        folder = folder / name
        folder.mkdir(exist_ok=True)
        os.environ["TMPDIR"] = str(folder)


def let_the_launcher_idle() -> None:
    """Run `mlx.launch` only when nothing else runs: it watches its processes in a busy loop, which takes a whole core.

    Only Linux lets a process do this to its parent.
    """
    parent = Path(f"/proc/{os.getppid()}")
    with contextlib.suppress(OSError):
        if b"mlx.launch" in (parent / "cmdline").read_bytes():
            for thread in (parent / "task").iterdir():
                os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))
