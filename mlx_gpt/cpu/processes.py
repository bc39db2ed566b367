"""Settings of the process in the operating system, also for several processes on one host."""

import contextlib
import functools
import os
import tempfile
from pathlib import Path


def keep_streams_busy() -> None:
    """Set how wide a level of the graph may be for MLX to hand out operations level by level.

    If a level is wider, MLX takes one branch after the other, and a second stream would wait for the first. The
    gradients of all parameters form such a wide level. MLX reads the variable when it first computes.
    """
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "100000")


@functools.cache
def all_cores() -> tuple[int, ...]:
    """Return the cores that the system let this process use before `take_cores`."""
    return tuple(sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1))


def take_cores(number: int, processes: int) -> None:
    """Use only this process's share of the cores from now on, at least one.

    Linux keeps all threads of the process on these cores, so the busy waiting of MLX's ring takes no time from other
    processes.

    Args:
        number: the number of this process, from 0.
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

    MLX writes a kernel in place, so another process could load half a file. Process 0 keeps the usual folder.
    """
    name = f"mlx-gpt-{os.getuid()}-{number}"
    folder = Path(tempfile.gettempdir())
    if number and folder.name != name:
        folder = folder / name
        folder.mkdir(exist_ok=True)
        os.environ["TMPDIR"] = str(folder)


def let_the_launcher_idle() -> None:
    """Run `mlx.launch` only when nothing else runs, because it watches its processes in a busy loop that takes a whole
    core.

    Only Linux lets a process do this to its parent.
    """
    parent = Path(f"/proc/{os.getppid()}")
    with contextlib.suppress(OSError):
        if b"mlx.launch" in (parent / "cmdline").read_bytes():
            for thread in (parent / "task").iterdir():
                os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))
