"""The folder of a run: how it is claimed, checked and found again."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlx_gpt.config import Config, TrainingConfig
from mlx_gpt.data import hub
from mlx_gpt.data.sources import BUILTIN
from mlx_gpt.errors import UserError, typed
from mlx_gpt.files import free_space, locked, remove, size_in_words
from mlx_gpt.models import adapters
from mlx_gpt.settings import build, flat, read_toml, resolve, write_toml
from mlx_gpt.training import checkpoint

SETTINGS = "run.toml"
LOG = "training.log"
LOCK = ".lock"
# In the order in which they are removed: while run.toml is there, the folder is a run.
CONTENTS = (
    "final", "best", "checkpoints", "metrics.jsonl", LOG, "curves.png", "tensorboard", "wandb",
    SETTINGS,
)  # fmt: skip
BASE = "base"  # the name of the folder with the base of a run's adapters
FROM_ADAPTERS = f"../../{BASE}"  # the path to it from best/adapters, final/adapters and the folder of a checkpoint
# Settings that may change on a resume. Any other would silently make it another run.
MAY_CHANGE = {
    "max_steps", "max_epochs", "max_minutes", "learning_rate", "min_lr", "warmup_steps", "muon_learning_rate",
    "schedule", "max_bad_steps", "log_every", "eval_every", "save_every", "keep_checkpoints", "report_to", "out",
    "data",  # because the text may have moved; its fingerprint says whether it is the same
}  # fmt: skip
# Settings that are a path, each with the values that are not.
PATHS = {"data": ("", BUILTIN), "tokenizer": ("bpe", "bytes"), "init_from": ("",)}


def claim(folder: Path, overwrite: bool) -> "Lock":
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


class Lock:
    """Keeps a second process out of a run. The system releases it when the process ends, however it ends.

    Some network file systems have no locks. There it keeps nobody out.

    Raises:
        UserError: another process holds it; the sentence names it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._held = contextlib.ExitStack()
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            try:
                self._held.enter_context(locked(self._path, wait=False))
                break
            except FileNotFoundError:
                continue  # the process that had locked it has removed it
            except BlockingIOError:
                holder = self._path.read_text(encoding="utf-8").strip() or "unknown"
                raise UserError(
                    f"Process {holder} is training into {folder}: wait for it, stop it, or choose another --out."
                ) from None
        self._path.write_text(f"{os.getpid()}\n", encoding="utf-8")

    def release(self) -> None:
        """Let others in. Folders that were made for the lock alone are removed."""
        if self._made and [path.name for path in self._path.parent.iterdir()] == [LOCK]:
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                for folder in self._made:
                    folder.rmdir()
        self._held.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


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
    if path.exists() and (run := _run_around(path)):
        again = typed("train", "--resume", run)
        return f"{path} is only a part of the run {run}, and not a whole checkpoint: resume the run with `{again}`."
    with contextlib.suppress(UserError):
        start = typed("train", "--from", model_directory(path))
        return (
            f"{path} has no {SETTINGS}, so it can't be resumed: start another run from its weights with `{start}`, "
            "and give it the --data and the settings that it had."
        )
    return f"There is no run in {path}: leave --resume out to start one."


def _run_around(path: Path) -> Path | None:
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


def config_of(path: Path) -> Config | None:
    """Return the settings of the run at `path`, or of the run that has the model directory at `path`."""
    run = _run_around(path)
    return resolve(read_settings(run)) if run else None


def fingerprint_of(path: Path) -> str | None:
    """Return the fingerprint of the tokens that the run at `path` was trained on; None before its first checkpoint."""
    for saved in checkpoint.all_checkpoints(_run_around(path) or path):
        with contextlib.suppress(UserError):
            return checkpoint.read_progress(saved).fingerprint
    return None


