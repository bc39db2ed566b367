"""The work of the contenders: sizes by name, and windows of tokens."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import numpy as np

from mlx_gpt.errors import UserError
from mlx_gpt.settings import flat, resolve

BATCHES = 10
Found = tuple[dict[str, Any], list[dict[str, Any]]]
"""The facts of a shape, and a row for each program."""

SHAPES: dict[str, dict[str, Any]] = {
    "smoke": {"preset": "tiny", "n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 32}
    | {"tokenizer": "bytes", "vocab_size": 259, "seq_len": 16, "batch_size": 4},
    "nanogpt-cpu": {"preset": "tiny", "tokenizer": "bytes", "vocab_size": 65, "n_positions": 64}
    | {"seq_len": 64, "batch_size": 12},
    "tiny": {"preset": "tiny"},
    "tiny-b64": {"preset": "tiny", "batch_size": 64},
    "small-t256": {"preset": "small", "seq_len": 256, "batch_size": 4},
    "small": {"preset": "small", "seq_len": 1024, "batch_size": 8},
    "medium": {"preset": "medium", "seq_len": 1024, "batch_size": 8},
    "large": {"preset": "large", "seq_len": 1024, "batch_size": 4},
    "gpt2": {"preset": "medium", "vocab_size": 50257, "seq_len": 1024, "batch_size": 2},
}
ON_CPU = ("nanogpt-cpu", "tiny", "small-t256")
ON_GPU = ("small", "medium", "gpt2", "large")

OF_A_STEP = {
    *("data", "tokenizer", "vocab_size", "n_layer", "n_head", "n_embd", "n_positions", "dropout"),
    *("seq_len", "batch_size", "gradient_accumulation_steps", "grad_checkpoint", "precision", "seed"),
    *("learning_rate", "min_lr", "warmup_steps", "schedule", "beta1", "beta2", "weight_decay", "max_grad_norm"),
}


def settings_of(shape: str, **changes: Any) -> dict[str, Any]:
    """Every setting of a run with this shape by name, as `mlx-gpt train` would resolve it.

    There is no dropout, because two libraries would draw different numbers, no accumulation, and one learning rate for
    all shapes. A change to None keeps the shape's value.

    Raises:
        click.UsageError: a change is not a valid setting.
    """
    equal = {"dropout": 0.0, "gradient_accumulation_steps": 1, "learning_rate": 1e-3}
    given = {name: value for name, value in changes.items() if value is not None}
    try:
        return flat(resolve({"data": "builtin", **equal, **SHAPES[shape], **given}))
    except UserError as error:
        raise click.UsageError(str(error)) from None


def of_a_step(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a training step computes. An older checkout may not know the others."""
    return {name: value for name, value in settings.items() if name in OF_A_STEP}


def describe(settings: dict[str, Any]) -> str:
    """The sizes in one line."""
    return "{n_layer} layers, {n_head} heads, {n_embd} wide, T {seq_len}, B {batch_size}, V {vocab_size}".format(
        **settings
    )


def write_windows(path: Path, settings: dict[str, Any]) -> None:
    """Write int32 windows (BATCHES, B, T + 1) of tokens drawn by Zipf's law: the frequency of token k is 1 / (k + 1).

    Unlike uniform tokens they can be learned, so the losses of ten steps differ if the optimizers do.
    """
    entries = settings["vocab_size"]
    frequencies = 1 / np.arange(1, entries + 1)
    size = (BATCHES, settings["batch_size"], settings["seq_len"] + 1)
    draw = np.random.default_rng(0)
    np.save(path, draw.choice(entries, size, p=frequencies / frequencies.sum()).astype(np.int32))


def preset_option(*default: str) -> Callable[..., Any]:
    """`--preset`, which may be repeated. Without a default the program chooses."""
    explained = "A shape; may be repeated." + ("" if default else " [default: several for the device]")
    choices = click.Choice(list(SHAPES))
    return click.option(
        "--preset", multiple=True, default=default, show_default=bool(default), type=choices, help=explained
    )


def size_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add `--batch-size` and `--seq-len`."""
    for name, explained in (("--seq-len", "Tokens per window."), ("--batch-size", "Windows per step.")):
        command = click.option(name, type=click.IntRange(1), help=f"{explained} [default: the shape's]")(command)
    return command


def by_shape(shapes: Sequence[str], measure: Callable[[str], Found | None]) -> dict[str, Any]:
    """What `measure` finds for each shape, as a result has it. None leaves a shape out."""
    found: dict[str, Any] = {"shapes": {}, "rows": []}
    for shape in shapes:
        if measured := measure(shape):
            found["shapes"][shape], rows = measured
            found["rows"] += [{"shape": shape, **row} for row in rows]
    return found
