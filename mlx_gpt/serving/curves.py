"""The losses of a run, for the page."""

import json
import math
from pathlib import Path
from typing import Any

MOST_POINTS = 500


def of(folder: Path) -> dict[str, list[list[float]]]:
    """Steps and losses, (step, loss) each, of the run that a folder is or is part of; empty where there are none.

    At most 500 of each, evenly.
    """
    for run in (folder, folder.parent, folder.parent.parent):
        if (run / "metrics.jsonl").is_file():
            return {kind: _points(run / "metrics.jsonl", f"{kind}_loss") for kind in ("train", "val")}
    return {"train": [], "val": []}


def _points(path: Path, name: str) -> list[list[float]]:
    points = []
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            record = _record(line)
            step, loss = record.get("step"), record.get(name)
            if isinstance(step, int) and isinstance(loss, int | float) and math.isfinite(loss):
                points.append([step, float(loss)])
    every = math.ceil(len(points) / MOST_POINTS) or 1
    return points[::-every][::-1]  # the last is always there


def _record(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError:  # half a line, of a run that is being trained
        return {}
    return record if isinstance(record, dict) else {}
