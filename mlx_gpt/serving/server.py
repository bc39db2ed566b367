"""The process that serves: its sockets, its signals, its models."""

import asyncio
import contextlib
import functools
import logging
import re
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_gpt.config import ServeConfig
from mlx_gpt.errors import UserError
from mlx_gpt.serving import app
from mlx_gpt.serving.metrics import Metrics
from mlx_gpt.serving.worker import Served, Worker

HEADER_SECONDS = 20.0  # for a request's head
MOST_HEADERS = 2**15  # bytes
MOST_AHEAD = 2**20  # bytes of requests that came before the last one was answered
MOST_CONNECTIONS = 512

log = logging.getLogger("mlx_gpt")


def serve(paths: Sequence[Path], config: ServeConfig, say: Callable[[str], None]) -> None:
    """Serve until a signal ends it: what is being answered is finished within the grace.

    Raises:
        UserError: as in `Server`.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    with Server(paths, config) as server:
        say(f"Serving {', '.join(server.models)} at {server.url} (Ctrl-C ends it)")
        server.run()


class Server(uvicorn.Server):
    """Models behind a socket, for `run`. The first signal ends it after what is being answered, the second at once.

    Attributes:
        models: by name.
        url: where it is found.

    Raises:
        UserError: a model can't be loaded, the address can't be had, or others could ask without a key.
    """

    def __init__(self, paths: Sequence[Path], config: ServeConfig) -> None:
        alone = config.host in ("127.0.0.1", "::1", "localhost")
        if not (alone or config.api_key or config.insecure):
            raise UserError(
                f"On {config.host} others can ask: give an --api-key, or --insecure if everyone may use the model."
            )
        for origin in config.allow_origin:
            if not re.fullmatch(r"https?://[^/*\s]+", origin):
                raise UserError(f"--allow-origin {origin} is no site: name it as a browser does, https://a.example.")
        self._listener = _listen(config.host, config.port)
        metrics = Metrics()
        self._worker = Worker(
            functools.partial(load, paths, config.max_batch), config.max_batch, config.max_queue, metrics
        )
        try:
            self._worker.start()
        except BaseException:
            self._listener.close()
            self._worker.stop()
            raise
        self.models = self._worker.models
        host = f"[{config.host}]" if ":" in config.host else config.host
        self.url = f"http://{host}:{self._listener.getsockname()[1]}"
        super().__init__(
            uvicorn.Config(
                app.make(self._worker, metrics, config),
                http=Protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,  # access.py has a line per request
                server_header=False,
                h11_max_incomplete_event_size=MOST_HEADERS,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_graceful_shutdown=config.grace,
            )
        )
        if not alone and not config.api_key:
            log.warning("INSECURE: whoever reaches %s can use the model, for there is no key.", self.url)
            log.warning("INSECURE: give an --api-key to keep others out.")

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        """Close the socket, and end the thread that computes."""
        self._listener.close()
        self._worker.stop()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until it is to end."""
        super().run(sockets=[self._listener])

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        self._worker.bind()
        await super().startup(sockets)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals, and leave them alone afterwards: they have been obeyed."""
        if threading.current_thread() is not threading.main_thread():  # which alone gets them
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to end."""
        self.force_exit = self.should_exit
        self.should_exit = True


def load(paths: Sequence[Path], max_batch: int) -> Mapping[str, Served]:
    """The models, by name.

    Raises:
        UserError: one can't be loaded.
    """

    from mlx.utils import tree_flatten

    from mlx_gpt import api, models
    from mlx_gpt.device import device
    from mlx_gpt.generation.chat_template import ChatTemplate
    from mlx_gpt.generation.engine import Engine, bytes_per_token
    from mlx_gpt.training.run_folder import model_directory

    folders = [model_directory(path) for path in paths]
    served = {}
    room, taken = device().usable, 0
    for name, folder in zip(app.names_of(folders), folders, strict=True):
        model, tokenizer = api.load(folder)
        positions = models.context_length(model)
        taken += sum(weight.nbytes for _, weight in tree_flatten(model.parameters()))
        taken += bytes_per_token(model) * positions * max_batch
        if taken > room:
            size = f"{taken / 1e6:,.0f} MB"
            raise UserError(
                f"Weights and caches of {max_batch} texts take {size}, more than is free: lower --max-batch."
            )
        engine = functools.partial(Engine, model, tokenizer, max_batch)
        template = ChatTemplate.load(folder)
        served[name] = Served(name, folder, tokenizer, positions, models.n_params(model), template, engine)
    return served


class Protocol(H11Protocol):
    """HTTP/1.1 that waits only so long for a request's head, and can be cut off."""

    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self._wait()

    def on_response_complete(self) -> None:
        """An answer has been written: now it has to be read in time, and the next request to come."""
        if self._waiting is None:
            self._wait()
        super().on_response_complete()

    def handle_events(self) -> None:
        """Some of a request has come, or it is the turn of one that came with the one before."""
        super().handle_events()
        if self.conn.their_state is h11.DONE:
            # More came before the answer, and uvicorn has paused reading: nobody would see the client hang up.
            if len(self.conn.trailing_data[0]) > MOST_AHEAD:
                self.transport.abort()
            self.flow.resume_reading()
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.scope.setdefault("extensions", {})["mlx_gpt.connection"] = {"abort": self.transport.abort}
            self._stop_waiting()
        elif self._waiting is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._stop_waiting()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(HEADER_SECONDS, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._waiting:
            self._waiting.cancel()
            self._waiting = None


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # With the protocol named, asyncio sets TCP_NODELAY: without, tokens would wait 40 ms for each other.
        listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((host, port))
            listener.listen(256)
        except OSError:
            listener.close()
            raise
        return listener
    except OSError as error:
        raise UserError(f"Can't listen on {host}:{port} ({error.strerror or error}): choose another --port.") from None
