"""All that differs between Metal, CUDA and the CPU."""

import contextlib
import ctypes
import dataclasses
import os
import platform
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import mlx.core as mx
import numpy as np

from mlx_gpt import _blas
from mlx_gpt.cpu import processes as cpu_processes
from mlx_gpt.errors import UserError

# MLX hands operations to its streams level by level of the graph, but branch by branch where one is wider than this:
# then a CPU's second stream would wait for the first. So no level is too wide, not even that of all gradients. It is
# read when MLX first computes.
if mx.default_device() == mx.cpu:
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", "100000")

GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
T = TypeVar("T")

_own = threading.local()


@dataclass(frozen=True)
class Device:
    """What a run needs to know of the device that it computes on.

    Attributes:
        name: as the system calls it.
        memory: bytes that the device has.
        usable: bytes that a run may take.
    """

    kind: Literal["metal", "cuda", "cpu"]
    name: str
    memory: int
    usable: int

    def __str__(self) -> str:
        return f"{self.name} ({self.kind}, {self.memory / GIB:.0f} GiB)"


def device() -> Device:
    """The device that MLX computes on by default.

    Raises:
        UserError: `MLX_GPT_BLAS` names a library that could not be loaded.
    """
    if _blas.problem:
        raise UserError(_blas.problem)
    on_metal, on_cuda = on_gpu() and mx.metal.is_available(), on_gpu() and mx.cuda.is_available()
    return device_from(on_metal, on_cuda, dict(mx.device_info()))


def on_gpu() -> bool:
    """Whether MLX computes on a GPU, whose exponentials are fast and whose attention is fused."""
    return mx.default_device() == mx.gpu


def device_from(on_metal: bool, on_cuda: bool, info: dict[str, str | int]) -> Device:
    """The device that `mx.device_info()` describes."""
    name = str(info.get("device_name", platform.processor() or platform.machine()))
    if on_metal:
        # Beyond this Metal starts to swap, and at the end of memory the process dies without a Python exception.
        return Device("metal", name, int(info["memory_size"]), int(info["max_recommended_working_set_size"]))
    if on_cuda:
        total = int(info.get("total_memory", info.get("memory_size", 0)))
        return Device("cuda", name, total, int(info.get("free_memory", total)))
    page = os.sysconf("SC_PAGE_SIZE")
    memory = page * os.sysconf("SC_PHYS_PAGES")
    return Device("cpu", name, memory, available() or memory)


