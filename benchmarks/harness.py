"""Trials in processes of their own, taken in turns, and what is made of their times.

A benchmark starts one `Worker` per contender, each running a program of this folder, and asks them in turns, A B A B:
while one computes, the others wait for a line on their standard input, with their caches given back. So what disturbs
the machine for a while disturbs neighbours alike, and each turn gives a ratio of its own.
"""

import contextlib
import importlib.util
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent
END = ["end", {}]
THREAD_SETTINGS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "VECLIB_MAXIMUM_THREADS")


class Worker:
    """A process that does what it is asked, one request at a time.

    Args:
        name: for people.
        program: a file of this folder, and its arguments.
        threads: as many as the libraries in it may take.
        settings: for the program's `start`; what that returns is in `facts`.
        checkout: take mlx_gpt from this folder, not from where it is installed.
        ranks: run so many of it by `mlx.launch`, all of which are asked and the first of which answers.
        variables: of its environment.

    Raises:
        click.ClickException: it could not start; the message is the last thing that it said.
    """

    def __init__(
        self,
        name: str,
        program: Sequence[str],
        threads: int,
        settings: Mapping[str, Any],
        checkout: Path | None = None,
        ranks: int = 1,
        variables: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._ranks = ranks
        command = [sys.executable, str(HERE / program[0]), *program[1:]]
        if ranks > 1:
            launcher = str(Path(sys.executable).with_name("mlx.launch"))
            command = [launcher, "-n", str(ranks), "-p", str(free_ports(ranks)), "--", *command]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**environment(threads, settings.get("precision", ""), checkout), **(variables or {})},
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        self._process, self._requests, self._answers = process, process.stdin, process.stdout
        try:
            self.facts = self.ask("start", **settings)
        except BaseException:
            self.close()
            raise

    def ask(self, what: str, **arguments: Any) -> Any:
        """Have `what` done and wait for the result.

        Raises:
            click.ClickException: it failed.
        """
        with contextlib.suppress(BrokenPipeError):
            self._requests.write(json.dumps([what, arguments]) + "\n")
            self._requests.flush()
        answer = self._answers.readline()
        if not answer:
            code = self._process.wait()
            raise click.ClickException(f"{self.name} ended with code {code}: {self._last_words()}")
        result, error = json.loads(answer)
        if error:
            raise click.ClickException(f"{self.name}: {error}")
        return result

    def close(self) -> None:
        """End the process."""
        with contextlib.suppress(BrokenPipeError):
            if self._ranks > 1:  # mlx.launch passes on what it reads, but not that there is no more
                self._requests.write(json.dumps(END) + "\n")
            self._requests.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._answers.close()
        self._errors.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()
        return lines[-1] if lines else "it said nothing"


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody uses, below those that systems give out by themselves."""
    for first in range(20_000 + os.getpid() % 10_000, 32_000):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise click.ClickException("There are no ports left for mlx.launch: end what uses them.")


def environment(threads: int, precision: str, checkout: Path | None) -> dict[str, str]:
    """The environment of a worker."""
    settings = dict.fromkeys(THREAD_SETTINGS, str(threads))
    if precision == "float32":
        settings["MLX_ENABLE_TF32"] = "0"  # PyTorch's float32 is float32 by default, so ours is too
    if checkout:
        settings["PYTHONPATH"] = str(checkout)
    return {**os.environ, **settings}


class Requests:
    """The other side: what a worker is asked, and its way to answer.

    What libraries print goes to standard error, so that it is not taken for an answer.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        while (line := sys.stdin.readline()) and json.loads(line) != END:
            yield json.loads(line)

    def answer(self, result: Any, error: str = "") -> None:
        """Send what came out, or one sentence about what went wrong."""
        self._answers.write(json.dumps([result, error]) + "\n")
        self._answers.flush()


def serve(start: Callable[..., Any]) -> None:
    """Answer requests until there are no more: `start` makes an object and returns its `facts()`, all else calls it."""
    requests, served = Requests(), None
    for what, arguments in requests:
        try:
            if what == "start":
                served = start(**arguments)
                result = served.facts()
            else:
                result = getattr(served, what)(**arguments)
        except Exception as error:
            traceback.print_exc()
            requests.answer(None, f"{type(error).__name__}: {error}".splitlines()[0])
        else:
            requests.answer(result)


def take_turns(
    workers: Sequence[Worker], trials: int, ask: Callable[[Worker], Any], progress: Callable[[], object]
) -> dict[str, list[Any]]:
    """Ask each worker in turn, `trials` times around; the answers by name."""
    answers: dict[str, list[Any]] = {worker.name: [] for worker in workers}
    for _ in range(trials):
        for worker in workers:
            answers[worker.name].append(ask(worker))
            progress()
    return answers


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def pairwise(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """The ratio of each value to the other one of its turn, summed up."""
    return summary([value / other for value, other in zip(values, others, strict=True)])


def need(package: str) -> None:
    """Make sure that a package is there to compare with.

    Raises:
        click.ClickException: it is not; the sentence says how to install it.
    """
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise click.ClickException(f"{package} is not installed: pip install -e '.[bench]' brings it.")


def write_json(path: str, result: Mapping[str, Any]) -> None:
    """Write a result, for `report.py` or for another machine's reader."""
    Path(path).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def available_threads() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def common_options(command: Callable[..., Any], threads: int = 0) -> Callable[..., Any]:
    """The flags that every benchmark has; `threads` of 0 are all cores."""
    shown = str(threads or "all cores")
    options = (
        click.option("--threads", default=threads or available_threads(), show_default=shown, type=click.IntRange(1)),
        click.option("--trials", default=5, show_default=True, type=click.IntRange(1), help="Turns of each."),
        click.option("--json", "json_file", metavar="FILE", help="Write the result there too."),
    )
    for option in reversed(options):
        command = option(command)
    return command


def device_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """`--device`."""
    choices = click.Choice(["auto", "cpu", "gpu"])
    return click.option("--device", default="auto", show_default=True, type=choices, help="Where all compute.")(command)


@contextlib.contextmanager
def turns_bar(what: str, length: int) -> Iterator[Callable[[], object]]:
    """Show on standard error, if that is a terminal, how many turns are done."""
    with click.progressbar(length=length, label=what, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        yield lambda: bar.update(1)
