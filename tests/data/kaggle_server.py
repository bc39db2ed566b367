"""A fake Kaggle on the loopback interface. The real client talks to it, and it fails on demand."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pytest

from tests.data.loopback import FakeHandler, FakeServer

LOGIN = "/api/v1/security.OAuthService/IntrospectToken"
DOWNLOAD = "/api/v1/datasets.DatasetApiService/DownloadDataset"
BLOB = "/blob.zip"


@dataclass
class FakeKaggle(FakeServer):
    """A server whose answers a test sets, before a download or between two."""

    body: bytes = b""
    active: bool = True  # whether the token is accepted
    status: dict[str, int] = field(default_factory=dict)  # path -> HTTP status of the error that it answers with
    hang: str = ""  # the path that never answers
    html: str = ""  # the path that answers with a web page
    cut: int | None = None  # each response stops after this many bytes, although it promises the whole body
    halfway: Callable[[], None] | None = None  # called after half of the body, which then stops
    promised: int | None = None  # a Content-Length that is not the body's
    requests: list[tuple[str, dict[str, object]]] = field(default_factory=list)  # path and JSON body of each request

    @property
    def url(self) -> str:
        """Its address."""
        return self.urls[0]


class _Handler(FakeHandler):
    fake: FakeKaggle

    def do_POST(self) -> None:  # noqa: N802 - the name that http.server calls
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._misbehave(asked):
            return
        if self.path == LOGIN:
            self._answer_json(200, {"active": self.fake.active, "username": "tester"})
        elif self.path == DOWNLOAD:
            self.answer(302, b"", {"Location": self.fake.url + BLOB})
        else:
            self._answer_json(404, {"code": 404, "message": "no such endpoint"})

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        if self._misbehave({}):
            return
        kaggle, body = self.fake, self.fake.body
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(kaggle.promised or len(body) - start))
        self.send_header("Content-Type", "application/zip")
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("ETag", '"v1"')
        self.send_header("Last-Modified", "Mon, 05 Jan 2026 10:00:00 GMT")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if kaggle.halfway:
            self.wfile.write(body[: len(body) // 2])
            kaggle.halfway()
            kaggle.wait_until_closed()
        elif kaggle.cut is not None:
            self.wfile.write(body[start : start + kaggle.cut])
        else:
            self.wfile.write(body[start:])

    def _misbehave(self, asked: dict[str, object]) -> bool:
        kaggle = self.fake
        kaggle.requests.append((self.path, asked))
        if self.path == kaggle.hang:
            kaggle.wait_until_closed()
        elif self.path == kaggle.html:
            self.answer_with_web_page()
        elif status := kaggle.status.get(self.path):
            self._answer_json(status, {"code": status, "message": "as the test wants it"})
        else:
            return False
        return True

    def _answer_json(self, status: int, content: dict[str, object]) -> None:
        self.answer(status, json.dumps(content).encode(), {"Content-Type": "application/json"})


FakeKaggle.handler = _Handler


def forget_client() -> None:
    """Make the next import of the client read its environment and log in again, as in a new process."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "kaggle"]:
        del sys.modules[name]


def point_client_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send the client to a server instead of kaggle.com."""
    addresses = import_module("kagglesdk.kaggle_env")
    monkeypatch.setitem(addresses._env_to_endpoint, addresses.KaggleEnv.LOCAL, url)


@contextlib.contextmanager
def serving(body: bytes, token: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKaggle]:
    """Start a fake Kaggle for a freshly imported client, with a token that it accepts and no real credentials."""
    for name in [name for name in os.environ if name.startswith("KAGGLE_") or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    monkeypatch.setenv("KAGGLE_API_ENVIRONMENT", "LOCALHOST")
    monkeypatch.setenv("KAGGLE_API_TOKEN", token)
    forget_client()
    with FakeKaggle(body=body) as fake:
        point_client_at(fake.url, monkeypatch)
        yield fake
    forget_client()