def part_of(device: Device, processes: int) -> Device:
    """The device for one of as many processes on this host. On CUDA `mlx.launch` gives each a GPU of its own."""
    return device if device.kind == "cuda" else dataclasses.replace(device, usable=device.usable // processes)


def available(root: Path = Path("/")) -> int:
    """Bytes that Linux could give to this program now, caches that it would drop included; 0 where it doesn't say.

    A container's limit counts too (cgroup v2, or v1).
    """
    found = []
    with contextlib.suppress(OSError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    groups = root / "sys/fs/cgroup"
    for limit, used in (
        (groups / "memory.max", groups / "memory.current"),
        (groups / "memory/memory.limit_in_bytes", groups / "memory/memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is the word "max"
            found.append(int(limit.read_text()) - int(used.read_text()))
    return max(0, min(found, default=0))


def prepare(device: Device) -> None:
    """Set the limits under which this device trains well."""
    # MLX starts operations ahead of the one that runs; near this limit it waits for those before.
    mx.set_memory_limit(device.usable)
    if device.kind == "metal":
        # Memory that stays wired is not paged out between two steps.
        mx.set_wired_limit(device.usable)
    if device.kind == "cpu":
        _keep_freed_memory()
        _schedule_as_batch()


def _keep_freed_memory() -> None:
    """Have glibc keep large blocks that are freed: the system would clear them anew each time they are taken again."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # only glibc has it
        libc.mallopt(M_MMAP_THRESHOLD, GIB)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def _schedule_as_batch() -> None:
    """Have this thread, which hands out the work, not take a core from one that computes as soon as it is woken.

    It still gets its share of the cores. Threads and processes that it starts from now on inherit this (sched(7)).
    """
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def shares(*batches: np.ndarray, saving: bool = False) -> Iterator[list[mx.array]]:
    """Even shares of batches, one after the other; what is done with each is computed beside the others.

    MLX's CPU back end runs the operations of a stream one by one and, but for products, each on one core: there every
    share has a stream to itself. A GPU is filled by a single one.

    Args:
        saving: memory, rather than time: all in one share, so that a single set of gradients stands.
    """
    count = share_count(len(batches[0]), on_gpu(), saving)
    use_all_cores(count)
    for share in side_by_side(zip(*(np.split(batch, count) for batch in batches), strict=True)):
        yield [mx.array(part) for part in share]


def side_by_side(parts: Iterable[T]) -> Iterator[T]:
    """Each part in turn; what is done with it is computed beside the others, each on a CPU stream of its own."""
    for i, part in enumerate(parts):
        with mx.stream(_further_cpu_stream(i) if i else mx.default_device()):
            yield part


def parts(sizes: Mapping[str, int]) -> list[list[str]]:
    """The names in groups of about the same size together, one for each stream that the device is filled by."""
    groups: list[list[str]] = [[] for _ in range(stream_count(on_gpu()))]
    totals = [0] * len(groups)
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        smallest = totals.index(min(totals))
        groups[smallest].append(name)
        totals[smallest] += sizes[name]
    return groups


def share_count(batch_size: int, on_gpu: bool, saving: bool = False) -> int:
    """How many shares `shares` makes of a batch."""
    count = 1 if saving else stream_count(on_gpu)
    return count if batch_size % count == 0 else 1


def stream_count(on_gpu: bool) -> int:
    """How many streams fill the device. More than two have not been tried."""
    return 1 if on_gpu else min(2, cores())


def _further_cpu_stream(number: int) -> mx.Stream:
    """A stream of this thread: MLX's work on no other."""
    streams: dict[int, mx.Stream] = vars(_own).setdefault("streams", {})
    if number not in streams:
        streams[number] = mx.new_stream(mx.cpu)
    return streams[number]


def use_all_cores(products: int = 1) -> None:
    """Divide the cores among so many products at a time: one, unless streams compute side by side."""
    _blas.set_threads(max(1, cores() // products))


def cores() -> int:
    """Cores that this process may use, fewer if a variable that BLAS libraries read says so."""
    asked = (os.environ.get(name, "") for name in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"))
    return min([_cores_there(), *(int(count) for count in asked if count.isdecimal() and int(count) > 0)])


def _cores_there() -> int:
    """Cores that the system lets this process use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def share_host(number: int, processes: int) -> None:
    """Let as many processes compute on this host side by side; this is number `number`, from 0.

    Processes on a GPU have nothing to divide: `mlx.launch` gives each a GPU of its own, and a Mac runs one.
    """
    if not on_gpu():
        cpu_processes.take_cores(number, processes)
        cpu_processes.use_own_kernels(number)
        cpu_processes.let_the_launcher_idle()


def compute_dtype(precision: str, device: Device) -> mx.Dtype:
    """The dtype of the forward and backward pass for the setting `precision`.

    `auto` is bfloat16 on a GPU. On the CPU bfloat16 products bypass the BLAS and are dozens of times slower.
    """
    if precision == "auto":
        return mx.float32 if device.kind == "cpu" else mx.bfloat16
    return mx.float32 if precision == "float32" else mx.bfloat16


def seed_for(*numbers: int) -> int:
    """One 63-bit seed from several numbers, such as (seed, step, micro-step): each tuple has its own.

    SplitMix64's finaliser (Steele et al. 2014) mixes them in one after the other.
    """
    mixed = 0
    for number in numbers:
        mixed = (mixed + number + 0x9E3779B97F4A7C15) % 2**64
        mixed = (mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        mixed = (mixed ^ (mixed >> 27)) * 0x94D049BB133111EB % 2**64
        mixed ^= mixed >> 31
    return mixed >> 1
