"""The processes that train one model together. `mlx.launch` starts them; each is a *rank*, and knows its number.

Arrays travel by `mlx.distributed` (ring, JACCL or NCCL, as `mlx.launch` says). All else goes over a TCP connection of
each rank to rank 0: what rank 0 has decided, numbers to add up, and the news that a rank has failed or died, of which
`mlx.distributed` tells some ranks little and others nothing.

Rank 0 decides, writes and speaks; the others follow. A process that `mlx.launch` has not started is rank 0 of one.
"""

import contextlib
import itertools
import json
import os
import platform
import queue
import secrets
import socket
import tempfile
import threading
import time
import traceback
import uuid
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gpt import backend
from mlx_gpt.errors import RunError, in_a_sentence

Arrays = TypeVar("Arrays")
Value = TypeVar("Value")

GRACE = 3.0  # seconds in which a thread that knows better may speak first
PATIENCE = 20.0  # seconds to connect
# A host that is suddenly off says nothing: after 15 idle seconds it is asked, every 5 seconds, at most 5 times; what
# is sent to it is given up after 40,000 ms. The names differ between systems.
SIGNS_OF_LIFE = {
    "TCP_KEEPIDLE": 15, "TCP_KEEPALIVE": 15, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 5, "TCP_USER_TIMEOUT": 40_000,
}  # fmt: skip
JOURNEY = 2**25  # bytes
LOOPBACK = "127.0.0.1"
INVITATION, GREETING = 4096, 64  # bytes


