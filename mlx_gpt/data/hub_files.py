"""Chooses which files of a repository on the Hugging Face Hub to fetch."""

import fnmatch
import re
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Any

from mlx_gpt.data.hub_client import HubFile, Listing, Repository
from mlx_gpt.errors import UserError, shown
from mlx_gpt.progress import Echo

# The files of a model. They include no code and no pickles.
MODEL_FILES = (
    "config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json", "tokenizer.json",
    "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
NEEDED = ("config.json", "tokenizer.json", "model*.safetensors")

# Many datasets hold the same rows in several formats, so only the first of these formats is taken.
FORMATS = ((".parquet",), (".jsonl", ".ndjson"), (".csv", ".tsv"), (".json",), (".txt",))
METADATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
TRAIN = ("train", "training")
OTHER_SPLITS = ("test", "testing", "valid", "validation", "val", "dev", "eval", "evaluation")


def model_files(listing: Listing, repository: Repository) -> list[HubFile]:
    """Return the files of a model.

    Raises:
        UserError: a file that is needed is missing.
    """
    top = [
        file
        for file in listing.files
        if "/" not in file.path and any(fnmatch.fnmatchcase(file.path, name) for name in MODEL_FILES)
    ]
    for needed in NEEDED:
        if not fnmatch.filter([file.path for file in top], needed):
            raise UserError(
                f"{repository.page} has no {needed}, only {_listed(file.path for file in listing.files)}: choose a "
                "model with safetensors and a tokenizer.json, because mlx-gpt runs no code and opens no pickles."
            )
    return top


def dataset_files(
    listing: Listing, repository: Repository, config: str, patterns: Sequence[str], echo: Echo
) -> list[HubFile]:
    """Return the files with a dataset's training text.

    Args:
        config: the configuration that the user names, or "".
        patterns: the user's patterns for files; without any, the training split is taken.
        echo: called with a line that says which configuration was chosen among several.

    Raises:
        UserError: the dataset has no text that can be read, or several configurations or splits to choose from.
    """
    readable = [file for file in listing.files if _is_text(file.path)]
    paths = [file.path for file in readable]
    if not paths:
        raise UserError(
            f"{repository.page} has no Parquet, JSONL, CSV, JSON or text file, only "
            f"{_listed(file.path for file in listing.files)}: try hf:{repository.name}@refs/convert/parquet, where the "
            "Hub keeps many datasets as Parquet."
        )
    if patterns:
        chosen = []
        for pattern in patterns:
            if not (found := _matching(paths, pattern)):
                raise UserError(
                    f"--file {pattern}: {repository.page} has no such file; it has {_listed(sorted(paths))}."
                )
            chosen += found
    else:
        chosen = _of_one_format(_of_train(_of_config(paths, listing.card, repository, config, echo), repository))
    return [file for file in readable if file.path in chosen]


def _of_config(
    paths: Sequence[str], card: dict[str, Any], repository: Repository, wanted: str, echo: Echo
) -> Sequence[str]:
    """Return the files of one configuration, and only its training split if the README names the split's files."""
    declared = {str(entry["config_name"]): entry for entry in _configs(card)}
    folders = sorted({_folder(path) for path in paths})
    names = list(declared) or [name for name in folders if name]
    if wanted and wanted not in names and wanted not in folders:
        known = f"it has {_listed(names)}" if names else f"it has none, so write hf:{repository.name}"
        raise UserError(f"{repository.page} has no configuration {shown(wanted)}: {known}.")
    if not wanted:
        preferred = [name for name, entry in declared.items() if name == "default" or entry.get("default") is True]
        if not declared and "" in folders:  # some files are in no configuration's folder
            preferred = [""]
        if len(names) > 1 and not preferred:
            raise UserError(
                f"{repository.page} has several configurations, {_listed(names)}: choose one, as in "
                f"hf:{repository.name}/{names[0]}, or name files with --file, such as --file {sorted(paths)[0]!r}."
            )
        wanted = (preferred or names or [""])[0]
        if others := [name for name in names if name != wanted]:
            taken = f"configuration {wanted}" if wanted else "files at the top"
            echo(f"Taking the {taken}. Other configurations, as in hf:{repository.name}/CONFIG: {_listed(others)}.")
    if wanted not in declared:
        return [path for path in paths if _folder(path) == wanted]
    entry = declared[wanted]
    inside = str(entry.get("data_dir") or "").strip("./")
    below = [path for path in paths if PurePosixPath(path).is_relative_to(inside)]
    splits = list(_splits(entry.get("data_files")))
    if not splits:
        return below
    train = [split for split in splits if split[0] == "train"]
    if not train and len({name for name, _ in splits}) > 1:
        raise UserError(
            f"{repository.page} has no split train, but {_listed(name for name, _ in splits)}: choose its files with "
            f"--file, such as --file {splits[0][1]!r}."
        )
    found = [path for _, pattern in train or splits for path in _matching(below, _joined(inside, pattern))]
    if not found:
        raise UserError(
            f"The files of the configuration {shown(wanted)} of {repository.page} cannot be read: choose others with "
            f"--file, among {_listed(sorted(paths))}."
        )
    return found


def _of_train(paths: Sequence[str], repository: Repository) -> Sequence[str]:
    """Return the files whose names say that they are the training split, else those whose names say no split."""
    train = [path for path in paths if _words(path).intersection(TRAIN)]
    unnamed = [path for path in paths if not _words(path).intersection(OTHER_SPLITS)]
    if not (train or unnamed):
        raise UserError(
            f"{repository.page} has no file of a split train, only {_listed(sorted(paths))}: choose some with --file."
        )
    return train or unnamed


def _of_one_format(paths: Sequence[str]) -> list[str]:
    for suffixes in FORMATS:
        if found := [path for path in paths if path.lower().endswith(suffixes)]:
            return found
    return []


def _is_text(path: str) -> bool:
    """Return whether a file may hold the text of a dataset."""
    parts = PurePosixPath(path).parts
    suffixes = tuple(suffix for group in FORMATS for suffix in group)
    is_note = parts[-1].lower() in METADATA or parts[-1].lower().startswith(("readme", "license", "requirements"))
    return path.lower().endswith(suffixes) and not is_note and not any(part.startswith(".") for part in parts)


def _configs(card: dict[str, Any]) -> list[dict[str, Any]]:
    configs = card.get("configs")
    return (
        [one for one in configs if isinstance(one, dict) and "config_name" in one] if isinstance(configs, list) else []
    )


def _splits(data_files: Any) -> Iterable[tuple[str, str]]:
    """Yield the split, or else "train", and the pattern of each entry of `data_files` in a README, in any form."""
    if isinstance(data_files, dict):
        data_files = [{"split": split, "path": path} for split, path in data_files.items()]
    for entry in data_files if isinstance(data_files, list) else [data_files] if data_files else []:
        paths = entry.get("path") if isinstance(entry, dict) else entry
        split = str(entry.get("split", "train")) if isinstance(entry, dict) else "train"
        for path in paths if isinstance(paths, list) else [paths]:
            yield split, str(path)


def _folder(path: str) -> str:
    """Return the folders above a file, without those named `data` or after a split."""
    known = {*TRAIN, *OTHER_SPLITS, "data", "partial"}
    return "/".join(part for part in PurePosixPath(path).parts[:-1] if not _words(part) <= known)


def _words(path: str) -> set[str]:
    return set(re.split(r"[^a-z0-9]+", path.lower()))


def _joined(folder: str, pattern: str) -> str:
    return f"{folder}/{pattern}" if folder and not pattern.startswith(f"{folder}/") else pattern


def _matching(paths: Sequence[str], pattern: str) -> list[str]:
    """Return the paths that match a pattern, in which `*` stops at a `/` and `**` does not."""
    pieces = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    words = re.split(r"(\*\*/|\*\*|\*|\?)", pattern.removeprefix("./"))
    rule = re.compile("".join(pieces.get(word, re.escape(word)) for word in words))
    return [path for path in paths if rule.fullmatch(path)]


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(shown(name) for name in names[:10]) + (f" and {len(names) - 10} more" if names[10:] else "")
