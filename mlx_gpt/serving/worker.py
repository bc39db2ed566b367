"""The thread that runs the engines, and hands what they generate to the event loop.

Only this thread uses MLX. In `Worker`, the event loop calls the methods above the line, and the thread calls those
below it.
"""

import asyncio
import logging
import math
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import mlx.core as mx

from mlx_gpt.generation.engine import Engine
from mlx_gpt.generation.requests import Request
from mlx_gpt.generation.stop_strings import Piece
from mlx_gpt.serving.metrics import Metrics
from mlx_gpt.serving.models import ServedModel

Event = tuple[int, Piece] | Exception

log = logging.getLogger("mlx_gpt")


class BusyError(Exception):
    """The queue is full.

    Attributes:
        retry_after: seconds after which a new attempt may succeed.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"The server is busy: try again in {retry_after} seconds.")
        self.retry_after = retry_after


class EngineError(Exception):
    """The engine failed, and the texts that it was generating are lost."""


@dataclass(eq=False)
class Job:
    """The texts of one HTTP request.

    Attributes:
        events: a prompt's number with a piece of a text that continues it, in order; or an error.
        started: when it was submitted, by `time.monotonic`.
        unfinished: texts that have not ended.
    """

    model: ServedModel
    requests: Sequence[Request]
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    started: float = field(default_factory=time.monotonic)
    unfinished: int = field(init=False)

    def __post_init__(self) -> None:
        self.unfinished = self.texts

    @property
    def texts(self) -> int:
        """How many texts it generates."""
        return sum(request.config.num_samples for request in self.requests)

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield each piece with the number of its prompt, until all texts have ended.

        Raises:
            EngineError: the engine failed.
        """
        while self.unfinished:
            event = await self.events.get()
            if isinstance(event, Exception):
                raise event
            self.unfinished -= bool(event[1].reason)
            yield event


@dataclass
class _InEngine:
    """A request inside an engine: its job, its number there, and how many of its texts have not ended."""

    job: Job
    number: int
    unfinished: int


