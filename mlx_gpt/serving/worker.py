"""The thread that computes: it steps the engines, and hands what they make to the event loop.

MLX is used by this thread alone; everything else here belongs to the event loop.
"""

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from mlx_gpt.generation.chat_template import ChatTemplate
from mlx_gpt.generation.engine import Engine, Request
from mlx_gpt.generation.stop_strings import Piece
from mlx_gpt.serving.metrics import Metrics
from mlx_gpt.tokenizer import Tokenizer

Event = tuple[int, Piece] | Exception

log = logging.getLogger("mlx_gpt")


class BusyError(Exception):
    """So many texts are waiting that no more are taken.

    Attributes:
        retry_after: seconds after which it may be worth trying again.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"The server is busy: try again in {retry_after} seconds.")
        self.retry_after = retry_after


class EngineError(Exception):
    """The engine met an error, and the request is lost."""


@dataclass(frozen=True)
class Served:
    """A model that can be asked.

    Attributes:
        name: under which it is known.
        folder: the run or model directory that it was loaded from.
        n_positions: its context, in tokens.
        template: how a conversation is written for it; None if it was not trained on any.
    """

    name: str
    folder: Path
    tokenizer: Tokenizer
    n_positions: int
    n_params: int
    template: ChatTemplate | None
    engine: Callable[[], Engine]


@dataclass(eq=False)
class Job:
    """The texts that one HTTP request asks for: its pieces come in order, each with the number of its prompt.

    Attributes:
        events: a prompt's number and a piece of its text, or an error.
    """

    served: Served
    requests: Sequence[Request]
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    began: float = field(default_factory=time.monotonic)
    left: int = 0

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Each piece, with the number of its prompt, until all texts have ended.

        Raises:
            EngineError: the engine did.
        """
        while self.left:
            event = await self.events.get()
            if isinstance(event, Exception):
                raise event
            self.left -= bool(event[1].reason)
            yield event


@dataclass
class _Asked:
    """A request in an engine: whose it is, its number there, and how many texts are still to end."""

    job: Job
    number: int
    left: int


