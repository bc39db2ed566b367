"""Checkpoints: model directories that can also be trained on.

`step-00001000/` has the files of a model directory, `optimizer.safetensors` and `training.json`. It is written under
another name and renamed when everything is on the disk, so a folder with that name is always complete. `training.json`
is written last and has the checksum of every other file.
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
    """How far a run has come. Together with the settings it decides the rest of the run.

    Attributes:
        step: number of optimizer updates.
        seconds: training time, over all resumes.
        best_loss: lowest validation loss so far.
        loss_average: running average of the training loss.
        bad_steps: number of latest steps in a row without a finite loss.
        fingerprint: the fingerprint of the token files.
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
    """Write a checkpoint of `progress.step`, then remove all but the newest `keep` up to that step.

    Raises:
        OSError: the checkpoint could not be written, for example because the disk is full. Earlier ones are unchanged.
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
        _remove(folder)  # a folder with this name that is not a checkpoint
        part.rename(folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)  # to free the disk
        raise
    sync(folder.parent)
    remove_older(run, progress.step, keep)
    return folder


def remove_older(run: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`."""
    for old in [folder for folder in all_checkpoints(run) if step_of(folder) <= step][:-keep]:
        _remove(old)


def remove_unfinished(run: Path) -> None:
    """Remove files and folders that a killed process had half written or half removed."""
    for path in (*run.glob(".*.part*"), *run.glob("*/.*.part*")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def later_than(run: Path, step: int) -> list[Path]:
    """Return the checkpoints after `step`, oldest first."""
    return [folder for folder in all_checkpoints(run) if step_of(folder) > step]


def remove_after(run: Path, step: int, best: bool) -> None:
    """Remove the folders that a run will write again after it goes back to `step`.

    These are the later checkpoints, `final`, and `best` if `best` says so. The newest checkpoint is removed last, so
    that a crash in between does not set the run back.
    """
    for folder in (run / "final", *([run / "best"] if best else []), *later_than(run, step)):
        _remove(folder)


def check_room(folder: Path, needed: int) -> None:
    """Check that the disk of `folder` has room for `needed` bytes.

    Raises:
        OSError: the disk has too little room; the error number is ENOSPC.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"it takes {needed / 1e6:,.0f} MB and the disk has {free / 1e6:,.0f} MB left")


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def all_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    folders = (folder for folder in (run / "checkpoints").glob("step-*") if folder.name[5:].isdigit())
    return sorted(folder for folder in folders if (folder / MARKER).is_file())


def newest_sound(run: Path) -> tuple[tuple[Path, Progress] | None, dict[Path, str]]:
    """Return the newest checkpoint whose files match their checksums, with its progress; None if there is none.

    The second result has the newer checkpoints, which are damaged, and for each the sentence that says why.
    """
    damaged: dict[Path, str] = {}
    for folder in reversed(all_checkpoints(run)):
        try:
            return (folder, read_progress(folder)), damaged
        except UserError as error:
            damaged[folder] = str(error)
    return None, damaged


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it no longer counts as one, and return its new path."""
    aside = folder.with_name(f"damaged-{folder.name}")
    _remove(aside)
    return folder.rename(aside)


def read_progress(folder: Path) -> Progress:
    """Check a checkpoint's files against their checksums and return its progress.

    Raises:
        UserError: `folder` is not a checkpoint, or it is damaged.
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
        raise UserError(f"{folder} is not a checkpoint, because it has no {MARKER}: name another folder.") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"The checkpoint {folder} is damaged: {MARKER} is not as it was written.") from None
    for name, checksum in checksums.items():
        if not (folder / name).is_file() or _checksum(folder / name) != checksum:
            raise UserError(f"The checkpoint {folder} is damaged: {name} is not as it was written.")
    return progress


def load_optimizer(folder: Path, fresh: dict) -> dict:
    """Return the optimizer's state from a checkpoint whose files have been checked, with the structure of `fresh`.

    Raises:
        UserError: the state belongs to a network of another shape.
    """
    arrays = mx.load(str(folder / "optimizer.safetensors"))
    if {name: array.shape for name, array in arrays.items()} != {name: a.shape for name, a in tree_flatten(fresh)}:
        raise UserError(f"The optimizer's state in {folder} does not fit the model: check the settings of its shape.")
    mx.eval(arrays)
    return tree_map_with_path(lambda name, _: arrays[name], fresh)


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _marker(record: dict[str, Any]) -> str:
    """Return the text of the marker: the record, with its own checksum."""
    checksum = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return json.dumps(record | {"checksum": checksum}, indent=2) + "\n"


def _remove(folder: Path) -> None:
    # The folder is renamed first, so that a crash leaves no half checkpoint. `remove_unfinished` removes the rest
    # later.
    doomed = folder.with_name(f".{folder.name}.removed.part")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)
