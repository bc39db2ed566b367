"""The settings in `run.toml`: how they are written, read again after the run has moved, and changed on a resume."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlx_gpt.config import Config, TrainingConfig
from mlx_gpt.data import hub
from mlx_gpt.data.sources import BUILTIN
from mlx_gpt.errors import UserError
from mlx_gpt.settings import build, flat, read_toml, resolve, write_toml
from mlx_gpt.training.run_folder import LOG, SETTINGS, run_around

# Settings that may change on a resume. Any other would silently make it another run.
MAY_CHANGE = {
    "max_steps", "max_epochs", "max_minutes", "learning_rate", "min_lr", "warmup_steps", "muon_learning_rate",
    "schedule", "max_bad_steps", "log_every", "eval_every", "save_every", "keep_checkpoints", "report_to", "out",
    "data",  # because the text may have moved; its fingerprint says whether it is the same
}  # fmt: skip


# Settings that are a path, each with the values that are not.
PATHS = {"data": ("", BUILTIN), "tokenizer": ("bpe", "bytes"), "init_from": ("",)}


def config_of(path: Path) -> Config | None:
    """Return the settings of the run at `path`, or of the run that has the model directory at `path`."""
    run = run_around(path)
    return resolve(read_settings(run)) if run else None


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
    saved, given = read_settings(run), dict(given)
    start = given.get("init_from")
    if given.get("batch_size") == "auto":  # the batch that was chosen then stays, if a step has as many windows
        given = _chosen(saved, given)
    if given.get("dropout") == "auto":
        given = {name: value for name, value in given.items() if name != "dropout"}
    if hub.is_hub_name(start) and _means(str(start), str(saved.get("init_from"))):
        given["init_from"] = saved["init_from"]
    config = resolve(saved | given | {"out": str(run)})
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


def _means(name: str, pinned: str) -> bool:
    """Return whether a name on the Hub, perhaps with a branch or a tag, means the same as one with a commit."""
    found = hub.found_model(name)
    return pinned.startswith(f"{name}@") or (found is not None and found[1] == pinned)


def _chosen(saved: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The given settings, with the saved batch instead of "auto" where a step has as many windows as were asked for."""
    count = given.get("gradient_accumulation_steps", 0)
    same = TrainingConfig.batch_size * count == saved["batch_size"] * saved["gradient_accumulation_steps"]
    left_to_us = {"batch_size", "gradient_accumulation_steps"} if same else {"batch_size"}
    return {name: value for name, value in given.items() if name not in left_to_us}
