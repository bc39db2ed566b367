"""The peak memory of a training step, and what it costs in time.

    python benchmarks/memory.py

The same step is made in several ways, each in a process of its own, in turns: plainly, with the loss from all logits
at once and every activation kept (`train_plain.py`); as `mlx-gpt train` makes it; and with --grad-checkpoint. The peak
is MLX's own count of the bytes that its arrays have held at once.
"""

import contextlib
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import facts
import report
from harness import Worker, common_options, device_option, pairwise, summary, take_turns, turns_bar, write_json
from shapes import SHAPES, describe, settings_of, write_windows

PLAIN = "plain"
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    PLAIN: ("train_plain.py", {}),
    "mlx-gpt": ("train_ours.py", {}),
    "mlx-gpt --grad-checkpoint": ("train_ours.py", {"grad_checkpoint": True}),
}


@click.command()
@click.option("--preset", multiple=True, default=["gpt2"], show_default=True, type=click.Choice(list(SHAPES)))
@click.option("--batch-size", type=click.IntRange(1), help="Windows per step. [default: the shape's]")
@click.option("--seq-len", type=click.IntRange(1), help="Tokens per window. [default: the shape's]")
@click.option("--steps", default=1, show_default=True, type=click.IntRange(1), help="Steps per trial, after one more.")
@device_option
@common_options
def main(
    preset: Sequence[str],
    batch_size: int | None,
    seq_len: int | None,
    json_file: str | None,
    steps: int,
    trials: int,
    threads: int,
    device: str,
) -> None:
    """Measure the peak memory of a training step, and its time, plain and as mlx-gpt makes it."""
    result = facts.gather("memory", threads=threads, trials=trials)
    facts.warn_if_busy(result["machine"]["load_before"])
    result |= {"shapes": {}, "rows": []}
    for shape in preset:
        settings = settings_of(shape, batch_size=batch_size, seq_len=seq_len)
        result["shapes"][shape], rows = measure(shape, settings, steps, trials, threads, device)
        result["rows"] += [{"shape": shape, **row} for row in rows]
    if json_file:
        write_json(json_file, result)
    click.echo("\n".join(report.lines(result)))


def measure(
    shape: str, settings: dict[str, Any], steps: int, trials: int, threads: int, device: str
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The facts of one shape, and a row for each way."""
    with contextlib.ExitStack() as stack:
        windows = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "windows.npy"
        write_windows(windows, settings)
        where = {"windows": str(windows), "device": device, "precision": "auto"}
        workers = [
            stack.enter_context(Worker(name, [program], threads, {"settings": settings | changes, **where}))
            for name, (program, changes) in WAYS.items()
        ]
        rates = [settings["learning_rate"]] * (1 + steps)

        def ask(worker: Worker) -> Any:
            return worker.ask("run", rates=rates, warm_up=1)

        with turns_bar(shape, trials * len(workers)) as turn:
            answers = take_turns(workers, trials, ask, turn)
        rows = [row(worker, answers, steps) for worker in workers]
        return {"sizes": describe(settings), **workers[0].facts, "steps": steps}, rows


def row(worker: Worker, answers: dict[str, list[dict[str, Any]]], steps: int) -> dict[str, Any]:
    """What came out for one way."""
    seconds = {name: [trial["seconds"] / steps for trial in trials] for name, trials in answers.items()}
    peaks = {name: statistics.median(trial["peak_memory"] for trial in trials) for name, trials in answers.items()}
    others = worker.name != PLAIN
    return {
        "program": worker.name,
        "peak_memory": peaks[worker.name],
        "peak_over_plain": peaks[worker.name] / peaks[PLAIN] if others else None,
        "seconds_per_step": summary(seconds[worker.name]),
        "time_over_plain": pairwise(seconds[worker.name], seconds[PLAIN]) if others else None,
        "resident_memory": worker.ask("resident_memory"),
    }


if __name__ == "__main__":
    main()
