"""Get datasets and models from the Hugging Face Hub, by names such as `hf:owner/name`.

A folder appears complete or not at all. An interrupted download leaves a hidden folder beside it, and the next download
continues from there. A complete folder is used without the network, even if the files on the Hub have changed.
"""

import glob
import importlib.util
import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from mlx_gpt.data.archive import MAX_BYTES
from mlx_gpt.data.downloads import complete_files, install, record_of, recover, refuse_foreign
from mlx_gpt.data.hub_client import AGAIN, HubFile, Repository, fetch, list_files
from mlx_gpt.data.hub_files import dataset_files, model_files
from mlx_gpt.errors import UserError, os_errors_explained
from mlx_gpt.files import expanded, locked, size_in_words
from mlx_gpt.packages import install as install_command
from mlx_gpt.progress import ByteProgress, Echo, ignore_line, ignore_progress

PREFIX = "hf:"
COMMIT_DIGITS = 12  # of a commit, in the name of an unfinished download
LICENCE_NOTE = "It has its own licence; please check on its page that it allows what you plan to do: {page}"


@dataclass(frozen=True)
class HubName:
    """The parts of `hf:owner/name/CONFIG@REVISION`; `config` and `revision` may be ""."""

    owner: str
    name: str
    config: str
    revision: str

    def __str__(self) -> str:
        config, revision = self.config and f"/{self.config}", self.revision and f"@{self.revision}"
        return f"{PREFIX}{self.owner}/{self.name}{config}{revision}"


def is_hub_name(text: object) -> bool:
    """Return whether a setting is a name on the Hub instead of a path."""
    return str(text).startswith(PREFIX)


def parse(text: str, kind: str) -> HubName:
    """Return the parts of `hf:owner/name/CONFIG@REVISION`.

    Args:
        kind: "dataset" or "model". A model has no CONFIG.

    Raises:
        UserError: the text is not such a name.
    """
    slug = r"[A-Za-z0-9_][A-Za-z0-9_.-]*"
    match = re.fullmatch(rf"{PREFIX}({slug})/({slug})(?:/([^@\s]+?))?(?:@([A-Za-z0-9_][\w./-]*))?", text.strip())
    if not match or (match[3] and kind == "model") or ".." in text:
        config = "/CONFIG" if kind == "dataset" else ""
        raise UserError(
            f"{text!r} is not the name of a {kind} on the Hugging Face Hub: write hf:owner/name, as in the address of "
            f"its page, or hf:owner/name{config}@REVISION."
        )
    return HubName(match[1], match[2], match[3] or "", match[4] or "")


def download(
    dataset: str,
    folder: Path,
    *,
    patterns: Sequence[str] = (),
    force: bool = False,
    echo: Echo = ignore_line,
    progress: ByteProgress = ignore_progress,
) -> list[Path]:
    """Download the training text of a dataset into `folder/hf/<owner>/<name>` and return its files, sorted.

    A dataset that is already there, complete and unchanged, is used again without the network unless `force` is set.
    After a failure or Ctrl-C the folder is as it was before, and the next call continues.

    Args:
        dataset: `hf:owner/name`, `hf:owner/name/CONFIG`, or one of them with `@REVISION`.
        folder: where the dataset's own folder goes; created if it is missing.
        patterns: the files to take instead of those of the training split.
        force: ask the Hub again even if the dataset is there.
        echo: called with each line for the person.
        progress: called with the number of bytes that have arrived.

    Raises:
        UserError: the dataset is misspelt, private or missing, or has no text or several configurations; a file is not
            what the Hub lists; or the network or the disk fails.
    """
    name = parse(dataset, "dataset")
    repository = Repository(f"{name.owner}/{name.name}", "dataset")
    leaf = name.name + (name.config and f"+{name.config}") + (name.revision and f"@{name.revision}")
    target = Path(folder) / "hf" / name.owner / leaf.replace("/", "+")
    source = " ".join([str(name), *(f"--file {pattern}" for pattern in patterns)])

    recover(target)
    files = None if force else complete_files(target, source)
    if files is not None:
        echo(f"Using {target}, which is already downloaded.")
        return files
    refuse_foreign(target)
    listing = list_files(repository, name.revision)
    chosen = dataset_files(listing, repository, name.config, patterns, echo)
    if any(file.path.endswith(".parquet") for file in chosen) and not importlib.util.find_spec("pyarrow"):
        raise UserError(f"{repository.page} is Parquet, and reading that needs pyarrow: {install_command('parquet')}.")
    if (total := sum(file.size for file in chosen)) > MAX_BYTES and not patterns:
        raise UserError(
            f"{repository.page} has {size_in_words(total)} in {len(chosen):,} files, and a Mac would need months "
            f"to train on that: choose some with --file, such as --file {chosen[0].path!r}."
        )
    _bring(repository, listing.commit, chosen, target, source, echo, progress)
    return sorted(target / file.path for file in chosen)