def write_settings(config: Config) -> None:
    """Write `run.toml` with absolute paths. `read_settings` finds them again after the run has moved."""
    run, values = Path(config.out), flat(config)
    for name in ("out", *PATHS):
        if _is_path(name, values.get(name)):
            values[name] = str(_absolute(values[name]))
    was = Path(read_toml(run / SETTINGS).get("out", "")) if (run / SETTINGS).exists() else run
    if was.is_absolute() and was.exists() and was.samefile(run):
        values["out"] = str(was)  # a link that names the run now does not move with it
    write_toml(build(Config, values), run / SETTINGS)


def read_settings(run: Path) -> dict[str, Any]:
    """Return the settings in a run's `run.toml`, with its paths as they are now, seen from the current folder.

    Raises:
        UserError: the file cannot be read.
    """
    saved = read_toml(run / SETTINGS)
    for name in PATHS:
        if _is_path(name, saved.get(name)):
            path, here = _found(Path(saved[name]), Path(saved.get("out", "")), run), Path.cwd()
            saved[name] = str(path.relative_to(here) if path.exists() and path.is_relative_to(here) else path)
    return saved


def read_config(file: str | Path) -> dict[str, Any]:
    """Return the settings in a TOML file. If a run wrote it, paths are as in `read_settings`, and `out` is that run.

    Raises:
        UserError: the file cannot be read.
    """
    run, saved = Path(file).parent, read_toml(file)
    of_run = Path(file).name == SETTINGS and Path(str(saved.get("out", ""))).is_absolute() and (run / LOG).exists()
    return read_settings(run) | {"out": str(run)} if of_run else saved


def _found(path: Path, out: Path, run: Path) -> Path:
    """Return where a path of a run is now: with the run, if both have moved together, else where it was.

    Args:
        path: the path as `run.toml` has it.
        out: the run as `run.toml` has it.
        run: the run as it is now.
    """
    moved = out.is_absolute() and not (out.exists() and out.samefile(run))
    # The run may be named by a link, or be behind a link that has moved with the project.
    for folder in (run.resolve(), _absolute(run)) if moved else ():
        if (beside := _absolute(folder / os.path.relpath(path, out))).exists():
            return beside
    return path


def _absolute(path: str | Path) -> Path:
    return Path(os.path.normpath(Path(path).absolute()))


def _is_path(name: str, value: Any) -> bool:
    return isinstance(value, str) and value not in PATHS.get(name, ()) and not hub.is_hub_name(value)


def resumed_config(run: Path, given: Mapping[str, Any]) -> Config:
    """Return the settings of a run, with the given ones changed if they may change.

    Raises:
        UserError: a given setting would make it another run; the message names all of them. Or its text has moved.
    """
    saved = read_settings(run)
    if given.get("batch_size") == "auto":  # the batch that was chosen then stays, if a step has as many windows
        given = _chosen(saved, given)
    if given.get("dropout") == "auto":
        given = {name: value for name, value in given.items() if name != "dropout"}
    config = resolve(saved | dict(given) | {"out": str(run)})
    resolved = flat(config)

    def whole(name: str, value: Any) -> Any:
        return _absolute(value) if name in PATHS and _is_path(name, value) else value

    was = {name: whole(name, value) for name, value in saved.items()}
    changed = [name for name in given if name not in MAY_CHANGE and whole(name, resolved.get(name)) != was.get(name)]
    if changed:
        raise UserError(
            "\n".join(
                f"`{name}` was {saved.get(name)!r} when {run} began and can't become {given[name]!r}: "
                "start another run with another --out."
                for name in changed
            )
        )
    data = config.data.data
    if "data" not in given and _is_path("data", data) and not Path(data).exists():
        raise UserError(f"The text of {run} is no longer in {data}: name its new place with --data.")
    return config


def _chosen(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings, with the saved batch instead of "auto" where a step has as many windows as were asked for."""
    count = given.get("gradient_accumulation_steps", 0)
    same = TrainingConfig.batch_size * count == saved["batch_size"] * saved["gradient_accumulation_steps"]
    left_to_us = {"batch_size", "gradient_accumulation_steps"} if same else {"batch_size"}
    return {name: value for name, value in given.items() if name not in left_to_us}


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
