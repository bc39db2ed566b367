"""Keeps all cores at work: two streams side by side, the BLAS's threads, and settings of the operating system.

MLX's CPU back end runs the operations of a stream one by one, and each on one core except for products. So two streams
get independent halves of the work. More than two have not been tried.
"""

import contextlib
import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from mlx_gpt.cpu import blas

GIB = 2**30
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
T = TypeVar("T")
Tree = Any
"""Arrays in nested dicts, lists and tuples."""

_of_thread = threading.local()


def prepare() -> None:
    """Set what the process needs to train quickly. It may be called again."""
    keep_freed_memory()
    schedule_as_batch()


def keep_freed_memory() -> None:
    """Make glibc keep large blocks that are freed. Otherwise the system would clear them at each new use."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # only glibc has it
        libc.mallopt(M_MMAP_THRESHOLD, GIB)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def schedule_as_batch() -> None:
    """Keep this thread, which hands out work, from taking a core away from a computing thread as soon as it wakes.

    It still gets its share of the cores. Threads and processes that it starts from now on inherit this (sched(7)).
    """
    if hasattr(os, "SCHED_BATCH"):
        with contextlib.suppress(OSError):  # a sandbox may forbid it
            if os.sched_getscheduler(0) == os.SCHED_OTHER:
                os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def cores() -> int:
    """Return how many cores this process may use; the variables that BLAS libraries read can lower the number."""
    there = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = (os.environ.get(name, "") for name in ("MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"))
    return min([there, *(int(count) for count in asked if count.isdecimal() and int(count) > 0)])


def stream_count() -> int:
    """Return how many streams keep the cores at work."""
    return min(2, cores())


def divide_cores(products: int = 1) -> None:
    """Divide the cores among this many matrix products at a time."""
    blas.set_threads(max(1, cores() // products))


class _ClearStreams:
    """Ends the streams of a thread together with the thread, which holds the only reference to this."""

    def __del__(self) -> None:
        mx.clear_streams()


def end_with_thread() -> None:
    """Have MLX end the streams of this thread when it ends. Otherwise they would abort the process at its exit."""
    if threading.current_thread() is not threading.main_thread() and not hasattr(_of_thread, "clear"):
        _of_thread.clear = _ClearStreams()


def side_by_side(parts: Iterable[T]) -> Iterator[T]:
    """Yield each part while a stream of its own is the default, so that the parts are computed at the same time."""
    for i, part in enumerate(parts):
        with mx.stream(_further_stream(i) if i else mx.default_device()):
            yield part


def _further_stream(number: int) -> mx.Stream:
    """Return a stream of this thread, because MLX streams belong to the thread that made them."""
    streams: dict[int, mx.Stream] = vars(_of_thread).setdefault("streams", {})
    if number not in streams:
        streams[number] = mx.new_stream(mx.cpu)
    return streams[number]


def in_slices(function: Callable[..., Tree]) -> Callable[..., list[Tree]]:
    """Compute a function of a batch slice by slice, side by side; return the result of each slice.

    `function(parameters, key, *arrays)` is called with slices of the arrays, (B, ...); `key` is None or is split.
    """

    def compute(parameters: Tree, key: mx.array | None, *arrays: mx.array) -> list[Tree]:
        count = min(stream_count(), len(arrays[0]))
        divide_cores(count)
        cuts = [round(i * len(arrays[0]) / count) for i in range(1, count)]
        slices = zip(*(mx.split(array, cuts) for array in arrays), strict=True)
        keys = [None] * count if key is None else list(mx.random.split(key, count))
        return [function(parameters, k, *s) for k, s in side_by_side(zip(keys, slices, strict=True))]

    return compute


def add(trees: Sequence[Tree]) -> Tree:
    """Return the sum of trees of one structure, computing half of the leaves on each stream."""
    if len(trees) == 1:
        return trees[0]
    choose = balance()

    def total(*leaves: mx.array) -> mx.array:
        with choose(leaves[0].size):
            return functools.reduce(mx.add, leaves)

    return tree_map(total, *trees)


def balance() -> Callable[[int], contextlib.AbstractContextManager]:
    """Return a function that, given a size, makes the stream with the least work so far the default in a `with`."""
    totals = [0] * stream_count()

    def choose(size: int) -> contextlib.AbstractContextManager:
        number = totals.index(min(totals))
        totals[number] += size
        return mx.stream(_further_stream(number) if number else mx.default_device())

    return choose


def global_norm(gradients: Tree) -> mx.array:
    """Return the Euclidean norm of all arrays together, computed with the BLAS's inner product."""
    choose = balance()
    squares = []
    for _, gradient in tree_flatten(gradients):
        with choose(gradient.size):
            squares.append(mx.inner(gradient.flatten(), gradient.flatten()))
    return mx.sqrt(mx.stack(squares).sum())