class Worker:
    """Generates the texts of all jobs.

    Args:
        load: loads the models, by name. The thread calls it.
        max_batch: texts of each model that are generated at a time.
        max_queue: texts that may wait for a slot.

    Attributes:
        models: by name, once started.
    """

    def __init__(
        self, load: Callable[[], Mapping[str, ServedModel]], max_batch: int, max_queue: int, metrics: Metrics
    ) -> None:
        self.models: Mapping[str, ServedModel] = {}
        self.max_batch, self.max_queue, self._metrics = max_batch, max_queue, metrics
        self._load = load
        self._loop: asyncio.AbstractEventLoop | None = None
        self._commands: queue.SimpleQueue[tuple[Literal["add", "drop"], Job] | None] = queue.SimpleQueue()  # None: stop
        self._jobs: set[Job] = set()
        self._seconds_per_text = 1.0  # a running average
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._loaded: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Load the models.

        Raises:
            UserError: a model cannot be loaded.
        """
        self._thread.start()
        if error := self._loaded.get():
            raise error

    @property
    def alive(self) -> bool:
        """Whether it can generate."""
        return self._thread.is_alive() and not self._ended

    def stop(self) -> None:
        """End the thread after its current step, or after loading."""
        self._commands.put(None)
        self._thread.join(timeout=60)

    def submit(self, model: ServedModel, requests: Sequence[Request]) -> Job:
        """Start a job, whose events go to the running event loop. The caller must call `finish` for it in the end.

        Raises:
            BusyError: the queue is full.
            EngineError: the thread has ended.
        """
        if not self.alive:
            raise EngineError
        job = Job(model, requests)
        texts = sum(other.texts for other in self._jobs if other.model is model)
        if texts + job.texts > self.max_batch + self.max_queue:
            raise BusyError(min(60, max(1, math.ceil(self._seconds_per_text * texts / self.max_batch))))
        self._loop = asyncio.get_running_loop()
        self._jobs.add(job)
        self._count()
        self._commands.put(("add", job))
        if not self.alive:  # the thread may have ended before it saw the command
            self._jobs.discard(job)
            raise EngineError
        return job

    def finish(self, job: Job) -> None:
        """Free the slots of a job. If it has not ended, they are free from the next token on."""
        self._jobs.discard(job)
        if job.unfinished:
            self._commands.put(("drop", job))
        else:
            seconds = time.monotonic() - job.started
            self._seconds_per_text += 0.1 * (seconds - self._seconds_per_text)
        self._count()

    def _count(self) -> None:
        texts = dict.fromkeys(self.models, 0)
        for job in self._jobs:
            texts[job.model.name] += job.texts
        self._metrics.active.set(sum(min(count, self.max_batch) for count in texts.values()))
        self._metrics.queued.set(sum(max(0, count - self.max_batch) for count in texts.values()))

    # ---- in the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self.models = self._load()
            engines = {name: model.engine() for name, model in self.models.items()}
            self._loaded.put(None)
            self._serve(engines)
        except BaseException as caught:
            error = caught
            if self.models:
                log.critical("The engine's thread has ended", exc_info=error)
        finally:
            mx.clear_streams()  # this thread's; without it, the process aborts when it exits
            self._loaded.put(error)

    def _serve(self, engines: dict[str, Engine]) -> None:
        active: dict[Request, _InEngine] = {}
        try:
            while True:
                while not any(engine.busy for engine in engines.values()) or not self._commands.empty():
                    command = self._commands.get()
                    if command is None:
                        return
                    action, job = command
                    self._obey(action, job, engines[job.model.name], active)
                for name in [name for name, engine in engines.items() if engine.busy]:
                    self._step(name, engines, active)
        finally:
            self._ended = True
            lost = {request.job for request in active.values()}
            while not self._commands.empty():
                command = self._commands.get()
                if command and command[0] == "add":
                    lost.add(command[1])
            self._deliver([(job, EngineError()) for job in lost])

    def _obey(self, action: Literal["add", "drop"], job: Job, engine: Engine, active: dict[Request, _InEngine]) -> None:
        """Add a job's requests, or drop those that are left."""
        try:
            for i, request in enumerate(job.requests):
                if action == "add":
                    active[request] = _InEngine(job, i, request.config.num_samples)
                    engine.add(request)
                elif active.pop(request, None):
                    engine.drop(request)
        except Exception:
            log.exception("A request to %s failed", job.model.name)
            for request in job.requests:
                if active.pop(request, None):
                    engine.drop(request)
            self._deliver([(job, EngineError())])

    def _step(self, name: str, engines: dict[str, Engine], active: dict[Request, _InEngine]) -> None:
        """Run one step of an engine, and deliver what it generated."""
        made = engines[name].made
        try:
            pieces = engines[name].step()
        except Exception:
            # The error may have left the engine in any state: replace it, and drop its texts.
            log.exception("The engine of %s failed", name)
            lost = {request.job for request in active.values() if request.job.model.name == name}
            for request in [request for request, entry in active.items() if entry.job in lost]:
                del active[request]
            self._deliver([(job, EngineError()) for job in lost])  # first, since the replacement may fail, too
            engines[name] = self.models[name].engine()
            return
        self._metrics.generated.inc(engines[name].made - made)
        events: list[tuple[Job, Event]] = []
        for request, piece in pieces:
            entry = active[request]
            events.append((entry.job, (entry.number, piece)))
            entry.unfinished -= bool(piece.reason)
            if not entry.unfinished:
                del active[request]
        self._deliver(events)

    def _deliver(self, events: Sequence[tuple[Job, Event]]) -> None:
        def put() -> None:
            for job, event in events:
                job.events.put_nowait(event)

        if events and self._loop and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(put)
