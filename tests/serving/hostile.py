"""Hostile requests, the same ones for the same seed."""

import json
import random
from collections.abc import Iterator

PATHS = [
    "/v1/completions", "/v1/chat/completions",
]  # fmt: skip
NUMBERS = [
    "NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 400, "0x10", "01", "-0", "1.5", "-1", "true", "null",
    '""', "[]", "{}",
]  # fmt: skip
FIELDS = [
    "prompt", "max_tokens", "temperature", "top_p", "top_k", "min_p", "n", "stop", "seed", "logprobs", "echo",
    "stream", "logit_bias", "presence_penalty", "frequency_penalty", "repetition_penalty", "model", "messages",
    "stream_options", "user", "best_of", "__proto__", "constructor", "", "\\u0000", "a" * 5000,
]  # fmt: skip
TEXTS = [
    '"\\ud800"', '"\\udc00\\ud800"', '"\\u0000"', '"' + "x" * 5000 + '"', '"<|endoftext|>"', '"{{ 7 * 7 }}"',
    '"%s%n"', '"\\u202e\\u200b"', '"../../../etc/passwd"', '"' + "\U0001f986" * 300 + '"', '["a", 1]',
    "[1, 99999999999999999999]", '[[1], "a"]', '[[[1]]]', '{"a": 1}',
]  # fmt: skip
TARGETS = [
    "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/%00",
    "//evil.example/", "/v1/models/" + "a" * 9000, "/v1/completions?" + "a" * 9000, "*", "/\xff\xfe",
    "http://evil.example/", "/v1/models/%ff/curves", "/v1/models/../../curves", "/;ls", "/v1/completions/",
    "/v1//models", "/openapi.json/x", "", " ", "/\t",
]  # fmt: skip
METHODS = [
    "GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "CONNECT", "BREW", "G\x01T", "get", "A" * 500,
]  # fmt: skip
HEADERS = [
    "Host: evil.example", "Origin: https://evil.example", "Origin: null", "Content-Length: -1", "Content-Length: x",
    "Content-Length: 99999999999999999999", "Content-Length: 5\r\nContent-Length: 6", "Transfer-Encoding: gzip",
    "Transfer-Encoding: chunked\r\nContent-Length: 3", "Expect: 100-continue", "Authorization: Bearer \xff\xfe",
    "Cookie: " + "a" * 20000, "X: " + "b" * 40000, "Content-Type: text/plain",
    "Content-Type: application/json; charset=\xff", "Upgrade: websocket\r\nConnection: Upgrade", "Host: a\r\nHost: b",
    " folded: x", "Bad Name: x", "Nul: \x00", "Range: bytes=0-", "Content-Encoding: gzip",
]  # fmt: skip
CHUNKS = [
    b"zz\r\n{}\r\n0\r\n\r\n", b"-1\r\n", b"ffffffffffffffff\r\n{", b"2\r\n{}",
    b"2;x=" + b"y" * 9000 + b"\r\n{}\r\n0\r\n\r\n", b"2\r\n{}\r\n0\r\nX: y\r\n\r\n", b"\r\n\r\n", b"2\n{}\n0\n\n",
]  # fmt: skip


def requests(count: int, seed: int = 0) -> Iterator[tuple[bytes, bool]]:
    """The bytes of `count` requests, of every kind in turn, and whether each is complete and must be answered."""
    draw = random.Random(seed)
    whole = [_values, _bodies, _nested, _bytes, _large]
    kinds = [*whole, _targets, _headers, _chunks, _garbage, _cut]
    for i in range(count):
        kind = kinds[i % len(kinds)]
        yield kind(draw), kind in whole


