"""Many clients at once, some of which disconnect: every answer must be right, or a clean refusal.

    python -m tests.serving.load --model weights/demo --minutes 5

starts `mlx-gpt serve`, and 1, 8 and 64 clients send it requests for five minutes each. `benchmarks/serving.py` compares
its speed with that of mlx-lm's server.
"""

import argparse
import asyncio
import json
import math
import random
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

PROMPTS = ["The", "The statement", "If the", "A class", "In this", "The value of", "When", "It is"]
DISCONNECT = 0.1  # of the requests


@dataclass
class Tally:
    """The outcomes of requests.

    Attributes:
        first, speed: seconds to the first token, and tokens per second after it, of each stream.
        tokens: read by all clients, including those that disconnected.
    """

    right: int = 0
    wrong: int = 0
    refused: int = 0
    disconnected: int = 0
    failed: list[str] = field(default_factory=list)
    first: list[float] = field(default_factory=list)
    speed: list[float] = field(default_factory=list)
    tokens: int = 0

    def __str__(self) -> str:
        first = sorted(self.first)
        p95 = first[int(0.95 * (len(first) - 1))] if first else 0
        return (
            f"{self.right} right, {self.wrong} wrong, {self.refused} refused, {self.disconnected} disconnected, "
            f"{len(self.failed)} failed; first token after {1000 * statistics.median(first or [0]):.0f} ms "
            f"(95 %: {1000 * p95:.0f}), {statistics.median(self.speed or [0]):.0f} tokens/s each"
        )


def asked(number: int, tokens: int) -> dict[str, Any]:
    """Request `number` of those that clients send: half of them greedy, half with a seed."""
    drawn = {"temperature": 0.9, "seed": number} if number % 2 else {"temperature": 0}
    return {"prompt": PROMPTS[number % len(PROMPTS)], "max_tokens": tokens - number % 7, "logprobs": 0, **drawn}


async def expected(url: str, count: int, tokens: int) -> list[str]:
    """The answer to each of the first `count` requests when it is alone."""
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        answers = [await client.post("/v1/completions", json=asked(i, tokens)) for i in range(count)]
    return [answer.json()["choices"][0]["text"] for answer in answers]


async def one_client(
    url: str, right: Sequence[str], tokens: int, until: float, enough: float, seed: int, tally: Tally
) -> None:
    """Send requests until the clock shows `until`, or all clients together have `enough` right answers."""
    draw = random.Random(seed)
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        while time.monotonic() < until and tally.right < enough:
            number = draw.randrange(len(right))
            leaves_after = draw.randrange(1, 10) if draw.random() < DISCONNECT else None
            try:
                await one_request(client, number, right[number], tokens, leaves_after, tally)
            except (httpx.HTTPError, ValueError, KeyError) as error:
                tally.failed.append(repr(error))


async def one_request(
    client: httpx.AsyncClient, number: int, right: str, tokens: int, leaves_after: int | None, tally: Tally
) -> None:
    """Send one request, read its stream, and compare it."""
    began = time.monotonic()
    async with client.stream("POST", "/v1/completions", json=asked(number, tokens) | {"stream": True}) as answer:
        if answer.status_code == 429:
            await answer.aread()
            tally.refused += 1
            wait = float(answer.headers["retry-after"])
            await asyncio.sleep(wait * random.Random(began).uniform(0.02, 0.2))
            return
        if answer.status_code != 200:
            tally.failed.append(f"{answer.status_code} {(await answer.aread())[:200]!r}")
            return
        text, count, first, whole = "", 0, 0.0, False
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                whole = True
            elif line:
                choice = json.loads(line.removeprefix("data: "))["choices"][0]
                text += choice["text"]
                first = first or time.monotonic()
                made = len(choice["logprobs"]["tokens"])
                count, tally.tokens = count + made, tally.tokens + made
                if leaves_after is not None and count >= leaves_after:
                    tally.disconnected += 1
                    return
    tally.right += text == right and whole
    tally.wrong += text != right or not whole
    tally.first.append(first - began)
    if count > 1:
        tally.speed.append((count - 1) / (time.monotonic() - first))


async def load(
    url: str, clients: int, seconds: float, right: Sequence[str], tokens: int, enough: float = math.inf
) -> Tally:
    """The outcomes of `clients` clients that send requests for `seconds`, or until they have `enough` right answers."""
    tally, until = Tally(), time.monotonic() + seconds
    await asyncio.gather(*(one_client(url, right, tokens, until, enough, seed, tally) for seed in range(clients)))
    return tally


def main() -> None:
    """Start a server, put it under load, and print the outcomes."""
    from tests.serving.conftest import Process

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--tokens", type=int, default=64)
    arguments = parser.parse_args()
    server = Process(Path("serve.log"), "--model", arguments.model)
    try:
        right = asyncio.run(expected(server.url, 40, arguments.tokens))
        for clients in (1, 8, 64):
            began, seconds = server.memory(), 60 * arguments.minutes
            tally = asyncio.run(load(server.url, clients, seconds, right, arguments.tokens))
            print(f"{clients:2} clients: {tally}; {tally.tokens / seconds:.0f} tokens/s together", flush=True)
            print(f"            memory {began / 1e6:.0f} MB before, {server.memory() / 1e6:.0f} MB after")
            for failure in tally.failed[:5]:
                print(f"            {failure}")
        metrics = httpx.get(f"{server.url}/metrics").text
        print([line for line in metrics.splitlines() if line.startswith(("mlx_gpt_active", "mlx_gpt_queued"))])
    finally:
        server.process.terminate()
        sys.exit(server.process.wait())


if __name__ == "__main__":
    main()
