"""What fake servers on the loopback interface have in common: they answer the real clients, and fail on demand."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar, Self


class FakeHandler(BaseHTTPRequestHandler):
    """Answers one connection to `fake`."""

    fake: "FakeServer"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """Send a whole response."""
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def answer_with_web_page(self) -> None:
        """Send what a hotel's network sends instead of the answer."""
        self.answer(200, b"<html>Please log in to the hotel's network</html>", {"Content-Type": "text/html"})


class FakeServer:
    """Serves on free ports, one for each of its `urls`, while it is entered."""

    handler: ClassVar[type[FakeHandler]]
    ports: ClassVar[int] = 1
    urls: list[str]

    def __enter__(self) -> Self:
        self._released = threading.Event()
        handler = type("Handler", (self.handler,), {"fake": self})
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in range(self.ports)]
        self.urls = [f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers]
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._released.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def wait_until_closed(self) -> None:
        """Keep a connection open without an answer."""
        self._released.wait(30)
