"""Makes folders of downloaded files appear complete or not at all.

A download is written to a temporary folder beside its place. The last step is a rename.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mlx_gpt.errors import UserError
from mlx_gpt.files import locked, sync, write_text_whole

# This file is written last, so a folder that has it is complete. A folder without it was not made here and is never
# replaced.
MARKER = ".complete.json"


def install(new: Path, target: Path, source: str, files: Iterable[str], facts: Mapping[str, Any] | None = None) -> None:
    """Mark the folder `new` as complete and move it to `target`, in the place of an older download.

    Args:
        new: a folder on the same disk as `target`.
        target: its place.
        source: the name of the download; `complete_files` compares it.
        files: the names of the files in `new`, which are relative to it.
        facts: more to note in the marker.

    Raises:
        UserError: a folder that was not made here is at `target`.
    """
    record = {
        "source": source,
        **(facts or {}),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": {name: (new / name).stat().st_size for name in files},
    }
    write_text_whole(new / MARKER, json.dumps(record, indent=2))
    _swap_in(new, target)
    sync(target.parent)


def recover(target: Path) -> None:
    """Finish replacing `target` if a process was killed while it did so."""
    if _aside(target).exists():
        with locked(target.parent):  # a process that is still replacing it finishes by itself
            _settle(target)


def record_of(target: Path) -> dict[str, Any]:
    """Return the marker of a download if it is complete and its files still have their sizes, else {}."""
    try:
        record = json.loads((target / MARKER).read_text(encoding="utf-8"))
        whole = all((target / name).stat().st_size == size for name, size in record["files"].items())
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}
    return record if whole else {}


def complete_files(target: Path, source: str) -> list[Path] | None:
    """Return the sorted files of a download if it is complete, unchanged and from this source, else None."""
    record = record_of(target)
    return sorted(target / name for name in record["files"]) if record.get("source") == source else None


def refuse_foreign(target: Path) -> None:
    """Make sure that `target` is missing or was downloaded.

    Raises:
        UserError: something else is there.
    """
    if target.exists() and not (target / MARKER).is_file():
        raise UserError(f"{target} is in the way, and this program did not download it: move it elsewhere first.")


def _swap_in(new: Path, target: Path) -> None:
    """Put the folder `new` in the place of `target`. A lock makes other processes wait."""
    with locked(target.parent):
        _settle(target)
        refuse_foreign(target)
        try:
            if target.exists():
                target.rename(_aside(target))
            new.rename(target)
        finally:
            _settle(target)


def _aside(target: Path) -> Path:
    """Return the path of the old download while the new one takes its place."""
    return target.with_name(f".{target.name}.old")


def _settle(target: Path) -> None:
    """Put the old download back if the new one did not take its place; else remove it."""
    old = _aside(target)
    if old.exists():
        shutil.rmtree(old) if target.exists() else old.rename(target)
