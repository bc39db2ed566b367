"""Measures how fast mlx-gpt trains, compared with the same network in plain PyTorch.

    python benchmarks/throughput.py

Ours is the step of `mlx-gpt train` itself. Every contender is a process of its own. All start with the same weights and
read the same tokens, and they are compared only if ten steps give them the same losses. Then they are timed in turns.
TFLOP/s are tokens per second times the model's FLOPs per token. MFU divides them by the fastest large product in the
same dtype that any contender's library reached in the same run.
"""

import installed  # noqa: F401  # isort: skip

import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click

import facts
import report
from contest import CHECKED_STEPS, Contest, Found, Options
from harness import common_options, device_option
from shapes import ON_CPU, ON_GPU, SHAPES, settings_of


@click.command()
@click.option(
    "--preset", multiple=True, type=click.Choice(list(SHAPES)), help="A shape. [default: several for the device]"
)
@click.option("--batch-size", type=click.IntRange(1), help="Windows per step. [default: the shape's]")
@click.option("--seq-len", type=click.IntRange(1), help="Tokens per window. [default: the shape's]")
@click.option(
    "--precision",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "float32", "bfloat16"]),
    help="Dtype, as in mlx-gpt train.",
)
@device_option
@click.option(
    "--against",
    multiple=True,
    help="torch-eager, torch-compile, mlx-nn, or the folder of another checkout of mlx-gpt. May be repeated. "
    "[default: torch-eager on a CPU, torch-compile on a GPU]",
)
@click.option("--steps", type=click.IntRange(1), help="Steps per trial. [default: 3 seconds' worth]")
@common_options
@click.option("--smoke", is_flag=True, help="Try everything with a tiny shape that measures nothing.")
def main(
    preset: Sequence[str],
    batch_size: int | None,
    seq_len: int | None,
    against: Sequence[str],
    json_file: str | None,
    **given: Any,
) -> None:
    """Time mlx-gpt's training step and PyTorch's."""
    options = Options(**given)
    if options.smoke:
        preset, options = ["smoke"], dataclasses.replace(options, steps=options.steps or 2, trials=2)
    result = facts.begin("throughput", threads=options.threads, trials=options.trials)
    result |= {"shapes": {}, "rows": []}
    for shape in preset or default_shapes(options.device):
        settings = settings_of(shape, batch_size=batch_size, seq_len=seq_len)
        if measured := measure(shape, settings, against, options):
            result["shapes"][shape], rows = measured
            result["rows"] += [{"shape": shape, **row} for row in rows]
    report.finish(result, json_file)


def default_shapes(device: str) -> Sequence[str]:
    """The shapes for a GPU, or three that a CPU trains in minutes."""
    from mlx_gpt import backend

    return ON_CPU if device == "cpu" or backend.device().kind == "cpu" else ON_GPU


def measure(shape: str, settings: dict[str, Any], against: Sequence[str], options: Options) -> Found | None:
    """The facts of one shape and a row for each contender, ours first; None if memory is too small for it.

    Raises:
        click.ClickException: the losses differ, or a contender failed while it was timed.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contest = Contest(settings, options, folder, stack)
        memory = contest.ours.ask("expected_memory")
        if 2 * memory["needed"] > memory["usable"]:
            gib = memory["needed"] / 2**30
            click.echo(
                f"{shape} is left out: two programs of about {gib:.1f} GiB each don't fit into memory.", err=True
            )
            return None
        contest.admit(against)
        contest.check()
        click.echo(f"{shape}: {', '.join(contest.losses)} agree on the losses of {CHECKED_STEPS} steps.", err=True)
        return contest.time(shape)


if __name__ == "__main__":
    main()