class Ranks:
    """A process by itself, for which nothing has to be done. `Launched` is one of several.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        here: how many of them are on this host.
    """

    rank, size, here = 0, 1, 1

    @property
    def first(self) -> bool:
        """Whether this is the one that decides, writes and speaks."""
        return self.rank == 0

    def share(self, value: Value) -> Value:
        """Rank 0's value, which JSON can hold, on every rank."""
        return value

    def total(self, *numbers: float) -> list[float]:
        """The sum of each number over the ranks, the same to the bit on all."""
        return list(numbers)

    def any(self, *wishes: bool) -> Sequence[bool]:
        """Which of these wishes any rank has, asked by all ranks after each step.

        Of several ranks all get the same answer, without waiting for it: what was wished after the step before.
        """
        return wishes

    def mean(self, arrays: Arrays) -> Arrays:
        """The mean of arrays over the ranks, the same to the bit on all."""
        return arrays

    def copy(self, arrays: Arrays) -> Arrays:
        """Rank 0's arrays, of 4 bytes a number, on every rank."""
        return arrays

    def in_turns(self, work: Callable[[], Value]) -> Value:
        """Do `work` on one rank of each host, then on the others, which find there what that one has prepared."""
        return work()

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave; with an error, have all ranks end."""


ALONE = Ranks()


class Link:
    """A connection to another rank; a thread reads it.

    Args:
        on_loss: called by that thread when the other rank has failed, with its words and exit code, or has died, with
            None and 1.
    """

    def __init__(self, rank: int, connection: socket.socket, on_loss: "OnLoss") -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in SIGNS_OF_LIFE.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        connection.settimeout(None)
        self.rank = rank
        self.left, self.closed = threading.Event(), threading.Event()
        self._connection, self._on_loss = connection, on_loss
        self._values: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._read, name=f"link to rank {rank}", daemon=True).start()

    def send(self, kind: str, *content: Any) -> None:
        """Send a "value", "failed" or "left". To one that has gone it sends nothing: the thread tells of that."""
        with contextlib.suppress(OSError):
            self._connection.sendall(json.dumps([kind, *content]).encode() + b"\n")

    def receive(self) -> Any:
        """The next value; waits for it."""
        return self._values.get()

    def _read(self) -> None:
        lost: tuple[str | None, int] = (None, 1)
        with contextlib.suppress(OSError, ValueError):  # the host has gone, or the process in the midst of a line
            for line in self._connection.makefile("rb"):
                kind, *content = json.loads(line)
                if kind == "value":
                    self._values.put(content[0])
                elif kind == "left":
                    self.left.set()
                elif kind == "failed":
                    lost = (content[0], content[1])
                    break
        self.closed.set()
        if not self.left.is_set():
            self._on_loss(self, *lost)


OnLoss = Callable[[Link, str | None, int], None]


class Launched(Ranks):
    """One of several ranks. Entering it waits for the others.

    When one fails, all end with its exit code, and rank 0 says what it was. When one dies, all end with 1.
    """

    def __init__(self, group: mx.distributed.Group) -> None:
        self.rank, self.size = group.rank(), group.size()
        self._group = group
        # NCCL adds up on the GPU; the others add up on the CPU, whatever computes.
        self._stream = None if backend.on_gpu() and mx.cuda.is_available() else mx.cpu
        self._ending = threading.Lock()  # held by the thread that ends the process
        self._wishes: mx.array | None = None
        self._links = self._connect()
        hosts = self.share(self._gather(f"{platform.node()} {uuid.getnode()}"))
        self.here = hosts.count(hosts[self.rank])
        number = hosts[: self.rank].count(hosts[self.rank])
        self._first_here = number == 0
        backend.take_cores(number, self.here)

    def share(self, value: Value) -> Value:
        if not self.first:
            return self._links[0].receive()
        for link in self._links:
            link.send("value", value)
        return value

    def total(self, *numbers: float) -> list[float]:
        return self.share([sum(column) for column in zip(*self._gather(numbers), strict=True)])

    def any(self, *wishes: bool) -> Sequence[bool]:
        before, self._wishes = self._wishes, self._sum(mx.array(wishes, mx.int32))
        mx.async_eval(self._wishes)
        return [False] * len(wishes) if before is None else [count > 0 for count in before.tolist()]

    def mean(self, arrays: Arrays) -> Arrays:
        if backend.on_gpu() and mx.metal.is_available():
            # macOS ends a GPU command that waits for seconds, as for a slower rank: so none is left waiting.
            mx.eval(arrays)
            arrays = nn.average_gradients(arrays, self._group, communication_stream=self._stream)
            mx.eval(arrays)
            return arrays
        return nn.average_gradients(arrays, self._group, communication_stream=self._stream)

    def copy(self, arrays: Arrays) -> Arrays:
        names, originals = zip(*tree_flatten(arrays), strict=True)
        copies: list[mx.array] = []
        for group in _groups(originals):
            ends = list(itertools.accumulate(array.size for array in group))
            bits = mx.zeros(ends[-1], mx.uint32)
            if self.first:  # bits, since 0 + -0.0 would be 0.0
                bits = mx.concatenate([array.view(mx.uint32).flatten() for array in group])
            for array, part in zip(group, mx.split(self._sum(bits), ends[:-1]), strict=True):
                copies.append(part.view(array.dtype).reshape(array.shape))
            mx.eval(copies)  # so that all ranks add up group after group
        return tree_unflatten(list(zip(names, copies, strict=True)))

    def in_turns(self, work: Callable[[], Value]) -> Value:
        done = [work()] if self._first_here else []
        self.total()
        done = done or [work()]
        self.total()
        return done[0]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None or (isinstance(error, SystemExit) and not error.code):
            self._leave()
            return
        if isinstance(error, RuntimeError) and not isinstance(error, RunError):
            time.sleep(GRACE)  # MLX may have met a rank that died: the link to it knows, and ends this process
        self._ending.acquire()
        words, code = in_a_sentence(error)
        if self.first:
            self._tell("", code)  # the words are for whoever has called
            return
        try:
            self._tell(f"Rank {self.rank}: {words}", code)
            if "MLX_GPT_TRACEBACK" in os.environ:
                traceback.print_exception(error)
            self._links[0].closed.wait(2 * GRACE)  # ending first would have mlx.launch kill rank 0 before it speaks
        finally:
            os._exit(code)

    def _leave(self) -> None:
        """Wait until all are done, for mlx.launch ends all when one ends with another code than 0."""
        for link in self._links:
            link.send("left")
        for link in self._links:
            link.left.wait()

    def _lost(self, link: Link, words: str | None, code: int) -> None:
        """End this process, since another one has; MLX may be waiting for it, so no exception would do."""
        if words:
            time.sleep(GRACE)  # what all have met, as Ctrl-C, rank 0 says for itself
        self._ending.acquire()
        if words is None:
            words = (
                f"Rank {link.rank} has died, and the others can't go on without it. What was saved is whole: go on "
                "from there with --resume, with as many ranks as you like."
            )
        try:
            if self.first:
                self._tell("", code)
            elif not words:  # rank 0 is about to speak; ending first would have mlx.launch kill it
                link.closed.wait(2 * GRACE)
            if words:  # on a line of its own, whatever MLX or a progress bar has begun there
                os.write(2, f"\nError: {words}\n".encode())
        finally:  # whoever was to read that may have gone
            os._exit(code)

    def _tell(self, words: str, code: int) -> None:
        for link in self._links:
            link.send("failed", words, code)

    def _sum(self, array: mx.array) -> mx.array:
        return mx.distributed.all_sum(array, group=self._group, stream=self._stream)

    def _gather(self, value: Value) -> list[Value]:
        """Every rank's value on rank 0, in their order; nothing on the others."""
        if self.first:
            return [value, *(link.receive() for link in self._links)]
        self._links[0].send("value", value)
        return []

    def _connect(self) -> list[Link]:
        """Links to all others on rank 0, and on them to rank 0. It comes with a token that only they can know."""
        if self.first:
            addresses = own_addresses()
            server = socket.create_server((LOOPBACK if addresses[0] == LOOPBACK else "", 0), backlog=self.size)
            invitation = [addresses, server.getsockname()[1], secrets.token_hex(16)]
            text = json.dumps(invitation).ljust(INVITATION).encode()
            self._sum(mx.array(np.frombuffer(text, np.uint8).astype(np.int32))).tolist()
            self._agree_to_have_reached(addresses, True)
            return [Link(rank, guest, self._lost) for rank, guest in sorted(self._welcome(server, invitation[2]))]
        received = self._sum(mx.zeros(INVITATION, mx.int32)).tolist()
        addresses, port, token = json.loads(bytes(received))
        connection = reach(addresses, port)
        self._agree_to_have_reached(addresses, connection is not None)
        assert connection is not None
        connection.sendall(f"{token} {self.rank}".encode().ljust(GREETING))
        return [Link(0, connection, self._lost)]

    def _agree_to_have_reached(self, addresses: list[str], reached: bool) -> None:
        missing = self._sum(mx.array([rank == self.rank and not reached for rank in range(self.size)], mx.int32))
        if ranks := [str(rank) for rank, count in enumerate(missing.tolist()) if count]:
            time.sleep(0 if self.first else 2 * GRACE)  # mlx.launch ends all as soon as one has ended
            raise SystemExit(
                f"Error: Rank {', '.join(ranks)} can't reach rank 0 at {' or '.join(addresses)}: let TCP connections "
                "through, or name hosts in the host file that reach each other."
                if self.first
                else 1
            )

    def _welcome(self, server: socket.socket, token: str) -> list[tuple[int, socket.socket]]:
        guests: list[tuple[int, socket.socket]] = []
        server.settimeout(PATIENCE)
        with server:
            while len(guests) < self.size - 1:
                guest, _ = server.accept()
                guest.settimeout(PATIENCE)
                with contextlib.suppress(OSError, ValueError):  # a stranger
                    shown, _, rank = guest.recv(GREETING, socket.MSG_WAITALL).partition(b" ")
                    if secrets.compare_digest(shown, token.encode()):
                        guests.append((int(rank), guest))
        return guests


