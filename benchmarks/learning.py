"""Measures how much a model learns in a few minutes, compared with nanoGPT's way to train.

    python benchmarks/learning.py --minutes 5

Each contender trains on the same text with the same threads for the same minutes, each by itself and in turns. The
minutes include evaluations, but not the tokenizer's training and the trial steps before the first one. All contenders
have a tokenizer of 2,048 entries, and are compared in bits per byte over the whole validation side. A contender's
result is its best evaluation, because that is the model which both programs keep.
"""

import installed  # noqa: F401  # isort: skip

import contextlib
import itertools
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

import facts
import report
from harness import (
    NotInstalledError,
    Worker,
    check_file,
    common_options,
    device_option,
    leave_out,
    need,
    summary,
    turns_bar,
)

ADAMW, MUON, RECIPE, NANOGPT = "GPT-2, AdamW", "GPT-2, Muon", "recipe", "nanoGPT"
OURS: dict[str, dict[str, Any]] = {
    ADAMW: {"preset": "tiny"},
    MUON: {"preset": "tiny", "optimizer": "muon"},
    RECIPE: {"recipe": "quick"},
}


@click.command()
@click.option("--data", default="builtin", show_default=True, help="A text, or a folder of texts, as in mlx-gpt train.")
@click.option("--minutes", default=5.0, show_default=True, type=click.FloatRange(0, min_open=True), help="For each.")
@click.option("--steps", type=click.IntRange(1), help="Compare after this many steps, not after minutes.")
@click.option(
    "--contender", "names", multiple=True, type=click.Choice([*OURS, NANOGPT]), help="Only this one; may be repeated."
)
@device_option
@common_options
@click.option(
    "--plot", "picture", metavar="FILE", callback=check_file, help="Draw bits per byte over minutes into this PNG."
)
def main(
    data: str,
    minutes: float,
    steps: int | None,
    names: Sequence[str],
    device: str,
    threads: int,
    trials: int,
    json_file: str | None,
    picture: str | None,
) -> None:
    """Train each contender with several seeds, and compare what it has learned."""
    if picture:
        need("matplotlib")
        picture = str(Path(picture).resolve())
    limit = {"steps": steps} if steps else {"minutes": minutes}
    result = facts.begin("learning", data=Path(data).stem, threads=threads, seeds=trials, **limit)
    names = list(names) or [*OURS, NANOGPT]
    data = data if data == "builtin" else str(Path(data).resolve())
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        if NANOGPT in names:
            try:
                need("torch")
                write_tokens(data, Path("tokens"))
            except NotInstalledError as error:
                leave_out(NANOGPT, error)
                names.remove(NANOGPT)
                if not names:
                    raise
        found: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
        with turns_bar("learning", trials * len(names)) as turn:
            for seed in range(1, trials + 1):
                first = seed % len(names)  # a laptop slows down when it heats up, so each comes first in turn
                for name in names[first:] + names[:first]:
                    found[name].append(learn(name, data, seed, minutes, steps, device, threads))
                    turn()
    result["rows"] = [row(name, runs, found) for name, runs in found.items()]
    report.finish(result, json_file)
    if picture:
        report.draw([result], Path(picture))


def learn(
    name: str, data: str, seed: int, minutes: float, steps: int | None, device: str, threads: int
) -> dict[str, Any]:
    """Let one contender train once."""
    if name == NANOGPT:
        from mlx_gpt.device import device as found

        kind = "cpu" if device == "cpu" else found().kind
        given = {"tokens": str(Path("tokens").resolve()), "seed": seed, "minutes": minutes, "steps": steps}
        worker = Worker(name, ["learn_nanogpt.py"], threads, {**given, "evaluate_every": 500, "kind": kind})
    else:
        settings = {**OURS[name], "data": data, "seed": seed, "out": f"run-{os.urandom(4).hex()}"}
        settings |= {"max_steps": steps} if steps else {}
        given = {"settings": settings, "minutes": None if steps else minutes, "evaluate_every": 200, "device": device}
        worker = Worker(name, ["learn_ours.py"], threads, given)
    with worker:
        result: dict[str, Any] = worker.ask("train")
        return result | worker.facts


def write_tokens(data: str, folder: Path) -> None:
    """Write the tokens of a text as PyTorch's contender reads them, with a vocabulary of 2,048 entries."""
    from mlx_gpt.data.corpus import open_corpus
    from mlx_gpt.data.tokens import get_tokenizer, tokenize

    folder.mkdir()
    corpus = open_corpus(data)
    tokenizer = get_tokenizer("bpe", 2048, corpus, lambda line: None)
    tokens = tokenize(corpus, tokenizer)
    for what, array in (("train", tokens.train), ("val", tokens.val), ("bytes", tokenizer.byte_lengths())):
        np.save(folder / f"{what}.npy", array)


def row(name: str, runs: Sequence[dict[str, Any]], found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """A contender's row in the table."""
    bits = [run["bits_per_byte"] for run in runs]
    compared = found.get(ADAMW)
    baseline = statistics.mean(run["bits_per_byte"] for run in compared) if compared else None
    reached = [when for run in runs if baseline and (when := minutes_to(run["curve"], baseline)) is not None]
    return {
        "program": name,
        "parameters": runs[0]["parameters"],
        "steps": summary([run["steps"] for run in runs]),
        "bits_per_byte": {"mean": statistics.mean(bits), "spread": statistics.stdev(bits) if len(bits) > 1 else None},
        "each": bits,
        **{what: [run[what] for run in runs] for what in ("kind", "dtype", "dropout")},
        "over_adamw": statistics.mean(bits) / baseline if baseline else None,
        "minutes_to_adamw": statistics.mean(reached) if len(reached) == len(runs) else None,
        "curves": [run["curve"] for run in runs],
    }


def minutes_to(curve: Sequence[dict[str, float]], bits: float) -> float | None:
    """The minutes after which a curve reaches so many bits per byte, between two evaluations by a straight line."""
    for before, after in itertools.pairwise(curve):
        if after["bits_per_byte"] <= bits:
            drop = before["bits_per_byte"] - after["bits_per_byte"]
            part = (before["bits_per_byte"] - bits) / drop if drop > 0 else 1.0
            return before["minutes"] + min(1.0, max(0.0, part)) * (after["minutes"] - before["minutes"])
    return None


if __name__ == "__main__":
    main()
