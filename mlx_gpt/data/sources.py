"""Where documents come from: files, folders and the text that comes with Python."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from hashlib import blake2b, file_digest
from pathlib import Path
from typing import Any

from mlx_gpt.data.readers import Dropped, documents_in, plainly, read_documents
from mlx_gpt.data.sniffing import kind_of, refusal
from mlx_gpt.errors import UserError

BUILTIN = "builtin"  # stands for a path: the language reference that comes with Python
FORMAT = 1  # to be raised when the same sources would be prepared to something else

Source = Path | str  # a file, or BUILTIN


def builtin_documents() -> Iterator[str]:
    """Yield the topics of Python's language reference, which every CPython carries, in the order of their names."""
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield topics[name]


def find_files(paths: Iterable[Path | str]) -> tuple[list[Path], list[Path]]:
    """Return the files that `paths` name, folders walked in sorted order, and the files passed over on the way.

    In a folder, hidden files and what an earlier `prepare` wrote are ignored, and files that are empty, binary or
    .json (metadata, mostly) are passed over. A file that is named itself has to be readable.

    Raises:
        UserError: a path is not there, a named file is no text, or a folder has no file of text.
    """
    files: list[Path] = []
    passed_over: list[Path] = []
    for path in map(Path, paths):
        with plainly("read", path):
            inside = list(_walk(path)) if path.is_dir() else [path]
            for file in inside:
                reason = refusal(file)
                if reason and file == path:
                    raise UserError(reason)
                skip = reason or (file != path and file.suffix.lower() == ".json")
                (passed_over if skip else files).append(file)
            if set(inside) <= set(passed_over):
                raise UserError(f"The folder {path} holds no file of text: name one with CSV, JSONL or text files.")
    return files, passed_over


def find_sources(paths: Iterable[Path | str]) -> tuple[list[Source], list[Path]]:
    """Return what `paths` name, each source once, and the files passed over: `find_files` that knows `BUILTIN`.

    Raises:
        UserError: as `find_files` does.
    """
    sources: list[Source] = []
    passed_over: list[Path] = []
    for path in paths:
        if str(path) == BUILTIN:
            sources.append(BUILTIN)
        else:
            files, others = find_files([path])
            sources += files
            passed_over += others
    return list(dict.fromkeys(sources)), passed_over


def source_size(source: Source) -> int:
    """Return the bytes of a source."""
    if source == BUILTIN:
        return sum(len(text.encode()) for text in builtin_documents())
    return Path(source).stat().st_size


def read_sources(
    sources: list[Source], column: str, documents: str, progress: Callable[[int, int], None] | None
) -> Iterator[str | Dropped]:
    """Yield the documents of each source in turn, as `read_documents` does.

    Args:
        sources: what to read.
        column: as in `read_documents`.
        documents: as in `read_documents`.
        progress: called with the bytes done and the bytes in all, about once a megabyte and at the end.

    Raises:
        UserError: as `read_documents` does.
    """
    done = told = 0
    total = sum(map(source_size, sources))

    def advance(size: int) -> None:
        nonlocal done, told
        done += size
        if progress and done - told >= 1_000_000:
            told = done
            progress(min(done, total), total)

    for source in sources:
        if source == BUILTIN:
            yield from builtin_documents()
        else:
            yield from read_documents(source, column=column, documents=documents, advance=advance)
    if progress:
        progress(total, total)


def source_fingerprint(sources: list[Source], column: str, documents: str, val_fraction: float) -> str:
    """Hash all that decides what is prepared: contents, formats and settings, but no names and no dates.

    Raises:
        UserError: a source cannot be read, or `documents` is no way to cut.
    """
    contents: list[Any] = []
    for source in sources:
        if source == BUILTIN:
            contents.append(hash_of(*builtin_documents()))
        else:
            path = Path(source)
            contents.append([hash_file(path), kind_of(path), documents_in(path, documents)])
    return hash_of(FORMAT, contents, column, val_fraction)


def prepared_record(folder: Path) -> dict[str, Any]:
    """Return what `prepare` noted in `folder`, or nothing if it was never there."""
    try:
        record = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) and "source_fingerprint" in record else {}


def hash_of(*parts: object) -> str:
    """Return the BLAKE2b hash (128 bits, in hex) of values that JSON can hold."""
    return blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def hash_file(path: Path) -> str:
    """Return the BLAKE2b hash (128 bits, in hex) of a file's content.

    Raises:
        UserError: the file cannot be read.
    """
    with plainly("read", path), path.open("rb") as file:
        return file_digest(file, lambda: blake2b(digest_size=16)).hexdigest()


def _walk(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error  # os.walk would leave out an unreadable folder without a word

    for root, folders, names in os.walk(folder, onerror=fail):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        prepared = {"report.json", "train.jsonl", "val.jsonl"} if prepared_record(Path(root)) else set()
        for name in sorted(set(names) - prepared):
            if not name.startswith(".") and Path(root, name).is_file():
                yield Path(root, name)
