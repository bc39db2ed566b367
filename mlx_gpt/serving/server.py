"""The server process: its socket, its signals and its models."""

import functools
import logging
import re
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import uvicorn

from mlx_gpt.config import ServeConfig
from mlx_gpt.errors import UserError
from mlx_gpt.serving.app import make_app
from mlx_gpt.serving.connection import Connection, without_idle_limit
from mlx_gpt.serving.metrics import Metrics
from mlx_gpt.serving.models import load_models
from mlx_gpt.serving.worker import Worker

MAX_HEAD = 2**15  # bytes of a request's head
MAX_CONNECTIONS = 512

log = logging.getLogger("mlx_gpt")


def serve(paths: Sequence[Path], config: ServeConfig, say: Callable[[str], None]) -> None:
    """Serve until a signal arrives. Answers that are being generated then have `config.grace` seconds to finish.

    Raises:
        UserError: as in `Server`.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(message)s")
    with Server(paths, config) as server:
        say(f"Serving {', '.join(server.models)} at {server.url} (stop with Ctrl-C)")
        server.run()


def check(config: ServeConfig) -> None:
    """Check the settings that can be checked before the models are loaded or fetched.

    Raises:
        UserError: anyone could use the server without a key, or an origin is misspelt.
    """
    if not (_is_local(config.host) or config.api_key or config.insecure):
        raise UserError(
            f"Other machines can reach {config.host}: set an --api-key, or --insecure if anyone may use the model."
        )
    for origin in config.allow_origin:
        if not re.fullmatch(r"https?://[^/*\s]+", origin):
            raise UserError(f"--allow-origin {origin} is not an origin: write it like https://a.example.")


class Server(uvicorn.Server):
    """Models behind a socket. The first signal lets it finish its answers, the second stops it at once.

    Attributes:
        models: by name.
        url: its address.

    Raises:
        UserError: a model cannot be loaded, the address cannot be used, or anyone could use the server without a key.
    """

    def __init__(self, paths: Sequence[Path], config: ServeConfig) -> None:
        check(config)
        self._listener = _listen(config.host, config.port)
        metrics = Metrics()
        load = functools.partial(load_models, paths, config.max_batch, config.context)
        self._worker = Worker(load, config.max_batch, config.max_queue, metrics)
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
                without_idle_limit(make_app(self._worker, metrics, config)),
                http=Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,  # access.py logs the requests
                server_header=False,
                h11_max_incomplete_event_size=MAX_HEAD,
                limit_concurrency=MAX_CONNECTIONS,
                timeout_graceful_shutdown=config.grace,
            )
        )
        if not (_is_local(config.host) or config.api_key):
            log.warning("INSECURE: anyone who reaches %s can use the model, since it needs no key.", self.url)
            log.warning("INSECURE: set an --api-key to prevent that.")

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *error: object) -> None:
        """Close the socket and end the engine's thread."""
        self._listener.close()
        self._worker.stop()

    def run(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve until a signal arrives."""
        super().run(sockets=[self._listener])

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop. At the end, uvicorn's own version would raise the signal again, and the exit code would not be 0."""
        self.force_exit = self.should_exit
        self.should_exit = True


def _is_local(host: str) -> bool:
    """Return whether only this machine can reach a server that listens on `host`."""
    return host in ("127.0.0.1", "::1", "localhost")


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # asyncio sets TCP_NODELAY only if the protocol is named. Without it, tokens would wait up to 40 ms.
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
        raise UserError(f"Cannot listen on {host}:{port} ({error.strerror or error}): choose another --port.") from None
