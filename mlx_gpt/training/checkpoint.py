"""Checkpoints: model directories that can also be trained further.

A run that trains adapters saves only the adapters. They name the directory of the base, which has the other weights.

`step-00001000/` has the files of a model directory, `optimizer.safetensors` and `training.json`. It is written under
another name and renamed when everything is on the disk, so a folder with that name is always complete. `training.json`
is written last and has the checksum of every other file.

The weights of `best/` name their step and their validation loss, so a resume knows how good they are, even if they are
newer than any checkpoint.
"""

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path
from safetensors import SafetensorError, safe_open

from mlx_gpt.errors import UserError
from mlx_gpt.files import check_free_space, sync, write_text_whole, write_whole
from mlx_gpt.models import lora
from mlx_gpt.models.directory import save_adapters, save_model
from mlx_gpt.models.tensors import save_arrays
from mlx_gpt.tokenizer import Tokenizer

MARKER = "training.json"
SMALL_FILES = 2**16  # bytes in a checkpoint besides the arrays and the tokenizer


@dataclass(frozen=True)
class Progress:
    """How far a run has come. Together with the settings it decides the rest of the run.

    Attributes:
        step: number of optimizer updates.
        seconds: training time, over all resumes.
        loss_average: running average of the training loss.
        bad_steps: number of latest steps in a row without a finite loss.
        fingerprint: the fingerprint of the token files.
        base: the checksum of the frozen weights, which a checkpoint with adapters does not contain; "" if none are
            frozen.
    """

    step: int = 0
    seconds: float = 0.0
    loss_average: float | None = None
    bad_steps: int = 0
    fingerprint: str = ""
    base: str = ""


def save(
    run: Path, model: nn.Module, tokenizer: Tokenizer, optimizer_state: dict, progress: Progress, keep: int
) -> Path:
    """Write a checkpoint of `progress.step`, then remove all but the newest `keep` up to that step.

    Raises:
        OSError: the checkpoint could not be written, for example because the disk is full. Earlier ones are unchanged.
    """
    arrays = dict(tree_flatten(optimizer_state))
    adapted = bool(lora.adapted_layers(model))
    saved = model.trainable_parameters() if adapted else model.parameters()
    mx.eval(saved, arrays)
    folder = run / "checkpoints" / f"step-{progress.step:08d}"
    part = folder.with_name(f".{folder.name}.part")
    array_bytes = sum(array.nbytes for _, array in tree_flatten((saved, arrays)))
    check_free_space(run, array_bytes + len(tokenizer.to_json().encode()) + SMALL_FILES)
    try:
        (save_adapters if adapted else save_model)(part, model, tokenizer)
        write_whole(part / "optimizer.safetensors", lambda path: save_arrays(path, arrays))
        checksums = {file.name: _checksum(file) for file in sorted(part.iterdir())}
        write_text_whole(part / MARKER, _marker(dataclasses.asdict(progress) | {"files": checksums}))
        if folder.exists():  # it is not a checkpoint, or this step would not be made again
            set_aside(folder)
        part.rename(folder)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)  # to free the disk
        raise
    sync(folder.parent)
    with contextlib.suppress(OSError):  # the next save removes it
        remove_older(run, progress.step, keep)
    return folder


