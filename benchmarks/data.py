"""Measures how fast text becomes training data, and how much memory that takes.

    python benchmarks/data.py --megabytes 10 --megabytes 100 --megabytes 1000

A text of each size is generated into a temporary folder, which needs 3.5 times that size. A process of its own then
runs `mlx-gpt prepare`, trains a byte-level BPE tokenizer and encodes the whole text. A megabyte is a million bytes.
"""

import installed  # noqa: F401  # isort: skip

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import facts
import report
from harness import Worker, common_options, summary, turns_bar
from words import write_text

PARTS = {"prepare": "prepare", "train_tokenizer": "learn the tokenizer", "tokenise": "tokenise"}
ROOM = 3.5  # bytes on the disk per byte of text: the text, the corpus, the tokens, and a reserve


@click.command()
@click.option(
    "--megabytes", multiple=True, default=[10], show_default=True, type=click.IntRange(1), help="Size of a text."
)
@click.option(
    "--vocab-size", default=16384, show_default=True, type=click.IntRange(259), help="Entries of the tokenizer."
)
@common_options
def main(megabytes: Sequence[int], vocab_size: int, trials: int, threads: int, json_file: str | None) -> None:
    """Time the preparation of generated text."""
    result = facts.begin("data", threads=threads, trials=trials)
    result["rows"] = [row for size in megabytes for row in measure(size, vocab_size, trials, threads)]
    report.finish(result, json_file)


def measure(megabytes: int, vocab_size: int, trials: int, threads: int) -> list[dict[str, Any]]:
    """A row for each part, one for preparing and tokenising (a tokenizer exists), and one for all three.

    Raises:
        click.ClickException: the disk has too little room, or a part failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < ROOM * megabytes * 1e6:
            raise click.ClickException(
                f"{megabytes:,} MB of text need {ROOM * megabytes / 1000:g} GB in {tempfile.gettempdir()}: "
                "free that much, or set TMPDIR to a folder on another disk."
            )
        text = Path(folder, "text.txt")
        write_text(text, megabytes * 1_000_000)
        answers: list[dict[str, Any]] = []
        with turns_bar(f"{megabytes} MB", trials) as turn:
            for _ in range(trials):
                with tempfile.TemporaryDirectory(dir=folder) as corpus:
                    settings = {"text": str(text), "folder": corpus, "vocab_size": vocab_size}
                    with Worker("mlx-gpt", ["prepare_text.py"], threads, settings) as worker:
                        answers.append({part: worker.ask(part) for part in PARTS})
                turn()
    found = [row(megabytes, name, [answer[part] for answer in answers]) for part, name in PARTS.items()]
    both = [together(answer, ["prepare", "tokenise"]) for answer in answers]
    every = [together(answer, list(PARTS)) for answer in answers]
    return [*found, row(megabytes, "prepare and tokenise", both), row(megabytes, "all three", every)]


def together(answer: dict[str, dict[str, Any]], parts: Sequence[str]) -> dict[str, Any]:
    """Several parts of one trial as one."""
    return {
        "seconds": sum(answer[part]["seconds"] for part in parts),
        "resident_memory": max(answer[part]["resident_memory"] for part in parts),
    }


def row(megabytes: int, program: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """The row of one part."""
    return {
        "megabytes": megabytes,
        "program": program,
        "seconds": summary([answer["seconds"] for answer in answers]),
        "megabytes_per_second": summary([megabytes / answer["seconds"] for answer in answers]),
        "resident_memory": max(answer["resident_memory"] for answer in answers),
    }


if __name__ == "__main__":
    main()
