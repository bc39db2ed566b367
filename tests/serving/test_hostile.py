"""Requests that mean no good are refused, and the next good one is answered."""

import contextlib
import re
import socket

import pytest

from tests.serving import hostile

GOOD = hostile.request(b'{"prompt": "The duck", "max_tokens": 2, "seed": 1}')
COUNT = 2000


def answer(url, data, patience=10.0):
    """What comes back until the connection ends; nothing if it ends without a word, or after so many seconds."""
    host, port = url.removeprefix("http://").split(":")
    got = b""
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        with contextlib.suppress(ConnectionError):  # refused while it was still being sent
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
        # Of what is cut off, more may come for many seconds yet.
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
    assert statuses.get(200, 0) < COUNT / 4  # most of them are hostile indeed


@pytest.mark.parametrize("depth", [100, 100_000])
def test_brackets_in_brackets_are_refused_in_a_sentence(url, depth):
    got = answer(url, hostile.request(b'{"prompt": ' + b"[" * depth + b"]" * depth + b"}"))
    assert got.startswith(b"HTTP/1.1 400 ")
    assert b'"message"' in got