def remove_older(run: Path, step: int, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints up to `step`."""
    for old in [folder for folder in all_checkpoints(run) if step_of(folder) <= step][:-keep]:
        remove(old)


def remove_unfinished(run: Path) -> None:
    """Remove files and folders that a killed process had half written or half removed."""
    for path in (*run.glob(".*.part*"), *run.glob("*/.*.part*")):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def later_than(run: Path, step: int) -> list[Path]:
    """Return the checkpoints after `step`, oldest first."""
    return [folder for folder in all_checkpoints(run) if step_of(folder) > step]


def remove(folder: Path) -> None:
    """Remove a folder so that a crash leaves all of it or nothing that counts as a checkpoint."""
    # It is renamed first. `remove_unfinished` removes the rest later.
    doomed = folder.with_name(f".{folder.name}.removed.part")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_after(run: Path, step: int) -> None:
    """Remove the folders that a run will write again after it goes back to `step`.

    These are the later checkpoints, `final`, and `best` if it is later. The newest checkpoint is removed last, so that
    a crash in between does not set the run back.
    """
    best = best_model(run)
    for folder in (run / "final", *([run / "best"] if best and best[0] > step else []), *later_than(run, step)):
        remove(folder)


def save_best(run: Path, model: nn.Module, tokenizer: Tokenizer, step: int, loss: float) -> None:
    """Write `best/`: the model of `step`, with its validation loss in nats per token."""
    save_model(run / "best", model, tokenizer, {"step": str(step), "validation_loss": repr(loss)})


def best_model(run: Path) -> tuple[int, float] | None:
    """Return the step and the validation loss of `best/`; None if there is none, or it does not say."""
    try:
        with safe_open(run / "best/model.safetensors", framework="np") as file:
            facts = file.metadata() or {}
        return int(facts["step"]), float(facts["validation_loss"])
    except (OSError, SafetensorError, KeyError, ValueError):
        return None


def trained_weights(run: Path) -> list[Path]:
    """Return the folders of a run that hold trained weights, whether or not a run can be resumed from them."""
    candidates = [run / "best", run / "final", *sorted((run / "checkpoints").glob("*"), reverse=True)]
    found = [folder for folder in candidates if folder.name[0] != "." and (folder / "model.safetensors").exists()]
    best = best_model(run)
    # The weights of step 0 are made again from the seed.
    return [folder for folder in found if not (folder.name == "best" and best and best[0] == 0)]


def step_of(folder: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    return int(folder.name.removeprefix("step-"))


def size(folder: Path) -> int:
    """Return the bytes in the files of a checkpoint."""
    return sum(path.stat().st_size for path in folder.iterdir())


def all_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first."""
    return [folder for folder in sorted((run / "checkpoints").glob("step-*")) if _is_step(folder, MARKER)]


def newest_sound(run: Path) -> tuple[tuple[Path, Progress] | None, dict[Path, str]]:
    """Return the newest checkpoint whose files match their checksums, with its progress; None if there is none.

    The second result has the newer checkpoints, which are damaged, and for each the sentence that says why.

    Raises:
        OSError: a folder or a file is there and can't be read.
    """
    damaged: dict[Path, str] = {}
    folders = sorted((run / "checkpoints").iterdir()) if (run / "checkpoints").exists() else []
    for folder in reversed([folder for folder in folders if _is_step(folder)]):
        try:
            return (folder, read_progress(folder)), damaged
        except UserError as error:
            damaged[folder] = str(error)
    return None, damaged


def set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint so that it no longer counts as one, and return its new path."""
    names = (f"damaged-{folder.name}" + (f"-{number}" if number > 1 else "") for number in itertools.count(1))
    return folder.rename(next(path for path in map(folder.with_name, names) if not path.exists()))


def read_progress(folder: Path) -> Progress:
    """Check a checkpoint's files against their checksums and return its progress.

    Raises:
        OSError: a file is there and can't be read, although the disk is sound.
        UserError: `folder` is not a checkpoint, or it is damaged.
    """
    try:
        return _checked_progress(folder)
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        raise UserError(f"The checkpoint {folder} is damaged: the disk can't read it ({error.strerror}).") from None


def _checked_progress(folder: Path) -> Progress:
    try:
        text = (folder / MARKER).read_text(encoding="utf-8")
        record = json.loads(text)
        del record["checksum"]
        if text != _marker(record):
            raise ValueError
        checksums = record.pop("files")
        progress = Progress(**record)
    except FileNotFoundError:
        raise UserError(f"{folder} is not a checkpoint, because it has no {MARKER}.") from None
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


def _is_step(folder: Path, holding: str = "") -> bool:
    """Return whether a folder has the name of a checkpoint and holds such a file."""
    return folder.name.startswith("step-") and folder.name[5:].isdigit() and (folder / holding).exists()


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _marker(record: dict[str, Any]) -> str:
    """Return the text of the marker: the record, with its own checksum."""
    checksum = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    return json.dumps(record | {"checksum": checksum}, indent=2) + "\n"