def _groups(arrays: Sequence[mx.array]) -> Iterator[list[mx.array]]:
    """Arrays one after the other, in groups that are worth a journey and stay small beside the memory."""
    group: list[mx.array] = []
    for array in arrays:
        group.append(array)
        if sum(member.nbytes for member in group) >= JOURNEY:
            yield group
            group = []
    if group:
        yield group


def is_first() -> bool:
    """Whether this is the process that speaks; can be asked before the ranks have met."""
    return os.environ.get("MLX_RANK", "0") == "0"


def join() -> Ranks:
    """The ranks that this process is one of; without `mlx.launch`, or with only one rank, itself.

    Raises:
        SystemExit: they can't find each other; the message says why.
    """
    hostfile = os.environ.get("MLX_HOSTFILE")
    if "MLX_RANK" not in os.environ or (hostfile and not Path(hostfile).read_text().strip()):  # mlx.launch -n 1
        return ALONE
    if not is_first():
        use_own_kernels()
    let_the_launcher_idle()
    try:
        group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        raise SystemExit(f"Error: Rank {os.environ['MLX_RANK']} can't find the others: {error}") from None
    return Launched(group) if group.size() > 1 else ALONE


def use_own_kernels() -> None:
    """Keep this rank's compiled kernels apart: MLX writes them in place, and another rank could load half a file.

    The folder is the same each time, so that they are found again.
    """
    name = f"mlx-gpt-{os.getuid()}-rank-{os.environ['MLX_RANK']}"
    folder = Path(tempfile.gettempdir())
    if folder.name != name:
        folder = folder / name
        folder.mkdir(exist_ok=True)
        os.environ["TMPDIR"] = str(folder)


def let_the_launcher_idle() -> None:
    """Have `mlx.launch` run when nothing else does: it looks after its ranks without a pause, which takes a whole core.

    Only Linux lets a process do that to its parent.
    """
    parent = Path(f"/proc/{os.getppid()}")
    with contextlib.suppress(OSError):
        if b"mlx.launch" in (parent / "cmdline").read_bytes():
            for thread in (parent / "task").iterdir():
                os.sched_setscheduler(int(thread.name), os.SCHED_IDLE, os.sched_param(0))


def own_addresses() -> list[str]:
    """Where others may reach this host: where MLX does, if it tells, and by its name."""
    told = []
    if hostfile := os.environ.get("MLX_HOSTFILE"):
        told = json.loads(Path(hostfile).read_text())[0]
    elif coordinator := os.environ.get("MLX_JACCL_COORDINATOR"):
        told = [coordinator]
    elif host := os.environ.get("NCCL_HOST_IP"):
        told = [f"{host}:"]
    return [*dict.fromkeys([address.rpartition(":")[0] for address in told] + [platform.node()])]


def reach(addresses: Sequence[str], port: int) -> socket.socket | None:
    """A connection to the first address that answers; None if none does in time."""
    for address in addresses:
        with contextlib.suppress(OSError):
            return socket.create_connection((address, port), timeout=PATIENCE / len(addresses))
    return None
