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
from contest import CHECKED_STEPS, Contest, Options
from harness import common_options, device_option
from shapes import ON_CPU, ON_GPU, Found, by_shape, preset_option, settings_of, size_options


@click.command()
@preset_option()
@size_options
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

    def measure_shape(shape: str) -> Found | None:
        return measure(shape, settings_of(shape, batch_size=batch_size, seq_len=seq_len), against, options)

    result |= by_shape(preset or default_shapes(options.device), measure_shape)
    report.finish(result, json_file)


def default_shapes(device: str) -> Sequence[str]:
    """The shapes for a GPU, or three that a CPU trains in minutes."""
    from mlx_gpt.device import device as found

    return ON_CPU if device == "cpu" or found().kind == "cpu" else ON_GPU


def measure(shape: str, settings: dict[str, Any], against: Sequence[str], options: Options) -> Found | None:
    """The facts of one shape and a row for each contender, ours first; None if memory is too small for it.

    Raises:
        click.ClickException: the losses differ, or a contender failed while it was timed.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        contest = Contest(settings, options, folder, stack)
        needed, usable = contest.memory()
        if 2 * needed > usable:
            size = f"{needed / 2**30:.1f} GiB"
            click.echo(f"{shape} is left out: two programs of at least {size} each don't fit into memory.", err=True)
            return None
        contest.admit(against)
        contest.check()
        click.echo(f"{shape}: {', '.join(contest.losses)} agree on the losses of {CHECKED_STEPS} steps.", err=True)
        return contest.time(shape)


if __name__ == "__main__":
    main()
