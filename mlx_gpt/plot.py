"""Plots of runs, drawn from their metrics.jsonl."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlx_gpt.errors import UserError
from mlx_gpt.packages import install
from mlx_gpt.training.metrics import read_records

PANELS = (
    ("train_loss", "loss (nats per token)"),
    ("learning_rate", "learning rate"),
    ("grad_norm", "gradient norm"),
    ("tokens_per_second", "tokens per second"),
)
COLOURS = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
)  # Okabe and Ito's: most people can tell them apart

Record = dict[str, Any]


def read_metrics(run: Path) -> list[Record]:
    """Return the records of a run, in order.

    Raises:
        UserError: there is no metrics.jsonl, or it has no losses yet.
    """
    path = run / "metrics.jsonl"
    try:
        records = read_records(run)
    except OSError:
        raise UserError(f"There is no {path}: name the folder of a run.") from None
    if not any("train_loss" in record or "val_loss" in record for record in records):
        raise UserError(f"{path} has no losses yet: let the run log a few steps.")
    return records


def draw(runs: Sequence[Path], target: Path) -> None:
    """Draw loss, learning rate, gradient norm and speed to a PNG, for one run or for several on one picture.

    Args:
        runs: the folders of the runs.
        target: the PNG; its folder is created if it is missing.

    Raises:
        UserError: a run has no metrics, or matplotlib is not installed.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")  # it needs no window
        from matplotlib import pyplot
    except ImportError:
        raise UserError(f"Plotting needs matplotlib: {install('plot')}.") from None

    metrics = [read_metrics(run) for run in runs]
    with pyplot.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True,
                            "grid.alpha": 0.25}):  # fmt: skip
        figure, axes = pyplot.subplots(
            len(PANELS), 1, sharex=True, figsize=(9, 9), height_ratios=(3, 1, 1, 1), layout="constrained"
        )
        for run, records, colour in zip(runs, metrics, COLOURS * len(runs), strict=False):
            name = run.resolve().name
            _draw_loss(axes[0], records, colour, name, details=len(runs) == 1)
            for axis, (field, _) in zip(axes[1:], PANELS[1:], strict=True):
                steps, values = _series(records, field)
                axis.plot(steps, values, _mark(steps), color=colour, linewidth=1)
        for axis, (_, title) in zip(axes, PANELS, strict=True):
            axis.set_ylabel(title)
        for axis in axes[1:]:
            axis.set_ylim(bottom=0)
        axes[-1].set_xlabel("step")
        axes[0].legend(frameon=False, loc="upper right")
        axes[0].set_title(", ".join(run.resolve().name for run in runs), loc="left")
        target.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(target, dpi=110)
        pyplot.close(figure)


def _draw_loss(axis: Any, records: list[Record], colour: str, name: str, details: bool) -> None:
    """Draw the losses of a run. With `details`, as for a run that is alone on the picture, its events are named."""
    steps, losses = _series(records, "train_loss")
    label = "train" if details else f"{name}: train"
    axis.plot(steps, losses, _mark(steps), markersize=3, color=colour, linewidth=1, alpha=0.5, label=label)
    steps, losses = _series(records, "val_loss")
    axis.plot(
        steps, losses, color=colour, linewidth=1.8, marker="o", markersize=3,
        label=f"{name}: validation" if not details else "validation",
    )  # fmt: skip
    if losses:
        best = min(range(len(losses)), key=losses.__getitem__)
        axis.plot(
            steps[best], losses[best], marker="*", markersize=13, color=colour, linestyle="none",
            label=f"{'' if details else name + ': '}best, {losses[best]:.3f} at step {steps[best]:,}",
        )  # fmt: skip
    for i, step in enumerate(_resumes(records)):
        axis.axvline(step, color="0.5", linestyle=":", linewidth=1, label="resumed" if details and i == 0 else None)
    for event, marker, label in (("skipped", "x", "skipped step"), ("spike", "v", "loss spike")):
        at = [record["step"] for record in records if record.get("event") == event]
        if at:
            # On the upper edge, because a skipped step has no loss.
            axis.plot(
                at, [1] * len(at), marker, color="#d00000", transform=axis.get_xaxis_transform(), clip_on=False,
                label=label if details else None,
            )  # fmt: skip


def _mark(steps: list[int]) -> str:
    """Return the format of a line. A line of few points also gets dots, or it would hardly be seen."""
    return "-" if len(steps) > 5 else "o-"


def _series(records: list[Record], field: str) -> tuple[list[int], list[float]]:
    """Return the steps and the values of a field."""
    curve = [record for record in records if "event" not in record]  # the loss of a spike is not part of the curve
    points = [(record["step"], record[field]) for record in curve if record.get(field) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _resumes(records: list[Record]) -> list[int]:
    """Return the last step before each resume."""
    pairs = itertools.pairwise(records)
    return [before["step"] for before, after in pairs if before.get("started") != after.get("started")]
