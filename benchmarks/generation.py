"""Measures how fast mlx-gpt generates, compared with mlx-lm and transformers on the same model directory.

    python benchmarks/generation.py
    python benchmarks/generation.py --against ../other

Random weights of GPT-2's smallest shape are written once and read by all. All texts of a batch have the same prompt,
and decoding is greedy. In float32 all programs have to choose the same tokens, or they are not compared. Decoding a
token reads every weight except the positions, and the keys and values so far. The table gives these bytes per second
next to the speed of a large copy in the same run. On a CPU under Linux mlx-lm runs twice: with plain OpenBLAS, and with
mlx-gpt's version of it, which has products of its own for few rows. With --against the only other program is another
checkout of mlx-gpt, which writes the model directory that both read.
"""

import installed  # noqa: F401  # isort: skip

import contextlib
import tempfile
from pathlib import Path
from typing import Any

import click
import numpy as np

import facts
import openblas
import report
from harness import Worker, common_options, device_option, leave_out, need, pairwise, summary, take_turns, turns_bar
from shapes import SHAPES, of_a_step, settings_of

OURS = "mlx-gpt"
PROGRAM = ("generate_with.py", "ours")
BATCHES = (1, 8)


@click.command()
@click.option("--preset", default="gpt2", show_default=True, type=click.Choice(list(SHAPES)))
@click.option("--prompt-tokens", default=128, show_default=True, type=click.IntRange(2))
@click.option("--new-tokens", default=64, show_default=True, type=click.IntRange(3))
@click.option("--against", metavar="FOLDER", help="Another checkout of mlx-gpt. [default: mlx-lm and transformers]")
@device_option
@common_options
def main(
    preset: str,
    prompt_tokens: int,
    new_tokens: int,
    against: str | None,
    device: str,
    trials: int,
    threads: int,
    json_file: str | None,
) -> None:
    """Time prefill and decoding of one text and of eight with mlx-gpt and with others."""
    settings = settings_of(preset)
    if prompt_tokens + new_tokens > settings["n_positions"]:
        raise click.UsageError(f"{preset} has {settings['n_positions']} positions: ask for fewer tokens.")
    result = facts.begin("generation", threads=threads, trials=trials)
    with contextlib.ExitStack() as stack:
        given = {"folder": stack.enter_context(tempfile.TemporaryDirectory()), "device": device}
        writes = given | {"write": of_a_step(settings)}
        other = [stack.enter_context(checkout(against, threads, writes))] if against else []
        ours = stack.enter_context(Worker(OURS, PROGRAM, threads, given if against else writes))
        workers = [ours, *(other or others(given, ours.facts, threads, stack))]
        here = {name: ours.facts[name] for name in ("kind", "dtype")}
        limit = stack.enter_context(Worker("MLX", ["roofline.py", "mlx"], threads, here))
        prompt = np.random.default_rng(0).integers(settings["vocab_size"], size=prompt_tokens).tolist()
        for batch_size in BATCHES:
            short = {"prompt": prompt, "batch_size": batch_size, "new_tokens": 3}
            check([worker.ask("run", **short) for worker in workers], workers)

        def ask(worker: Worker) -> Any:
            if worker is limit:
                return worker.ask("copy")
            return [
                worker.ask("run", prompt=prompt, batch_size=batch_size, new_tokens=new_tokens) for batch_size in BATCHES
            ]

        with turns_bar("generation", trials * (1 + len(workers))) as turn:
            answers = take_turns([*workers, limit], trials, ask, turn)
        for turn_of_all in zip(*(answers[worker.name] for worker in workers), strict=True):
            check([runs[0] for runs in turn_of_all], workers)
    copy = max(answers.pop(limit.name))
    sizes = f"{prompt_tokens} tokens of prompt, {new_tokens} new ones"
    shape = {"sizes": sizes, **ours.facts, "copy_gb_per_second": copy}
    result |= {"shapes": {preset: shape}, "rows": rows(answers, shape, prompt_tokens, new_tokens)}
    report.finish(result, json_file)


def checkout(folder: str, threads: int, given: dict[str, Any]) -> Worker:
    """Start another checkout of mlx-gpt.

    Raises:
        click.ClickException: the folder is not one, or its program fails.
    """
    path = Path(folder).resolve()
    name = facts.name_of_checkout(path)
    if not name:
        raise click.ClickException(f"{folder} is not a checkout of mlx-gpt.")
    return Worker(name, PROGRAM, threads, given, path)


def others(given: dict[str, str], ours: dict[str, Any], threads: int, stack: contextlib.ExitStack) -> list[Worker]:
    """Start mlx-lm and transformers. Those that are missing or fail are left out with a sentence."""
    started = []

    def start(name: str, package: str, settings: dict[str, str], variables: dict[str, str] | None = None) -> None:
        try:
            need(package)
            program = ["generate_with.py", package]
            started.append(stack.enter_context(Worker(name, program, threads, settings, variables=variables)))
        except click.ClickException as error:
            leave_out(package, error)

    if ours["blas"].startswith("OpenBLAS"):
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        start("mlx-lm", "mlx-lm", given, openblas.as_it_is(place))
        start("mlx-lm, mlx-gpt's BLAS", "mlx-lm", given)
    else:
        start("mlx-lm", "mlx-lm", given)
    start("transformers", "transformers", {"folder": given["folder"], "kind": ours["kind"]})
    return started


def check(runs: list[dict[str, Any]], workers: list[Worker]) -> None:
    """Check in float32 that all choose the same tokens. In bfloat16 rounding may decide between two tokens.

    Raises:
        click.ClickException: a program chooses other tokens than ours.
    """
    if workers[0].facts["dtype"] != "float32":
        return
    for worker, run in zip(workers, runs, strict=True):
        if run["tokens"] != runs[0]["tokens"]:
            raise click.ClickException(f"{worker.name} chooses other tokens than {OURS}, so they are not compared.")


def rows(
    answers: dict[str, list[list[dict[str, Any]]]], shape: dict[str, Any], prompt_tokens: int, new_tokens: int
) -> list[dict[str, Any]]:
    """A row for each batch size and program."""
    found = []
    later = new_tokens - 1  # the first token belongs to the prefill
    mean_length = prompt_tokens + new_tokens / 2
    for i, batch_size in enumerate(BATCHES):
        decode = {name: [batch_size * later / runs[i]["decode"] for runs in turns] for name, turns in answers.items()}
        single = {name: [later / runs[0]["decode"] for runs in turns] for name, turns in answers.items()}
        read = shape["weight_bytes"] + batch_size * mean_length * shape["cache_bytes"]
        for name, turns in answers.items():
            gigabytes = summary(decode[name])["median"] / batch_size * read / 1e9
            found.append(
                {
                    "batch": batch_size,
                    "program": name,
                    "prefill": summary([batch_size * prompt_tokens / runs[i]["prefill"] for runs in turns]),
                    "decode": summary(decode[name]),
                    "gb_per_second": gigabytes,
                    "bandwidth_share": gigabytes / shape["copy_gb_per_second"],
                    "peak_memory": turns[-1][i]["peak_memory"],
                    "resident_memory": turns[-1][-1]["resident_memory"],
                    "ours_over_this": pairwise(decode[OURS], decode[name]) if name != OURS else None,
                    "over_single": pairwise(decode[name], single[name]) if batch_size > 1 else None,
                }
            )
    return found


if __name__ == "__main__":
    main()