def request(body: bytes, path: str = "/v1/completions", method: str = "POST", headers: str = "") -> bytes:
    """A request that is well-formed except for its arguments."""
    lines = [f"{method} {path} HTTP/1.1", "Connection: close"]
    lines += [] if "Host:" in headers else ["Host: localhost"]
    lines += [] if "Content-Type:" in headers else ["Content-Type: application/json"]
    lines += [] if "Content-Length:" in headers or "Transfer-Encoding:" in headers else [f"Content-Length: {len(body)}"]
    lines += [headers] if headers else []
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def _values(draw: random.Random) -> bytes:
    """One or two fields with a value that they cannot have."""
    fields = {draw.choice(FIELDS): draw.choice(NUMBERS + TEXTS) for _ in range(draw.randint(1, 2))}
    fields.setdefault("max_tokens", "2")
    body = ", ".join(f'"{name}": {value}' for name, value in fields.items())
    return request(f"{{{body}}}".encode("utf-8", "surrogatepass"), draw.choice(PATHS))


def _bodies(draw: random.Random) -> bytes:
    """Bodies that are not JSON, or not quite."""
    whole = json.dumps({"prompt": "x", "max_tokens": 2, "messages": [{"role": "user", "content": "x"}]})
    at = draw.randrange(len(whole))
    broken = [
        whole[:at],
        whole[:at] + draw.choice('{}[],:"\\\x00\x7f') + whole[at + 1 :],
        whole + whole,
        "",
        "null",
        "[]",
        '"x"',
        "\ufeff" + whole,
    ]
    return request(draw.choice(broken).encode(), draw.choice(PATHS))


def _nested(draw: random.Random) -> bytes:
    """Deep nesting."""
    depth = draw.choice([10, 200, 1000, 100_000])
    opening, closing = draw.choice([("[", "]"), ('{"a":', "}")])
    body = f'{{"prompt": {opening * depth}1{closing * depth * draw.randint(0, 1)}}}'
    return request(body.encode(), draw.choice(PATHS))


def _bytes(draw: random.Random) -> bytes:
    """Bytes that are not UTF-8."""
    wrong = draw.choice(
        [b"\xff", b"\xc3\x28", b"\xed\xa0\x80", b"\xf8\x88\x80\x80\x80", b"\xc0\xaf", b"\xef\xbf", draw.randbytes(20)]
    )
    return request(b'{"prompt": "' + wrong + b'", "max_tokens": 1}', draw.choice(PATHS))


def _targets(draw: random.Random) -> bytes:
    """Paths that lead elsewhere, and methods that do not exist."""
    return request(b"", draw.choice(TARGETS), draw.choice(["GET", "POST", *METHODS]))


def _headers(draw: random.Random) -> bytes:
    """Headers that contradict each other or are too long."""
    return request(
        b'{"prompt": "x", "max_tokens": 1}', headers=draw.choice(HEADERS), method=draw.choice(["POST", "GET"])
    )


def _chunks(draw: random.Random) -> bytes:
    """Malformed chunked bodies."""
    return request(draw.choice(CHUNKS), headers="Transfer-Encoding: chunked")


def _garbage(draw: random.Random) -> bytes:
    """Bytes that are not HTTP."""
    return draw.choice(
        [
            draw.randbytes(200),
            b"\x16\x03\x01\x02\x00\x01",
            b"\r\n" * 50,
            b"GET / HTTP/9.9\r\n\r\n",
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            b"GET /\r\n\r\n",
            b"\n",
        ]
    )


def _large(draw: random.Random) -> bytes:
    """Bodies above the limit, and wrong ones just below it."""
    size = draw.choice([2**20 + 1, 2**21])
    body = draw.choice(
        [
            b" " * size,
            b'{"prompt": "' + b"x" * size + b'"}',
            b"[" * size,
            b'{"prompt": [' + b"1," * (size // 2) + b"1]}",
            b'{"prompt": [' + b"1," * 400_000 + b'"a"]}',
            b'{"messages": [' + b"{}," * 300_000 + b"{}]}",
        ]
    )
    return request(body, draw.choice(PATHS))


def _cut(draw: random.Random) -> bytes:
    """A request that stops in the middle, from a client that disconnects."""
    whole = request(b'{"prompt": "The duck", "max_tokens": 200, "stream": true}')
    return whole[: draw.randrange(1, len(whole))]
