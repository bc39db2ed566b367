"""Measures the peak memory of a training step, and its time.

    python benchmarks/memory.py

The same step is made in three ways, each in a process of its own, in turns: with a loss that needs all logits at once
(`train_plain.py`); as `mlx-gpt train` makes it, which computes the logits in chunks; and in that way with
--grad-checkpoint. The peak is the largest number of bytes that MLX's arrays held at once, by MLX's own count.
"""

import installed  # noqa: F401  # isort: skip

import contextlib
import statistics
import tempfile
from pathlib import Path
from typing import Any

import click

import facts
import report
from harness import Worker, common_options, device_option, pairwise, summary, take_turns, turns_bar
from shapes import Found, by_shape, describe, preset_option, settings_of, size_options, write_windows

PLAIN = "plain"
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    PLAIN: ("train_plain.py", {}),
    "mlx-gpt": ("train_ours.py", {}),
    "mlx-gpt --grad-checkpoint": ("train_ours.py", {"grad_checkpoint": True}),
}


@click.command()
@preset_option("gpt2")
@size_options
@click.option("--steps", default=1, show_default=True, type=click.IntRange(1), help="Steps per trial, after one more.")
@device_option
@common_options
def main(
    preset: tuple[str, ...], batch_size: int | None, seq_len: int | None, json_file: str | None, **given: Any
) -> None:
    """Measure peak memory and time of a training step with a plain loss and as mlx-gpt makes it."""
    result = facts.begin("memory", threads=given["threads"], trials=given["trials"])

    def measure_shape(shape: str) -> Found:
        return measure(shape, settings_of(shape, batch_size=batch_size, seq_len=seq_len), **given)

    result |= by_shape(preset, measure_shape)
    report.finish(result, json_file)


def measure(shape: str, settings: dict[str, Any], steps: int, trials: int, threads: int, device: str) -> Found:
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
    """The row of one way."""
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
