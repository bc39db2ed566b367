"""The loss curves of a run, for the page."""

import json
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel

MAX_POINTS = 500
Point = list[int | float]  # a step and its loss; not a tuple, whose OpenAPI schema FastAPI writes wrongly


class Curves(BaseModel):
    """Losses, as pairs of a step and its loss."""

    train: list[Point] = []
    val: list[Point] = []


def load_curves(folder: Path) -> Curves:
    """Return the curves of the run that `folder` is or belongs to, at most 500 points each; empty without a run."""
    for run in (folder, folder.parent, folder.parent.parent):
        if (run / "metrics.jsonl").is_file():
            path = run / "metrics.jsonl"
            return Curves(train=_points(path, "train_loss"), val=_points(path, "val_loss"))
    return Curves()


def _points(path: Path, name: str) -> list[Point]:
    points: list[Point] = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            record = _record(line)
            step, loss = record.get("step"), record.get(name)
            if isinstance(step, int) and isinstance(loss, int | float) and math.isfinite(loss):
                points.append([step, float(loss)])
    every = math.ceil(len(points) / MAX_POINTS) or 1
    return points[::-every][::-1]  # counted from the end, so that the last point stays


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:  # the last line of a run in training may be incomplete
        return {}
    return record if isinstance(record, dict) else {}