class Worker:
    """Makes the texts of all jobs.

    Args:
        load: loads the models, by name; called by the thread.
        max_batch: texts of each model that are made at a time.
        max_queue: texts that may wait beyond these.
    """

    def __init__(
        self, load: Callable[[], Mapping[str, Served]], max_batch: int, max_queue: int, metrics: Metrics
    ) -> None:
        self.models: Mapping[str, Served] = {}
        self.max_batch, self.max_queue, self._metrics = max_batch, max_queue, metrics
        self._load = load
        self._loop: asyncio.AbstractEventLoop | None = None
        self._commands: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._jobs: set[Job] = set()
        self._seconds_per_text = 1.0  # a running average
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loaded: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Load the models.

        Raises:
            UserError: one can't be loaded.
        """
        self._thread.start()
        if error := self._loaded.get():
            raise error

    @property
    def alive(self) -> bool:
        """Whether it still computes."""
        return self._thread.is_alive() and not self._ended

    def bind(self) -> None:
        """Deliver to the running event loop from now on."""
        self._loop = asyncio.get_running_loop()

    def stop(self) -> None:
        """End the thread, after the step or the loading that it is in."""
        self._commands.put(("stop", None))
        self._thread.join(timeout=60)

    def submit(self, served: Served, requests: Sequence[Request]) -> Job:
        """Begin a job. Give it to `finish` in the end, whatever the end is.

        Raises:
            BusyError: too many texts wait already.
            EngineError: nothing computes any more.
        """
        if not self.alive:
            raise EngineError
        texts = sum(request.config.num_samples for request in requests)
        inside = sum(self._texts(job) for job in self._jobs if job.served is served)
        if inside + texts > self.max_batch + self.max_queue:
            raise BusyError(min(60, max(1, math.ceil(self._seconds_per_text * inside / self.max_batch))))
        job = Job(served, requests, left=texts)
        self._jobs.add(job)
        self._count()
        self._commands.put(("add", job))
        if not self.alive:  # it may have ended before this
            self._jobs.discard(job)
            raise EngineError
        return job

    def finish(self, job: Job) -> None:
        """A job is done, or nobody waits for it any more: then its places are free at the next token."""
        self._jobs.discard(job)
        if job.left:
            self._commands.put(("drop", job))
        else:
            seconds = time.monotonic() - job.began
            self._seconds_per_text += 0.1 * (seconds - self._seconds_per_text)
        self._count()

    @staticmethod
    def _texts(job: Job) -> int:
        return sum(request.config.num_samples for request in job.requests)

    def _count(self) -> None:
        inside = dict.fromkeys(self.models, 0)
        for job in self._jobs:
            inside[job.served.name] += self._texts(job)
        self._metrics.active.set(sum(min(texts, self.max_batch) for texts in inside.values()))
        self._metrics.queued.set(sum(max(0, texts - self.max_batch) for texts in inside.values()))

    # ---- in the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self.models = self._load()
            engines = {name: served.engine() for name, served in self.models.items()}
            self._loaded.put(None)
            self._serve(engines)
        except BaseException as caught:
            error = caught
            if self.models:
                log.critical("The thread that computes has ended", exc_info=error)
        finally:
            mx.clear_streams()  # those of this thread, or the process would abort at its end
            self._loaded.put(error)

    def _serve(self, engines: dict[str, Engine]) -> None:
        asked: dict[Request, _Asked] = {}
        try:
            while True:
                busy = [name for name, engine in engines.items() if engine.busy]
                while not busy or not self._commands.empty():
                    what, job = self._commands.get()
                    if job is None:
                        return
                    self._obey(what, job, engines[job.served.name], asked)
                    busy = [name for name, engine in engines.items() if engine.busy]
                for name in busy:
                    self._step(name, engines, asked)
        finally:
            self._ended = True
            lost = {one.job for one in asked.values()}
            while not self._commands.empty():
                what, job = self._commands.get()
                if job and what == "add":
                    lost.add(job)
            self._deliver([(job, EngineError()) for job in lost])

    def _obey(self, what: str, job: Job, engine: Engine, asked: dict[Request, _Asked]) -> None:
        """Add a job's requests, or drop what is left of them."""
        try:
            for i, request in enumerate(job.requests):
                if what == "add":
                    asked[request] = _Asked(job, i, request.config.num_samples)
                    engine.add(request)
                elif asked.pop(request, None):
                    engine.drop(request)
        except Exception:
            log.exception("A request to %s failed", job.served.name)
            for request in job.requests:
                if asked.pop(request, None):
                    engine.drop(request)
            self._deliver([(job, EngineError())])

    def _step(self, name: str, engines: dict[str, Engine], asked: "dict[Request, _Asked]") -> None:
        """Advance an engine, and hand over what it has made."""
        made = engines[name].made
        try:
            told = engines[name].step()
        except Exception:
            # Whatever it was may have left the engine's texts in disorder: they are given up, and it begins anew.
            log.exception("The engine of %s failed", name)
            lost = {one.job for one in asked.values() if one.job.served.name == name}
            for request in [request for request, one in asked.items() if one.job in lost]:
                del asked[request]
            engines[name] = self.models[name].engine()
            self._deliver([(job, EngineError()) for job in lost])
            return
        self._metrics.generated.inc(engines[name].made - made)
        events: list[tuple[Job, Event]] = []
        for request, piece in told:
            one = asked[request]
            events.append((one.job, (one.number, piece)))
            one.left -= bool(piece.reason)
            if not one.left:
                del asked[request]
        self._deliver(events)

    def _deliver(self, events: Sequence[tuple[Job, Event]]) -> None:
        def put() -> None:
            for job, event in events:
                job.events.put_nowait(event)

        if events and self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(put)