def model(text: str, *, echo: Echo = ignore_line, progress: ByteProgress = ignore_progress) -> tuple[Path, str]:
    """Return the folder of a model from the Hub, and its name with the commit: `hf:owner/name@<commit>`.

    Only safetensors, JSON and the chat template are fetched. A model that is already there is used without the network.

    Args:
        text: `hf:owner/name`, with `@REVISION` for a branch, a tag or a commit.
        echo: called with each line for the person.
        progress: called with the number of bytes that have arrived.

    Raises:
        UserError: the model is misspelt, gated or missing, or has no safetensors; a file is not what the Hub lists; or
            the network or the disk fails.
    """
    name = parse(text, "model")
    if found := found_model(text):
        return found
    target, repository = _place_of(name), Repository(f"{name.owner}/{name.name}", "model")
    refuse_foreign(target)
    listing = list_files(repository, name.revision)
    files = model_files(listing, repository)
    _bring(repository, listing.commit, files, target, f"{PREFIX}{repository.name}", echo, progress)
    return target, f"{PREFIX}{repository.name}@{listing.commit}"


def found_model(text: str) -> tuple[Path, str] | None:
    """Return the same as `model` if the model was fetched before, else None. This never uses the network.

    Raises:
        UserError: the name is misspelt.
    """
    name = parse(text, "model")
    target = _place_of(name)
    recover(target)
    others = sorted(target.parent.glob(f"{name.name}@*")) if target.parent.is_dir() else []
    for folder in (target, target.with_name(name.name), *others):
        record = record_of(folder)
        if record.get("source") == f"{PREFIX}{name.owner}/{name.name}":
            commit = record.get("commit")
            if folder == target or commit == name.revision:
                return folder, f"{record['source']}@{commit}"
    return None


def cache_folder() -> Path:
    """Return the folder for models from the Hub."""
    return expanded(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "mlx-gpt" / "models"


def _place_of(name: HubName) -> Path:
    """Return the folder for a model, whether or not it exists."""
    revision = name.revision and f"@{name.revision.replace('/', '+')}"
    return cache_folder() / name.owner / f"{name.name}{revision}"


def _bring(
    repository: Repository,
    commit: str,
    files: Sequence[HubFile],
    target: Path,
    source: str,
    echo: Echo,
    progress: ByteProgress,
) -> None:
    """Fetch files of a commit, and move them to `target` when all have arrived."""
    size = size_in_words(sum(file.size for file in files))
    part = target.with_name(f".{target.name}.{commit[:COMMIT_DIGITS]}.download")
    with os_errors_explained(f"write to {target.parent}"), _alone(part, echo) as waited:
        if waited and record_of(target).get("commit") == commit and complete_files(target, source):
            part.rmdir()  # another process has fetched the same files
            return
        _remove_leftovers(target, part, {file.path for file in files})
        verb = "Continuing to download" if any(part.iterdir()) else "Downloading"
        echo(f"{verb} {len(files):,} file{'s' * (len(files) > 1)} ({size}) from {repository.page}")
        echo(LICENCE_NOTE.format(page=repository.page))
        try:
            fetch(repository, commit, files, part, progress)
        except BaseException as error:
            for folder in (part, target.parent, target.parent.parent):  # removes the empty ones
                with suppress(OSError):
                    folder.rmdir()
            if isinstance(error, KeyboardInterrupt) and part.exists():
                echo(f"Stopped: {AGAIN}.")
            raise
        install(part, target, source, [file.path for file in files], {"commit": commit})


@contextmanager
def _alone(part: Path, echo: Echo) -> Iterator[bool]:
    """Make the folder of a download and hold its lock; yield whether this had to wait for another process."""
    waited = False
    with ExitStack() as lock:
        while True:
            part.mkdir(parents=True, exist_ok=True)
            try:
                lock.enter_context(locked(part, wait=waited))
                break
            except BlockingIOError:
                echo("Waiting for another process that is downloading the same files.")
                waited = True
            except FileNotFoundError:  # the other process has finished
                continue
        yield waited


def _remove_leftovers(target: Path, part: Path, wanted: set[str]) -> None:
    """Remove the leftovers of interrupted downloads of other commits, or of other files, to the same place."""
    for other in target.parent.glob(f".{glob.escape(target.name)}.{'[0-9a-f]' * COMMIT_DIGITS}.download"):
        if other != part:
            with suppress(OSError), locked(other, wait=False):
                shutil.rmtree(other)
    for path in sorted(part.rglob("*"), reverse=True):  # the files of a folder before the folder
        if path.is_dir() and not any(path.iterdir()):
            path.rmdir()
        elif not path.is_dir() and path.relative_to(part).as_posix() not in wanted:
            path.unlink()
