"""The processes that train one model together. `mlx.launch` starts and ends them; each is a *rank* and has a number.

Everything travels through `mx.distributed`: ring, JACCL or NCCL, whichever `mlx.launch` has set up. Rank 0 decides,
writes and reports; the others follow.

When a rank exits with an error or is killed, `mlx.launch` sends SIGTERM to the others. On a ring they also notice by
themselves, since an exchange with a rank that has gone raises an error. JACCL and NCCL may wait for it forever, and
Python handles no signal during that wait, so a thread ends the process 30 seconds after the first signal, or soon after
the second. The thread sees only the waits inside `Ranks`. On CUDA `sum` returns without waiting, so the next `any` has
to wait for its result.
"""

import contextlib
import itertools
import json
import math
import os
import platform
import select
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place

# isort: split

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_gpt.errors import RunError, UserError

Arrays = TypeVar("Arrays")
Value = TypeVar("Value")

MESSAGE = 2**25  # bytes: large enough to travel well, small beside the memory
STUCK = 30.0  # seconds that a wait for the other ranks may last after a signal
HEAD_START = 10.0  # seconds for rank 0 to report an error that all ranks have met
LOST = (
    "Another rank has ended, so this run cannot continue. Everything saved so far is complete: continue with "
    "mlx-gpt train --resume, on as many ranks as you like."
)


