"""Measures how much of its training step's speed `mlx-gpt train` keeps.

    python benchmarks/loop.py

One process trains as `mlx-gpt train` does: it reads its windows from a tokenised text, logs, and writes its metrics.
Validation and checkpoints are left out. Another process makes the same steps on windows that are in memory.
"""

import installed  # noqa: F401  # isort: skip

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import click

import facts
import report
from harness import Worker, common_options, device_option, pairwise, summary, take_turns, turns_bar
from shapes import Found, by_shape, describe, preset_option, settings_of, write_windows
from words import write_text

BARE, WHOLE = "bare step", "mlx-gpt train"
TEXT_BYTES = 4_000_000
NEVER = 10**9


@click.command()
@preset_option("tiny", "small-t256")
@click.option("--steps", default=20, show_default=True, type=click.IntRange(1), help="Steps per trial.")
@device_option
@common_options
def main(preset: tuple[str, ...], json_file: str | None, **given: Any) -> None:
    """Time `mlx-gpt train` and its bare step."""
    result = facts.begin("loop", threads=given["threads"], trials=given["trials"])
    result |= by_shape(preset, lambda shape: measure(shape, **given))
    report.finish(result, json_file)


def measure(shape: str, steps: int, trials: int, threads: int, device: str) -> Found:
    """The facts of one shape, and a row for each of the two."""
    settings = settings_of(shape)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        given = {"settings": settings | run_in(folder), "device": device}
        whole = stack.enter_context(Worker(WHOLE, ["train_loop.py"], threads, given))
        settings["vocab_size"] = whole.facts["vocab_size"]  # of the tokenizer that was trained on the text
        windows = folder / "windows.npy"
        write_windows(windows, settings)
        given = {"settings": settings, "windows": str(windows), "device": device, "precision": "auto"}
        bare = stack.enter_context(Worker(BARE, ["train_ours.py"], threads, given))
        rates = [settings["learning_rate"]] * steps

        def ask(worker: Worker) -> Any:
            return worker.ask("run", steps=steps) if worker is whole else worker.ask("run", rates=rates)

        take_turns([bare, whole], 1, ask, lambda: None)  # the warm-up
        with turns_bar(shape, 2 * trials) as turn:
            answers = take_turns([bare, whole], trials, ask, turn)
        memory = {BARE: bare.ask("resident_memory"), WHOLE: answers[WHOLE][-1]["resident_memory"]}
    tokens = steps * settings["batch_size"] * settings["seq_len"]
    speeds = {name: [tokens / trial["seconds"] for trial in found] for name, found in answers.items()}
    rows = [
        {
            "program": name,
            "tokens_per_second": summary(speed),
            "resident_memory": memory[name],
            "over_bare": pairwise(speed, speeds[BARE]) if name == WHOLE else None,
        }
        for name, speed in speeds.items()
    ]
    return {"sizes": describe(settings), **bare.facts, "steps": steps}, rows


def run_in(folder: Path) -> dict[str, Any]:
    """Write a text into `folder`, and return the settings of a run on it that doesn't end by itself."""
    write_text(folder / "text.txt", TEXT_BYTES)
    return {
        "data": str(folder / "text.txt"),
        "documents": "line",
        "out": str(folder / "run"),
        "max_steps": NEVER,
        "max_epochs": float(NEVER),
        "eval_every": NEVER,
        "eval_windows": 1,
        "save_every": NEVER,
    }


if __name__ == "__main__":
    main()
