"""Checkpoints: a model directory that can also be trained on.

`step-00001000/` holds a model directory, `optimizer.safetensors` and `training.json`. It is filled under another name
and renamed when everything is on the disk, so a folder of that name is always whole; `training.json` is written last
and has the checksum of every other file.
"""

import dataclasses
import errno
import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_gpt.errors import UserError
from mlx_gpt.files import sync, write_text_whole, write_whole
from mlx_gpt.models.directory import save_arrays, save_model
from mlx_gpt.tokenizer import Tokenizer

MARKER = "training.json"


@dataclass(frozen=True)
class Progress:
    """How far a run has come: with its settings, all that steers the rest of it.

    Attributes:
        step: updates made.
        seconds: time used, across resumes.
        best_loss: lowest validation loss so far.
        loss_average: running average of the training loss.
        bad_steps: how many of the last steps in a row had no finite loss.
        fingerprint: of the token files that it trains on.
    """

    step: int = 0
    seconds: float = 0.0
    best_loss: float | None = None
    loss_average: float | None = None
    bad_steps: int = 0
    fingerprint: str = ""


def save(
    run: Path, model: nn.Module, tokenizer: Tokenizer, optimizer_state: dict, progress: Progress, keep: int
) -> Path:
    """Write a checkpoint of `progress.step` and then remove all but the newest `keep` up to it.

    Raises:
        OSError: it could not be written, for example since the disk is full; the ones before are as they were.
    """
    arrays = dict(tree_flatten(optimizer_state))
    mx.eval(model.parameters(), arrays)
    folder = run / "checkpoints" / f"step-{progress.step:08d}"
    part = folder.with_name(f".{folder.name}.part")
    check_room(run, sum(array.nbytes for _, array in tree_flatten((model.parameters(), arrays))))
    try:
        save_model(part, model, tokenizer)
        write_whole(part / "optimizer.safetensors", lambda path: save_arrays(path, arrays))
        checksums = {file.name: _checksum(file) for file in sorted(part.iterdir())}
        write_text_whole(part / MARKER, _marker(dataclasses.asdict(progress) | {"files": checksums}))
        _remove(folder)  # a folder in the way that is no checkpoint
        part.rename(folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)  # a full disk needs the room
        raise
    sync(folder.parent)
    remove_older(run, progress.step, keep)
    return folder


def remove_older(run: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`."""
    for old in [folder for folder in all_checkpoints(run) if step_of(folder) <= step][:-keep]:
        _remove(old)


def remove_unfinished(run: Path) -> None:
    """Remove what a process that was killed had half written or half removed."""
    for path in (*run.glob(".*.part*"), *run.glob("*/.*.part*")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def later_than(run: Path, step: int) -> list[Path]:
    """The checkpoints after `step`, oldest first."""
    return [folder for folder in all_checkpoints(run) if step_of(folder) > step]


def remove_after(run: Path, step: int, best: bool) -> None:
    """Remove what a run that goes back to `step` will make anew: later checkpoints, `final`, and `best` if it is later.

    The newest checkpoint goes last, so that after a crash in between the run is as far as it was.
    """
    for folder in (run / "final", *([run / "best"] if best else []), *later_than(run, step)):
        _remove(folder)


def check_room(folder: Path, needed: int) -> None:
    """Make sure that `needed` bytes fit on the disk of `folder`.

    Raises:
        OSError: they don't; ENOSPC.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it takes {needed / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB left")


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    return int(folder.name.removeprefix("step-"))


def all_checkpoints(run: Path) -> list[Path]:
    """The checkpoint folders of a run, oldest first."""
    folders = (folder for folder in (run / "checkpoints").glob("step-*") if folder.name[5:].isdigit())
    return sorted(folder for folder in folders if (folder / MARKER).is_file())


def newest_sound(run: Path) -> tuple[tuple[Path, Progress] | None, dict[Path, str]]:
    """The newest checkpoint whose files have their checksums, with how far it is; and why newer ones are not sound."""
    damaged: dict[Path, str] = {}
    for folder in reversed(all_checkpoints(run)):
        try:
            return (folder, read_progress(folder)), damaged
        except UserError as error:
            damaged[folder] = str(error)
    return None, damaged


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint, so that it is none any more; its new place."""
    aside = folder.with_name(f"damaged-{folder.name}")
    _remove(aside)
    return folder.rename(aside)


def read_progress(folder: Path) -> Progress:
    """Check a checkpoint's files against their checksums and return how far it is.

    Raises:
        UserError: it is no checkpoint, or damaged.
    """
    try:
        text = (folder / MARKER).read_text(encoding="utf-8")
        record = json.loads(text)
        del record["checksum"]
        if text != _marker(record):
            raise ValueError
        checksums = record.pop("files")
        progress = Progress(**record)
    except OSError:
        raise UserError(f"{folder} is no checkpoint: it has no {MARKER}.") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"The checkpoint {folder} is damaged: {MARKER} is not as it was written.") from None
    for name, checksum in checksums.items():
        if not (folder / name).is_file() or _checksum(folder / name) != checksum:
            raise UserError(f"The checkpoint {folder} is damaged: {name} is not as it was written.")
    return progress


def load_optimizer(folder: Path, fresh: dict) -> dict:
    """AdamW's state from a checkpoint whose files have been checked, with the structure of `fresh`.

    Raises:
        UserError: it belongs to a network of another shape.
    """
    arrays = mx.load(str(folder / "optimizer.safetensors"))
    if {name: array.shape for name, array in arrays.items()} != {name: a.shape for name, a in tree_flatten(fresh)}:
        raise UserError(f"{folder}: the optimizer's state belongs to another network than the settings describe.")
    mx.eval(arrays)
    return tree_map_with_path(lambda name, _: arrays[name], fresh)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _marker(record: dict[str, Any]) -> str:
    """The text of the marker: the record and its own checksum."""
    checksum = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return json.dumps(record | {"checksum": checksum}, indent=2) + "\n"


def _remove(folder: Path) -> None:
    # Under a name that no reader takes: what a crash leaves is found by `remove_unfinished`.
    doomed = folder.with_name(f".{folder.name}.removed.part")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
