"""The folder of a run: how it is claimed, checked and found again."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_gpt.data import hub
from mlx_gpt.errors import UserError, typed
from mlx_gpt.files import free_space, remove, size_in_words
from mlx_gpt.models import adapters
from mlx_gpt.settings import resolve
from mlx_gpt.training import checkpoint
from mlx_gpt.training.lock import Lock

SETTINGS = "run.toml"
LOG = "training.log"
# In the order in which they are removed: while run.toml is there, the folder is a run.
CONTENTS = (
    "final", "best", "checkpoints", "metrics.jsonl", LOG, "curves.png", "tensorboard", "wandb",
    SETTINGS,
)  # fmt: skip
BASE = "base"  # the name of the folder with the base of a run's adapters
FROM_ADAPTERS = f"../../{BASE}"  # the path to it from best/adapters, final/adapters and the folder of a checkpoint


def claim(folder: Path, overwrite: bool) -> Lock:
    """Lock `folder` for a new run.

    Raises:
        UserError: another process trains into it, or it holds another run and `overwrite` is not set, or it holds
            something that is not a run, or a link in it leads nowhere.
    """
    refuse_dead_links(folder)
    is_run = (folder / SETTINGS).exists()
    if folder.is_file() or (folder.is_dir() and not is_run and any(path.name[0] != "." for path in folder.iterdir())):
        raise UserError(f"{folder} exists and is not a run: choose another --out.")
    lock = Lock(folder)
    if (folder / SETTINGS).exists() and not overwrite:
        lock.release()
        raise UserError(
            f"{folder} already holds a run: continue it (--resume), replace it (--overwrite) or choose another --out."
        )
    return lock


def check_room_for_run(folder: Path, model: int, saved: int, checkpoints: int) -> None:
    """Make sure that the disk of `folder` has room for the checkpoints, the best and the final model.

    Models that are already in the folder will be replaced, or count among these.

    Args:
        model: bytes of a model directory.
        saved: bytes of a checkpoint.
        checkpoints: the highest number of checkpoints at a time: the ones that are kept, and one being written.

    Raises:
        UserError: the disk has too little room.
    """
    there = [path for name in ("final/*", "best/*", "checkpoints/step-*/*") for path in folder.glob(name)]
    free = free_space(folder)
    room = free + sum(path.stat().st_size for path in there if path.is_file())
    if room < (needed := checkpoints * saved + 2 * model):
        fewer = ""
        if checkpoints > 2:
            fewer = f", keep fewer checkpoints (--keep-checkpoints 1: {size_in_words(2 * saved + 2 * model)})"
        count = "a checkpoint" if checkpoints == 1 else f"up to {checkpoints} checkpoints at a time"
        held = f", and the run's old files take {size_in_words(room - free)}" if room > free else ""
        raise UserError(
            f"The run takes {size_in_words(needed)} ({count}, the best model and the final model), and the disk of "
            f"{folder} has {size_in_words(free)} left{held}: make room{fewer} or choose another --out."
        )


def check_kept(path: Path, folder: Path) -> None:
    """Make sure that emptying `folder` of an old run would not delete `path`, which the new run begins from.

    Raises:
        UserError: it would.
    """
    if path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path} would be deleted before the new run has saved anything: choose another --out.")


def clear(folder: Path, keep_base: bool) -> None:
    """Make `folder` and empty it of an old run, except that it may keep the base of its adapters."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*(() if keep_base else (BASE,)), *CONTENTS):
        remove(folder / name)


def keep_base(run: Path, base: Path) -> str:
    """Keep the base of a run's adapters in the run, and return the directory that the adapters should name.

    The files are hard links. They take no space, and stay when the run that made them replaces its own. If links are
    impossible, for example to another disk, the adapters name the original directory.
    """
    kept, part = run / BASE, run / f".{BASE}.part"
    if base == kept.resolve():
        return FROM_ADAPTERS
    try:
        part.mkdir()
        for file in sorted(base.iterdir()):
            if file.match("model*.safetensors") or (
                file.suffix in (".json", ".jinja") and file.name != checkpoint.MARKER
            ):
                os.link(file.resolve(), part / file.name)
        remove(kept)
        part.rename(kept)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)
        return str(base)
    return FROM_ADAPTERS


def refuse_dead_links(run: Path) -> None:
    """Make sure that no link on the way to a run or in it leads nowhere, because the run's weights may be behind it.

    Raises:
        UserError: one does, as while its disk is not mounted.
    """
    for path in (*reversed(run.parents), run, *(run / name for name in CONTENTS), *sorted(run.glob("checkpoints/*"))):
        if path.is_symlink() and not path.exists():
            raise UserError(
                f"{path} is a link to {path.readlink()}, where there is nothing: mount its disk or correct the link."
            )


