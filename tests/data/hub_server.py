"""A fake Hugging Face Hub on the loopback interface. The real client talks to it, and it fails on demand."""

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.data.loopback import FakeHandler, FakeServer

COMMIT = "1234567890abcdef1234567890abcdef12345678"
LARGE = (".parquet", ".safetensors", ".bin", ".jsonl")  # the Hub keeps these on another host, and lists their SHA-256


@dataclass
class FakeHub(FakeServer):
    """A server whose answers a test sets, before a download or between two.

    It is two servers: one for the API and small files, and one for large files, to which the first one redirects.
    """

    ports = 2
    files: dict[str, bytes] = field(default_factory=dict)  # the files of the only repository, owner/name
    commit: str = COMMIT
    card: dict[str, object] = field(default_factory=dict)  # the facts at the head of README.md
    status: dict[str, tuple[int, str]] = field(default_factory=dict)  # end of a path -> HTTP status, X-Error-Code
    html: str = ""  # the end of the path that answers with a web page
    hang: str = ""  # the end of the path that never answers
    cuts: list[int] = field(default_factory=list)  # each of the next bodies stops after this many bytes
    stops_halfway: bool = False  # sends only half of a large body, and keeps the connection open
    listed: dict[str, dict[str, object]] = field(default_factory=dict)  # path -> false facts in the list
    per_page: int = 1000
    ranges: bool = True  # whether a body can be continued
    sized: bool = True  # whether a body has a Content-Length
    requests: list[tuple[str, dict[str, str]]] = field(default_factory=list)  # path and headers of each request

    @property
    def url(self) -> str:
        """The address of the API and of small files."""
        return self.urls[0]

    @property
    def storage(self) -> str:
        """The address of large files."""
        return self.urls[1]

    def fetched(self) -> list[str]:
        """The files whose bodies were asked for, each once, in order."""
        names = [path.partition(f"/resolve/{self.commit}/")[2] for path, _ in self.requests if "/resolve/" in path]
        return list(dict.fromkeys(map(unquote, names)))


class _Handler(FakeHandler):
    fake: FakeHub

    def do_GET(self) -> None:  # noqa: N802 - the name that http.server calls
        hub, path = self.fake, urlsplit(self.path).path
        hub.requests.append((self.path, {name.lower(): value for name, value in self.headers.items()}))
        if hub.hang and path.endswith(hub.hang):
            hub.wait_until_closed()
        elif hub.html and path.endswith(hub.html):
            self.answer_with_web_page()
        elif wrong := next((answer for end, answer in hub.status.items() if path.endswith(end)), None):
            self.answer(wrong[0], b"{}", {"X-Error-Code": wrong[1]} if wrong[1] else {})
        elif path.startswith("/storage/"):
            self._send_body(hub.files[unquote(path.removeprefix("/storage/"))])
        elif "/owner/name" not in path:
            self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif "/tree/" in path:
            self._answer_list()
        elif "/resolve/" in path:
            self._answer_file(unquote(path.partition(f"/resolve/{hub.commit}/")[2]))
        elif "/revision/" in path and not path.endswith(("/main", f"/{hub.commit}")):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            about = {"id": "owner/name", "sha": hub.commit, "cardData": hub.card, "siblings": []}
            self.answer(200, json.dumps(about).encode(), {"Content-Type": "application/json"})

    def _answer_list(self) -> None:
        hub, (_, _, path, query, _) = self.fake, urlsplit(self.path)
        entries = [self._entry(name, content) for name, content in hub.files.items()]
        start = int(query.partition("cursor=")[2] or 0)
        headers = {"Content-Type": "application/json"}
        if start + hub.per_page < len(entries):
            following = f"{hub.url}{path}?recursive=true&cursor={start + hub.per_page}"
            headers["Link"] = f'<{following}>; rel="next"'
        self.answer(200, json.dumps(entries[start : start + hub.per_page]).encode(), headers)

    def _entry(self, name: str, content: bytes) -> dict[str, object]:
        size = len(content)
        says: dict[str, object] = {"size": size}
        if name.endswith(LARGE):
            says |= {"oid": hashlib.sha256(content).hexdigest()} | self.fake.listed.get(name, {})
            return {"type": "file", "path": name, "size": says["size"], "oid": "0" * 40, "lfs": says}
        says["oid"] = hashlib.sha1(b"blob %d\0" % size + content).hexdigest()
        return {"type": "file", "path": name} | says | self.fake.listed.get(name, {})

    def _answer_file(self, name: str) -> None:
        if name.endswith(LARGE):
            self.answer(302, b"", {"Location": f"{self.fake.storage}/storage/{name}"})
        else:
            self._send_body(self.fake.files[name])

    def _send_body(self, body: bytes) -> None:
        hub = self.fake
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-")) if hub.ranges else 0
        self.send_response(206 if start else 200)
        if hub.sized:
            self.send_header("Content-Length", str(len(body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.end_headers()
        if hub.stops_halfway and self.path.startswith("/storage/"):
            self.wfile.write(body[: len(body) // 2])
            hub.wait_until_closed()
        else:
            self.wfile.write(body[start : start + hub.cuts.pop(0)] if hub.cuts else body[start:])


FakeHub.handler = _Handler


@contextlib.contextmanager
def serving(files: dict[str, bytes], token: str, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Start a fake Hub for the client of this process, with a token and no real credentials, and an empty cache."""
    from huggingface_hub import constants

    for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING")) or name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    with FakeHub(files=files) as fake:
        point_client_at(fake.url, monkeypatch)
        yield fake


def point_client_at(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send the client of this process, and those of processes that it starts, to a server."""
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
