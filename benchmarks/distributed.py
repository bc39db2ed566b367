"""Measures training on several ranks of one machine, compared with one process.

    python benchmarks/distributed.py

Both train as `mlx-gpt train` does, on the same windows with the same settings. Validation and checkpoints are left out.
`mlx.launch` starts the ranks, which share the windows of each step. Each process has one thread for its products, so
the one process uses one core, and so does each rank.
"""

import installed  # noqa: F401  # isort: skip

import contextlib
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import facts
import report
from harness import Worker, common_options, device_option, pairwise, summary, take_turns, turns_bar
from loop import run_in
from shapes import Found, by_shape, describe, preset_option, settings_of

ONE = "one process"
# Largest relative difference of a loss. Ranks add up in another order, and Adam's update for a gradient near zero is
# mostly rounding.
TOLERANCE = 1e-4


@click.command()
@preset_option("tiny", "tiny-b64")  # the second with as many windows per step as the larger presets have
@click.option("--ranks", default=2, show_default=True, type=click.IntRange(2), help="Processes against the one.")
@click.option("--steps", default=20, show_default=True, type=click.IntRange(10), help="Steps per trial.")
@device_option
@functools.partial(common_options, threads=1)
def main(preset: tuple[str, ...], json_file: str | None, **given: Any) -> None:
    """Time training on several ranks and in one process."""
    result = facts.begin("distributed", threads=given["threads"], trials=given["trials"])
    result |= by_shape(preset, lambda shape: measure(shape, **given))
    report.finish(result, json_file)


def measure(shape: str, ranks: int, steps: int, trials: int, threads: int, device: str) -> Found:
    """The facts of one shape, and a row for the one process and for the ranks."""
    settings = settings_of(shape)
    several = f"{ranks} ranks"
    with contextlib.ExitStack() as stack:
        workers = []
        for name, count in ((ONE, 1), (several, ranks)):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            given = {"settings": settings | run_in(folder), "device": device}
            workers.append(stack.enter_context(Worker(name, ["train_loop.py"], threads, given, ranks=count)))

        def ask(worker: Worker) -> Any:
            return worker.ask("run", steps=steps)

        warm_up = take_turns(workers, 1, ask, lambda: None)
        with turns_bar(shape, 2 * trials) as turn:
            answers = take_turns(workers, trials, ask, turn)
    difference = largest_difference(*(first["losses"] for (first,) in warm_up.values()))
    tokens = steps * settings["batch_size"] * settings["seq_len"]
    speeds = {name: [tokens / trial["seconds"] for trial in trials] for name, trials in answers.items()}
    rows = [
        {
            "program": name,
            "tokens_per_second": summary(speed),
            "resident_memory": answers[name][-1]["resident_memory"],
            "over_one": None if name == ONE else pairwise(speed, speeds[ONE]),
            "loss_difference": None if name == ONE else difference,
        }
        for name, speed in speeds.items()
    ]
    return {"sizes": describe(settings | workers[0].facts), "steps": steps}, rows


def largest_difference(one: Sequence[float], several: Sequence[float]) -> float:
    """The largest relative difference between the logged losses of one process and of several ranks.

    Raises:
        click.ClickException: it is more than rounding explains.
    """
    largest = 0.0
    for i, (alone, shared) in enumerate(zip(one, several, strict=True), 1):
        difference = abs(shared - alone) / alone
        if not difference <= TOLERANCE:  # so a NaN is refused too
            raise click.ClickException(
                f"In line {i} of the log the loss of the ranks is {shared:.6f} and that of one process {alone:.6f}."
            )
        largest = max(largest, difference)
    return largest


if __name__ == "__main__":
    main()
