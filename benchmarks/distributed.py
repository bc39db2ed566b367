"""Training on several ranks of one machine against one process.

    python benchmarks/distributed.py

Both train as `mlx-gpt train` does, on the same windows with the same settings; validation and checkpoints are left out.
The ranks are started by `mlx.launch` and share the windows of each step. Each process has one thread for its products,
so that the one process uses one core and the ranks one each.
"""

import contextlib
import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import facts
import report
from harness import Worker, common_options, device_option, pairwise, summary, take_turns, turns_bar, write_json
from loop import run_in
from shapes import SHAPES, describe, settings_of

ONE = "one process"
ON_CPU = ("tiny", "tiny-b64")  # the latter with as many windows a step as the larger presets have
# How far a loss may be off, relatively: sums are made in another order, and Adam makes much of it near zero.
TOLERANCE = 1e-4


@click.command()
@click.option("--preset", multiple=True, default=ON_CPU, show_default=True, type=click.Choice(list(SHAPES)))
@click.option("--ranks", default=2, show_default=True, type=click.IntRange(2), help="Processes against the one.")
@click.option("--steps", default=20, show_default=True, type=click.IntRange(10), help="Steps per trial.")
@device_option
@functools.partial(common_options, threads=1)
def main(
    preset: Sequence[str], ranks: int, json_file: str | None, steps: int, trials: int, threads: int, device: str
) -> None:
    """Measure what several ranks gain on one machine."""
    result = facts.gather("distributed", threads=threads, trials=trials)
    facts.warn_if_busy(result["machine"]["load_before"])
    result |= {"shapes": {}, "rows": []}
    for shape in preset:
        result["shapes"][shape], rows = measure(shape, ranks, steps, trials, threads, device)
        result["rows"] += [{"shape": shape, **row} for row in rows]
    if json_file:
        write_json(json_file, result)
    click.echo("\n".join(report.lines(result)))


def measure(
    shape: str, ranks: int, steps: int, trials: int, threads: int, device: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
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


def largest_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """How far, relative to its size, a logged loss of the ranks' first steps is from that of one process at most.

    Raises:
        click.ClickException: it is more than rounding explains.
    """
    largest = 0.0
    for i, (one, other) in enumerate(zip(ours, theirs, strict=True), 1):
        difference = abs(other - one) / one
        if not difference <= TOLERANCE:
            raise click.ClickException(
                f"In line {i} of the log the ranks' loss is {other:.6f} and that of one process {one:.6f}."
            )
        largest = max(largest, difference)
    return largest


if __name__ == "__main__":
    main()
