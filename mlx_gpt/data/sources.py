"""Sources of a corpus: files, folders and the text that comes with Python."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

from mlx_gpt.data.documents import documents_in, read_rows
from mlx_gpt.data.hub import is_hub_name
from mlx_gpt.data.kinds import KINDS, kind_of
from mlx_gpt.data.rows import Dropped
from mlx_gpt.data.schemas import Row
from mlx_gpt.data.sniffing import format_of, refusal
from mlx_gpt.errors import UserError, os_errors_explained, typed
from mlx_gpt.progress import ByteProgress, ignore_progress

BUILTIN = "builtin"  # used in place of a path: the language reference that comes with Python
FORMAT_VERSION = 4  # raise this number when a change of the code gives other rows for the same sources
REPORT = "report.json"
PREPARED_FILES = (REPORT, "val.jsonl", "train.jsonl")  # what `prepare` writes to a folder

Source = Path | str  # a file, or BUILTIN


def builtin_documents() -> Iterator[str]:
    """Yield the topics of Python's language reference, which every CPython includes, sorted by name."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def is_model(path: Path) -> bool:
    """Return whether a folder is a run or a model directory, which people may name instead of a text."""
    is_run = all((path / name).is_file() for name in ("run.toml", "training.log"))
    return is_run or ((path / "config.json").is_file() and any(path.glob("*.safetensors")))


def find_files(paths: Iterable[Path | str]) -> tuple[list[Path], list[Path]]:
    """Return the files that `paths` name, and the files that were skipped.

    Folders are searched in sorted order. In a folder, hidden files and the output of an earlier `prepare` are ignored,
    and files that are empty, binary or .json (mostly metadata) are skipped. A file that `paths` names is never skipped.

    Raises:
        UserError: a path does not exist, or is a dataset on the Hub that is still to be downloaded; a named file is not
            text; or a folder has no text file.
    """
    files: list[Path] = []
    skipped: list[Path] = []
    for path in map(Path, paths):
        if is_hub_name(path) and not path.exists():
            again = typed("download", "--dataset", path)
            raise UserError(f"{path} is on the Hugging Face Hub: first run `{again}`, which prepares it, too.")
        with os_errors_explained(f"read {path}"):
            if is_model(path):
                raise UserError(f"{path} is a run or a model, not a text: name files or a folder of text.")
            inside = list(_walk(path)) if path.is_dir() else [path]
            for file in inside:
                reason = refusal(file)
                if reason and file == path:
                    raise UserError(reason)
                skip = reason or (file != path and file.suffix.lower() == ".json")
                (skipped if skip else files).append(file)
            if set(inside) <= set(skipped):
                if prepared := next(_prepared_in(path), None):
                    raise UserError(
                        f"{prepared} is prepared already: train on it with {typed('train', '--data', prepared)}."
                    )
                others = ", or name its .json files" if any(file.suffix.lower() == ".json" for file in inside) else ""
                raise UserError(
                    f"The folder {path} has no text file in it: name one with CSV, JSONL or text files{others}."
                )
    return files, skipped


def find_sources(paths: Iterable[Path | str]) -> tuple[list[Source], list[Path]]:
    """Return the sources that `paths` name, each once, and the files that were skipped.

    This is `find_files` with `BUILTIN` among the paths.

    Raises:
        UserError: as in `find_files`.
    """
    sources: list[Source] = []
    skipped: list[Path] = []
    for path in paths:
        if str(path) == BUILTIN:
            sources.append(BUILTIN)
        else:
            files, others = find_files([path])
            sources += files
            skipped += others
    return list(dict.fromkeys(sources)), skipped


def source_size(source: Source) -> int:
    """Return the size of a source in bytes."""
    if source == BUILTIN:
        return sum(len(text.encode()) for text in builtin_documents())
    return Path(source).stat().st_size


def read_sources(
    sources: Sequence[Source], column: str, documents: str, progress: ByteProgress = ignore_progress
) -> Iterator[tuple[Row, str]]:
    """Yield the rows of each source in turn, each with its place, as `read_rows` does.

    Args:
        sources: the files to read, or `BUILTIN`.
        column: as in `read_rows`.
        documents: as in `read_rows`.
        progress: called about once a megabyte and at the end.

    Raises:
        UserError: as in `read_rows`.
    """
    done = reported = 0
    total = sum(map(source_size, sources))

    def advance(size: int) -> None:
        nonlocal done, reported
        done += size
        if done - reported >= 1_000_000:
            reported = done
            progress(min(done, total), total)

    for source in sources:
        if source == BUILTIN:
            yield from ((text, BUILTIN) for text in builtin_documents())
        else:
            yield from read_rows(source, column=column, documents=documents, advance=advance)
    progress(total, total)


def source_fingerprint(sources: list[Source], column: str, documents: str, val_fraction: float) -> str:
    """Hash everything that decides the result of `prepare`: contents, formats and settings, but no names or dates.

    Raises:
        UserError: a source cannot be read, or `documents` is not one of `DOCUMENTS`.
    """
    contents: list[Any] = []
    for source in sources:
        if source == BUILTIN:
            contents.append(hash_of(*builtin_documents()))
        else:
            path = Path(source)
            contents.append([hash_file(path), format_of(path), documents_in(path, documents)])
    return hash_of(FORMAT_VERSION, contents, column, val_fraction)


def prepared_record(folder: Path) -> dict[str, Any]:
    """Return the report that `prepare` wrote to `folder`, or {} if there is none, or only another program's report.

    A report without a kind is about documents, because earlier versions prepared nothing else.
    """
    try:
        record = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    match record:
        case {"source_fingerprint": str(), "fingerprint": str(), "folder": str(), "paths": [*paths]}:
            record = {"kind": KINDS[0]} | record
            return record if record["kind"] in KINDS and all(isinstance(path, str) for path in paths) else {}
    return {}


def hash_of(*parts: object) -> str:
    """Return the BLAKE2b hash (128 bits, in hex) of values that JSON can represent."""
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def hash_file(path: Path) -> str:
    """Return the BLAKE2b hash (128 bits, in hex) of a file's content.

    Raises:
        UserError: the file cannot be read.
    """
    with os_errors_explained(f"read {path}"), path.open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


def _prepared_in(folder: Path) -> Iterator[Path]:
    """Yield the folders in which `prepare` wrote a corpus: `folder` and those in it."""
    for report in sorted(folder.rglob(REPORT)):
        if prepared_record(report.parent) and all((report.parent / name).is_file() for name in PREPARED_FILES):
            yield report.parent


def _walk(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error  # by default os.walk silently leaves out a folder that it cannot read

    for root, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prepared = PREPARED_FILES if prepared_record(Path(root)) else ()
        for name in sorted(set(names).difference(prepared)):
            if not name.startswith(".") and Path(root, name).is_file():
                yield Path(root, name)


def kind_in(path: Path, documents: str = "auto") -> str:
    """Return the kind of the first usable row in a file, or in a folder's files; "documents" if there is none.

    Raises:
        UserError: as in `read_rows` and `find_files`.
    """
    rows = (row for file in find_files([path])[0] for row, _ in read_rows(file, documents=documents))
    return next((kind_of(row) for row in rows if not isinstance(row, Dropped)), "documents")
