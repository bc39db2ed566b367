"""Measures how many tokens `mlx-gpt serve` sends to one client and to several at once, compared with mlx-lm's server.

    python benchmarks/serving.py

Random weights of GPT-2's smallest shape are written once. Both servers load them, each in a process of its own, and are
asked in turns. A client sends a prompt, reads the stream to its end, and sends the next prompt. Tokens per second count
from the first request to the last token. On a CPU under Linux mlx-lm's server runs with mlx-gpt's BLAS.
"""

import installed  # noqa: F401  # isort: skip

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np

import facts
import report
from harness import common_options, environment, free_ports, leave_out, need, pairwise, summary, turns_bar
from shapes import SHAPES, settings_of

try:
    import httpx
except ModuleNotFoundError:
    sys.exit("httpx is not installed: pip install -e '.[bench]' brings it.")

OURS, THEIRS = "mlx-gpt serve", "mlx_lm.server"
CLIENTS = (1, 8, 64)
ROUNDS = 2  # requests of each client in a turn
# mlx-lm's server imports mlx_gpt.device first, so that both have the same BLAS.
START = {
    OURS: "import sys; from mlx_gpt.cli import run; sys.exit(run(['serve', *sys.argv[1:], '--max-queue', '64']))",
    THEIRS: "import mlx_gpt.device; from mlx_lm.server import main; main()",
}


@dataclass
class Turn:
    """What all clients of one turn measured.

    Attributes:
        tokens: generated for all clients together.
        lost: requests that were sent again because their connection was reset.
        seconds: from the first request to the last token.
        first: seconds from each request to its first token.
    """

    tokens: int = 0
    lost: int = 0
    seconds: float = 0.0
    first: list[float] = field(default_factory=list)

    @property
    def speed(self) -> float:
        """Tokens per second of all clients together."""
        return self.tokens / self.seconds


@click.command()
@click.option("--preset", default="gpt2", show_default=True, type=click.Choice(list(SHAPES)))
@click.option("--prompt-tokens", default=64, show_default=True, type=click.IntRange(1))
@click.option("--new-tokens", default=48, show_default=True, type=click.IntRange(2))
@common_options
def main(preset: str, prompt_tokens: int, new_tokens: int, trials: int, threads: int, json_file: str | None) -> None:
    """Time both servers with 1, 8 and 64 clients."""
    result = facts.begin("serving", threads=threads, trials=trials)
    programs = [OURS]
    try:
        need("mlx-lm")
        programs.append(THEIRS)
    except click.ClickException as error:
        leave_out("mlx-lm", error)
    settings = settings_of(preset)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write = "import json, sys; from generate_with import Ours; Ours(sys.argv[1], 'auto', json.loads(sys.argv[2]))"
        here = Path(__file__).parent
        subprocess.run([sys.executable, "-c", write, str(folder), json.dumps(settings)], cwd=here, check=True)
        urls = {name: stack.enter_context(serving(name, folder, threads)) for name in programs}
        prompts = Prompts(settings["vocab_size"], prompt_tokens)
        turns: dict[tuple[int, str], list[Turn]] = {(count, name): [] for count in CLIENTS for name in programs}
        for name in programs:  # a warm-up, which compiles kernels
            asyncio.run(turn(urls[name], 8, prompts, new_tokens))
        with turns_bar("serving", trials * len(turns)) as bar:
            for _ in range(trials):
                for count, name in turns:
                    turns[count, name].append(asyncio.run(turn(urls[name], count, prompts, new_tokens)))
                    bar()
    sizes = f"{prompt_tokens} tokens of prompt, {new_tokens} new ones, {ROUNDS} requests of each client in a turn"
    result |= {"shapes": {preset: {"sizes": sizes}}, "rows": rows(turns)}
    report.finish(result, json_file)


class Prompts:
    """Random prompts, a new one for each request, because a server may cache the keys and values of a prompt."""

    def __init__(self, vocab_size: int, length: int) -> None:
        self._draw, self._entries, self._length = np.random.default_rng(0), vocab_size, length

    def __call__(self) -> str:
        """The next prompt: letters, each of which is one token."""
        return bytes(self._draw.integers(ord("a"), ord("z") + 1, self._length, np.uint8)).decode()


@contextlib.contextmanager
def serving(name: str, folder: Path, threads: int) -> Iterator[str]:
    """Run a server, and yield its URL."""
    port = free_ports(1)
    command = [sys.executable, "-c", START[name], "--model", str(folder), "--port", str(port)]
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=environment(threads))
        try:
            for _ in range(600):
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{url}/health").status_code == 200:
                        break
                if process.poll() is not None:
                    log.seek(0)
                    raise click.ClickException(f"{name} ended: {log.read().strip().splitlines()[-1]}")
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.wait()


async def turn(url: str, clients: int, prompts: Prompts, new_tokens: int) -> Turn:
    """Let `clients` clients send `ROUNDS` requests each, one after the other."""
    result, began = Turn(), time.perf_counter()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

        async def ask() -> None:
            left = ROUNDS
            while left:
                try:
                    await one(client, prompts(), new_tokens, result)
                    left -= 1
                except httpx.TransportError:
                    result.lost += 1

        await asyncio.gather(*(ask() for _ in range(clients)))
    result.seconds = time.perf_counter() - began
    return result


async def one(client: httpx.AsyncClient, prompt: str, new_tokens: int, result: Turn) -> None:
    """Send one request, read its stream, and add what was measured to `result`.

    Raises:
        click.ClickException: the server refused it, or sent another number of tokens than asked for.
    """
    asked: dict[str, Any] = {"prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "stream": True}
    asked["stream_options"] = {"include_usage": True}
    began, first, made = time.perf_counter(), 0.0, 0
    async with client.stream("POST", "/v1/completions", json=asked) as answer:
        if answer.status_code != 200:
            raise click.ClickException(f"{answer.status_code}: {(await answer.aread()).decode()[:200]}")
        async for line in answer.aiter_lines():
            if line.startswith("data: {"):
                first = first or time.perf_counter()
                if '"completion_tokens"' in line:  # only in the last event
                    made = json.loads(line.removeprefix("data: "))["usage"]["completion_tokens"]
    if made != new_tokens:
        raise click.ClickException(f"The server sent {made} tokens instead of {new_tokens}.")
    result.tokens += made
    result.first.append(first - began)


def rows(turns: dict[tuple[int, str], list[Turn]]) -> list[dict[str, Any]]:
    """A row for each number of clients and server."""
    speeds = {key: [one.speed for one in several] for key, several in turns.items()}
    return [
        {
            "clients": count,
            "program": name,
            "tokens_per_second": summary(speeds[count, name]),
            "first_token": summary([seconds for one in several for seconds in one.first]),
            "lost": sum(one.lost for one in turns[count, name]),
            "over_one_client": pairwise(speeds[count, name], speeds[1, name]) if count > 1 else None,
            "ours_over_this": pairwise(speeds[count, OURS], speeds[count, name]) if name != OURS else None,
        }
        for (count, name), several in turns.items()
    ]


if __name__ == "__main__":
    main()
