"""How fast a text becomes training data, and what memory that takes.

    python benchmarks/data.py --megabytes 10 --megabytes 100 --megabytes 1000

Each size is generated into a temporary folder, which needs three times its room, and goes through a process of its
own: `mlx-gpt prepare`, a byte-level BPE, and the encoding of all of it. A megabyte is a million bytes of text.
"""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import facts
import report
from harness import Worker, common_options, summary, turns_bar, write_json
from words import write_text

PARTS = {"prepare": "prepare", "train_tokenizer": "learn the tokenizer", "tokenise": "tokenise"}
ROOM = 3.5  # the text, the corpus, its tokens, and some


@click.command()
@click.option("--megabytes", multiple=True, default=[10], show_default=True, type=click.IntRange(1), help="A size.")
@click.option("--vocab-size", default=16384, show_default=True, type=click.IntRange(257), help="Of the tokenizer.")
@common_options
def main(megabytes: Sequence[int], vocab_size: int, trials: int, threads: int, json_file: str | None) -> None:
    """Time the preparation of generated text."""
    result = facts.gather("data", threads=threads, trials=trials)
    facts.warn_if_busy(result["machine"]["load_before"])
    result["rows"] = [row for size in megabytes for row in measure(size, vocab_size, trials, threads)]
    if json_file:
        write_json(json_file, result)
    click.echo("\n".join(report.lines(result)))


def measure(megabytes: int, vocab_size: int, trials: int, threads: int) -> list[dict[str, Any]]:
    """A row for each part, one for preparing and tokenising, as with a tokenizer that is there, and one for it all.

    Raises:
        click.ClickException: there is no room for it, or a part failed.
    """
    with tempfile.TemporaryDirectory() as folder:
        if shutil.disk_usage(folder).free < ROOM * megabytes * 1e6:
            raise click.ClickException(
                f"{megabytes:,} MB of text need {ROOM * megabytes / 1000:g} GB for a while: make room, or set TMPDIR."
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
    """Some parts of one trial as if they were one."""
    return {
        "seconds": sum(answer[part]["seconds"] for part in parts),
        "resident_memory": max(answer[part]["resident_memory"] for part in parts),
    }


def row(megabytes: int, program: str, answers: list[dict[str, Any]]) -> dict[str, Any]:
    """What came out for one part."""
    return {
        "megabytes": megabytes,
        "program": program,
        "seconds": summary([answer["seconds"] for answer in answers]),
        "megabytes_per_second": summary([megabytes / answer["seconds"] for answer in answers]),
        "resident_memory": max(answer["resident_memory"] for answer in answers),
    }


if __name__ == "__main__":
    main()