class Ranks:
    """The ranks, as one of them sees them. Without a group, this is a single process.

    Attributes:
        rank: the number of this rank, from 0.
        size: the number of ranks.
        here: the number of ranks on this host.
        number_here: the number of this rank among those on this host, from 0.
    """

    rank, size, here, number_here = 0, 1, 1, 0

    def __init__(self, group: mx.distributed.Group | None = None) -> None:
        self._group = group
        self._wishes: mx.array | None = None
        self._waits_since = math.inf
        if group:
            self.rank, self.size = group.rank(), group.size()
            hosts = self._gather(f"{platform.node()} {uuid.getnode()}")
            self.here = hosts.count(hosts[self.rank])
            self.number_here = hosts[: self.rank].count(hosts[self.rank])

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which decides, writes and reports."""
        return self.rank == 0

    def broadcast(self, value: Value) -> Value:
        """Return rank 0's value, which JSON must be able to represent, on every rank."""
        return self._gather(value if self.first else None)[0]

    def total(self, *numbers: float) -> list[float]:
        """Return the sum of each number over the ranks, in float64 and the same to the bit on all ranks."""
        return [sum(map(float, column)) for column in zip(*self._gather([*map(float, numbers)]), strict=True)]

    def any(self, *wishes: bool) -> Sequence[bool]:
        """Return, for each of these wishes, whether any rank has it. All ranks call this after each step.

        If there are several ranks, the answer is that of the step before, so that no step waits for it.
        """
        if not self._group:
            return wishes
        before, self._wishes = self._wishes, mx.distributed.all_sum(mx.array(wishes, mx.int32), group=self._group)
        mx.async_eval(self._wishes)
        return [False] * len(wishes) if before is None else [count > 0 for count in self._wait(before).tolist()]

    def sum(self, arrays: Arrays) -> Arrays:
        """Return the sum of a tree of arrays over the ranks, the same to the bit on all. Only CUDA defers it."""
        if not self._group:
            return arrays
        on_cuda = mx.default_device() == mx.gpu and mx.cuda.is_available()
        if not on_cuda:
            mx.eval(arrays)  # Metal ends a GPU command that waits for seconds, as it would for a slow rank
        leaves = tree_flatten(arrays)
        sums: dict[str, mx.array] = {}
        with contextlib.nullcontext() if on_cuda else mx.stream(mx.cpu):
            for message in _messages(leaves):
                joined = mx.concatenate([array.flatten() for _, array in message])
                joined = mx.distributed.all_sum(joined, group=self._group)
                ends = np.cumsum([array.size for _, array in message]).tolist()
                for (name, array), part in zip(message, mx.split(joined, ends[:-1]), strict=True):
                    sums[name] = part.reshape(array.shape)
                if not on_cuda:
                    self._wait(*(sums[name] for name, _ in message))
        return tree_unflatten([(name, sums[name]) for name, _ in leaves])

    def copy(self, arrays: Arrays) -> Arrays:
        """Return rank 0's tree of arrays, bit for bit, on every rank. All ranks have the same shapes and dtypes."""
        if not self._group:
            return arrays

        def bits(array: mx.array) -> mx.array:  # as integers, because -0.0 + 0.0 is 0.0
            flat = array.flatten().view(mx.uint32 if array.itemsize % 4 == 0 else mx.uint8)
            return flat if self.first else mx.broadcast_to(mx.array(0, flat.dtype), flat.shape)

        copies = self.sum(tree_map(bits, arrays))
        return tree_map(lambda copy, array: copy.view(array.dtype).reshape(array.shape), copies, arrays)

    def in_turns(self, work: Callable[[], Value]) -> Value:
        """Do `work` on one rank of each host, then on the other ranks, which find what the first one has prepared.

        Raises:
            UserError: `work` raised it on one of the ranks; then all ranks raise it.
        """
        if not self._group:
            return work()
        done: list[Value] = []
        for has_turn in (self.number_here == 0, self.number_here > 0):
            problem = None
            if has_turn:
                try:
                    done.append(work())
                except UserError as error:
                    problem = str(error)
            for rank, found in enumerate(self._gather(problem)):
                if found:
                    raise UserError(f"Rank {rank}: {found}" if rank else found)
        return done[0]

    def __enter__(self) -> "Ranks":
        if self._group and threading.current_thread() is threading.main_thread():  # signals interrupt no other
            reading, writing = os.pipe()
            os.set_blocking(writing, False)
            signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
            threading.Thread(target=self._end_if_stuck, args=(reading,), daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Wait until the other ranks leave, too. A rank that leaves with an error must exit, which ends all ranks.

        Raises:
            RunError: in place of MLX's error, when another rank has ended before.
        """
        if not self._group:
            return
        with contextlib.suppress(ValueError):  # as in `__enter__`
            os.close(signal.set_wakeup_fd(-1))  # which ends the thread
        if error is None or (isinstance(error, SystemExit) and not error.code):
            # mlx.launch ends all ranks when one exits with another code than 0, and rank 0 may still be saving.
            with contextlib.suppress(RuntimeError):  # another rank has ended, but this one is done
                self.total()
        if isinstance(error, UserError | RunError) and not self.first:
            # All ranks have this error: rank 0 reports it, and mlx.launch ends this rank meanwhile.
            time.sleep(HEAD_START)
        if str(error).startswith(("[ring]", "[jaccl]", "[nccl]")):
            # Rank 0 reports the error, and so does rank 1, in case rank 0 was killed. Before the first step, rank 0
            # ends only after it has reported a user's mistake.
            if self.first or (self.rank == 1 and self._wishes is not None):
                raise RunError(LOST) from None
            raise SystemExit(1) from None

    def _end_if_stuck(self, reading: int) -> None:
        """End the process if the other ranks keep it waiting after a signal. `reading` gives a byte for each signal."""
        with open(reading, "rb", buffering=0) as signals:
            patience, begin = STUCK, time.monotonic() if signals.read(1) else math.inf
            while begin < math.inf:
                if select.select([signals], [], [], 1)[0]:
                    patience, begin = 1, begin if signals.read(1) else math.inf
                if time.monotonic() - max(begin, self._waits_since) > patience:
                    os.write(2, f"\nError: Rank {self.rank} has ended, because another rank did not answer.\n".encode())
                    os._exit(1)

    def _wait(self, *arrays: mx.array) -> mx.array:
        """Wait for the other ranks until these arrays are there; return the first."""
        self._waits_since = time.monotonic()
        try:
            mx.eval(arrays)
        finally:
            self._waits_since = math.inf
        return arrays[0]

    def _gather(self, value: Any) -> list[Any]:
        """Return every rank's value, which JSON must be able to represent, in the order of the ranks."""
        if not self._group:
            return [value]
        data = json.dumps(value).encode()
        lengths = self._wait(mx.distributed.all_gather(mx.array([len(data)]), group=self._group)).tolist()
        padded = mx.array(np.frombuffer(data.ljust(max(lengths)), np.uint8))
        rows = self._wait(mx.distributed.all_gather(padded[None], group=self._group))
        return [json.loads(bytes(row[:length])) for row, length in zip(np.array(rows), lengths, strict=True)]


def _messages(leaves: Sequence[tuple[str, mx.array]]) -> Iterator[list[tuple[str, mx.array]]]:
    """Yield named arrays in groups of one dtype and of about `MESSAGE` bytes, in the same order on all ranks."""
    ordered = sorted(leaves, key=lambda leaf: (str(leaf[1].dtype), leaf[0]))
    ends = itertools.accumulate(array.nbytes for _, array in ordered)
    # An array belongs to the message in which it ends.
    numbered = zip(ordered, (end // MESSAGE for end in ends), strict=True)
    for _, message in itertools.groupby(numbered, lambda leaf: (str(leaf[0][1].dtype), leaf[1])):
        yield [leaf for leaf, _ in message]


def is_first() -> bool:
    """Return whether this is rank 0; works before the ranks have met."""
    return os.environ.get("MLX_RANK", "0") == "0"


def join() -> Ranks:
    """Meet the other ranks that `mlx.launch` has started. Without `mlx.launch`, the process is alone.

    Raises:
        RunError: the others cannot be reached.
    """
    hostfile = os.environ.get("MLX_HOSTFILE")
    if "MLX_RANK" not in os.environ or (hostfile and not Path(hostfile).read_text().strip()):  # mlx.launch -n 1
        return ALONE
    try:
        group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        raise RunError(f"The other ranks cannot be reached ({error}): check the hosts given to mlx.launch.") from None
    return Ranks(group) if group.size() > 1 else ALONE


ALONE = Ranks()
