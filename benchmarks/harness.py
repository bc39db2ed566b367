"""Runs contenders in processes of their own, in turns, and summarises their times.

A benchmark starts one `Worker` per contender, each of which runs a program in this folder, and asks them in turns.
While one computes, the others wait for a line on standard input and have returned their cached memory. A disturbance
of the machine therefore hits neighbouring turns alike, and every turn gives a ratio of its own.
"""

import installed  # noqa: F401  # isort: skip

import contextlib
import importlib.util
import itertools
import json
import os
import re
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
# A float32 product is a float32 product in every library and in the machine's limit. MLX would use TF32 on CUDA and on
# the M5. PyTorch wouldn't, unless an environment asks for it, as some containers do.
TF32 = False
TF32_SETTINGS = ("MLX_ENABLE_TF32", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")
TORCH_DEVICES = {"cpu": "cpu", "metal": "mps", "cuda": "cuda"}


class Worker:
    """A process that serves one request at a time.

    Args:
        name: the contender's name in tables and messages.
        program: a file in benchmarks/, and its arguments.
        threads: how many threads its libraries may use.
        settings: the arguments of the program's `start`, whose result is kept in `facts`.
        checkout: another checkout of mlx-gpt. Its own program runs with its own mlx_gpt, because the program of this
            folder knows only the mlx_gpt beside it. All speak the same protocol (`serve`).
        ranks: how many ranks `mlx.launch` starts. All receive each request, and the first one answers.
        variables: additional environment variables.

    Raises:
        click.ClickException: it could not start; the message ends with the last line of its standard error.
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
        folder = checkout / "benchmarks" if checkout else HERE
        command = [sys.executable, str(folder / program[0]), *program[1:]]
        if ranks > 1:
            launcher = str(Path(sys.executable).with_name("mlx.launch"))
            command = [launcher, "-n", str(ranks), "-p", str(free_ports(ranks)), "--", *command]
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env={**environment(threads, checkout), **(variables or {})},
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
        """Send a request and wait for its result.

        Raises:
            click.ClickException: the request failed.
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
            if self._ranks > 1:  # mlx.launch forwards what it reads, but not the end of its input
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
        return lines[-1] if lines else "it printed no error"


def free_ports(count: int) -> int:
    """The first of `count` consecutive free ports, below the range from which systems assign ports."""
    for first in range(20_000 + os.getpid() % 10_000, 32_000):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + count):
                stack.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise click.ClickException("No port from 20000 to 32000 is free: quit programs that hold some.")


def environment(threads: int, checkout: Path | None = None) -> dict[str, str]:
    """The environment of a worker. Libraries read it when they are imported, so it comes before MLX and PyTorch."""
    settings = dict.fromkeys(THREAD_SETTINGS, str(threads)) | dict.fromkeys(TF32_SETTINGS, str(int(TF32)))
    if checkout:
        settings["PYTHONPATH"] = str(checkout)
    return {**os.environ, **settings}


class Requests:
    """The worker's side: iterates over requests, and answers them.

    Output of libraries goes to standard error, so that it is not mistaken for an answer.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def __iter__(self) -> Iterator[tuple[str, dict[str, Any]]]:
        while (line := sys.stdin.readline()) and json.loads(line) != END:
            yield json.loads(line)

    def answer(self, result: Any, error: str = "") -> None:
        """Send a result, or one sentence about an error."""
        self._answers.write(json.dumps([result, error]) + "\n")
        self._answers.flush()


def serve(start: Callable[..., Any]) -> None:
    """Answer requests until the input ends.

    The request `start` makes an object and returns its `facts()`. Every other request calls the method of its name.
    """
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
    """Ask the workers in turn, in `trials` rounds. Returns each worker's answers by its name."""
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
    """The summary of the ratios of values to others, turn by turn."""
    return summary([value / other for value, other in zip(values, others, strict=True)])


class NotInstalledError(click.ClickException):
    """A package to compare with is missing."""


def need(package: str) -> None:
    """Check that a package to compare with is installed.

    Raises:
        NotInstalledError: it is missing; the message says how to install it.
    """
    if importlib.util.find_spec(package.replace("-", "_")) is None:
        raise NotInstalledError(f"{package} is not installed: pip install -e '.[bench]' brings it.")


def leave_out(name: str, error: click.ClickException) -> None:
    """Report on stderr that the measurement continues without a contender, and why."""
    click.echo(f"Measured without {name}. {error.message}", err=True)


def write_json(path: str, result: Mapping[str, Any]) -> None:
    """Write a result to a file. In a folder, the file is named after the benchmark and the chip."""
    file = Path(path)
    if file.is_dir():
        file = new_file(file, result)
        click.echo(f"The result is in {file}.", err=True)
    file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def new_file(folder: Path, result: Mapping[str, Any]) -> Path:
    """A name such as throughput-apple-m1-pro-16-gpu-cores.json, with a number if that file exists."""
    machine = result["machine"]
    cores = f"{machine['gpu_cores']} gpu" if "gpu_cores" in machine else machine["cores"]
    chip = machine.get("gpu") or f"{machine['chip']} {cores} cores"
    stem = re.sub("[^a-z0-9]+", "-", f"{result['benchmark']} {chip}".lower())
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(file for name in names if not (file := folder / f"{name}.json").exists())


def available_threads() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def common_options(command: Callable[..., Any], threads: int = 0) -> Callable[..., Any]:
    """Add the flags of every benchmark. By default `threads` is the number of available cores."""
    shown = str(threads or "all cores")
    count = click.IntRange(1)
    options = (
        click.option(
            "--threads",
            default=threads or available_threads(),
            show_default=shown,
            type=count,
            help="Threads of each contender.",
        ),
        click.option("--trials", default=5, show_default=True, type=count, help="Turns of each contender."),
        click.option(
            "--json",
            "json_file",
            metavar="FILE",
            callback=check_file,
            help="Write the result to this file as well; in a folder, to a file named after the chip.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def check_file(context: click.Context, parameter: click.Parameter, path: str | None) -> str | None:
    """Refuse a file in a folder that doesn't exist before anything is measured.

    Raises:
        click.BadParameter: the folder doesn't exist.
    """
    if path and not Path(path).absolute().parent.is_dir():
        raise click.BadParameter(f"the folder {Path(path).parent} doesn't exist: create it first.")
    return path


def device_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--device`."""
    choices = click.Choice(["auto", "cpu", "gpu"])
    explained = "Device of all contenders."
    return click.option("--device", default="auto", show_default=True, type=choices, help=explained)(command)


@contextlib.contextmanager
def turns_bar(what: str, length: int) -> Iterator[Callable[[], object]]:
    """Show a bar of finished turns on standard error if that is a terminal. Yields the function that advances it."""
    with click.progressbar(length=length, label=what, file=sys.stderr, hidden=not sys.stderr.isatty()) as bar:
        yield lambda: bar.update(1)
