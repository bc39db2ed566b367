"""Hostile requests are refused, and the next good one is answered."""

import contextlib
import re
import socket

import pytest

from tests.serving import hostile

GOOD = hostile.request(b'{"prompt": "The duck", "max_tokens": 2, "seed": 1}')
COUNT = 2000


def answer(url, data, patience=10.0):
    """Send bytes; what comes back until the connection ends, or until nothing comes for `patience` seconds."""
    host, port = url.removeprefix("http://").split(":")
    got = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        with contextlib.suppress(ConnectionError):  # refused before all of it was sent
            connection.sendall(data)
        connection.settimeout(patience)
        with contextlib.suppress(ConnectionError, *([TimeoutError] if patience < 1 else [])):
            while more := connection.recv(65536):
                got += more
    return got


def test_two_thousand_hostile_requests(folders, start):
    server = start("--model", folders / "plain", "--model", folders / "chatty")
    statuses: dict[int, int] = {}
    early = 0
    for i, (request, whole) in enumerate(hostile.requests(COUNT)):
        # The server waits many seconds for the rest of a request that was cut off.
        got = answer(server.url, request, 10 if whole else 0.03)
        if got:
            status = int(re.match(rb"HTTP/1\.1 (\d{3}) ", got)[1])  # type: ignore[index]
            assert status < 500, (request[:300], got)
            assert b"Traceback" not in got
            statuses[status] = statuses.get(status, 0) + 1
        else:
            assert not whole or len(request) > 2**20, request[:300]
        good = answer(server.url, GOOD)
        assert good.startswith(b"HTTP/1.1 200 "), (request[:300], good)
        if i == COUNT // 4:
            early = server.memory()
    assert server.memory() < early + 20e6
    assert "Traceback" not in server.log.read_text()
    assert {400, 404, 405, 413, 415, 421, 403} <= statuses.keys()
    assert statuses.get(200, 0) < COUNT / 4  # most of them are hostile


@pytest.mark.parametrize("depth", [100, 100_000])
def test_deep_nesting_is_refused_in_a_sentence(url, depth):
    got = answer(url, hostile.request(b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}"))
    assert got.startswith(b"HTTP/1.1 400 ")
    assert b'"message"' in got