def run_to_resume(resume: str, given: Mapping[str, Any]) -> tuple[Path, Path | None]:
    """Return the folder of the run to resume, and the checkpoint if one was named.

    Args:
        resume: a checkpoint or run folder; or "newest", for the run that the given settings name, else the newest under
            weights/.

    Raises:
        UserError: there is no such run; the sentence says what to do with the weights that are there instead.
    """
    chosen = None
    if resume != "newest":
        run = Path(resume)
        if (run / checkpoint.MARKER).is_file():
            run, chosen = _run_of(run), run
    elif {"out", "data", "preset"} & given.keys():
        run = Path(resolve(given).out)
    else:
        run = newest_run(Path("weights"))
    refuse_dead_links(run)
    if not (run / SETTINGS).is_file():
        raise UserError(_not_a_run(chosen or run))
    return run, chosen


def _not_a_run(path: Path) -> str:
    """Say what a folder is that can't be resumed, and what can be done with it."""
    if path.exists() and (run := run_around(path)):
        again = typed("train", "--resume", run)
        return f"{path} is only a part of the run {run}, and not a whole checkpoint: resume the run with `{again}`."
    with contextlib.suppress(UserError):
        start = typed("train", "--from", model_directory(path))
        return (
            f"{path} has no {SETTINGS}, so it can't be resumed: start another run from its weights with `{start}`, "
            "and give it the --data and the settings that it had."
        )
    if path.parent.name == "checkpoints" and (found := checkpoint.all_checkpoints(path.parent.parent)):
        names = ", ".join(each.name for each in found)
        return f"{path.parent.parent} has no checkpoint {path.name}: name one that it has ({names})."
    return f"There is no run in {path}: check the path, or leave --resume out to start a run."


def run_around(path: Path) -> Path | None:
    """Return the run that `path` is or lies in, by the path that the user gave if that contains the run."""
    for folder in (path, path.resolve()):
        for run in (folder, folder.parent, folder.parent.parent):
            if (run / SETTINGS).is_file():
                return run
    return None


def _run_of(saved: Path) -> Path:
    """Return the run of a checkpoint, by the path that the user gave if that contains the run."""
    return saved.parent.parent if saved.parent.name == "checkpoints" else saved.resolve().parent.parent


def newest_run(weights: Path, with_model: bool = False) -> Path:
    """Return the run under `weights` that was trained last; with `with_model`, the last one that has a model already.

    Raises:
        UserError: there is none.
    """
    runs = [path.parent for path in weights.glob(f"*/{SETTINGS}")]
    if with_model:
        runs = [run for run in runs if any((run / name / "config.json").is_file() for name in ("best", "final"))]
    if not runs:
        raise UserError(f"There is no run in {weights}/ yet: train one with `mlx-gpt train`, or name one.")

    def worked_on(run: Path) -> float:
        log = run / LOG
        return (log if log.exists() else run / SETTINGS).stat().st_mtime

    return max(runs, key=worked_on)


def fingerprint_of(path: Path) -> str | None:
    """Return the fingerprint of the tokens that the run at `path` was trained on; None before its first checkpoint."""
    for saved in checkpoint.all_checkpoints(run_around(path) or path):
        with contextlib.suppress(UserError):
            return checkpoint.read_progress(saved).fingerprint
    return None


def model_directory(path: Path) -> Path:
    """Return the model directory that `path` means: `path` itself, or a run's best, final or newest checkpoint.

    A path such as `hf:owner/name` means a model of the Hugging Face Hub that was fetched before.

    Raises:
        UserError: there is no such folder, no model in it, or the model was not fetched.
    """
    if hub.is_hub_name(path):
        if found := hub.found_model(str(path)):
            return found[0]
        again = typed("generate", "--model", path)
        raise UserError(f"{path} is not on this machine: fetch it from the Hugging Face Hub with `{again}`.")
    refuse_dead_links(path)
    if not path.exists():
        raise UserError(f"There is no {path}: name a run or a model directory.")
    candidates: Iterable[Path] = (path, path / "best", path / "final", *reversed(checkpoint.all_checkpoints(path)))
    for candidate in candidates:
        if (candidate / "config.json").is_file() or adapters.are_in(candidate):
            return candidate
    if (path / SETTINGS).is_file():
        raise UserError(f"{path} has no weights yet: its first evaluation or checkpoint writes them.")
    raise UserError(f"{path} is not a run or a model directory: it has neither config.json nor best/config.json.")
