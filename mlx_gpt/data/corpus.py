"""Opens a corpus: a file of documents, conversations or preferences for training and one for validation."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_gpt.data.conversations import Conversation
from mlx_gpt.data.documents import read_kind, read_rows
from mlx_gpt.data.kinds import KINDS, Kinds, one_of
from mlx_gpt.data.prepare import find_split, fingerprint_of, prepare
from mlx_gpt.data.rows import Dropped, DroppedPart, Drops, normalise
from mlx_gpt.data.schemas import Row
from mlx_gpt.data.sources import BUILTIN, find_sources, prepared_record, source_fingerprint
from mlx_gpt.data.split import SPLITS, split_file
from mlx_gpt.errors import UserError, os_errors_explained, printable
from mlx_gpt.files import finish_publishing, nearest_existing, remove_leftovers
from mlx_gpt.progress import ByteProgress, Echo, ignore_line, ignore_progress


@dataclass(frozen=True)
class Corpus:
    """A file of documents, conversations or preferences for training, and one for validation.

    Attributes:
        name: a name for people.
        folder: the folder of the two files.
        fingerprint: a hash in hex that changes with the files' content and with the way they are read.
        column: the text column of .jsonl files, as in `read_rows`.
        cut: how .txt files are cut into documents, as `documents` in `read_rows`.
        cache: the folder for tokens and the like, used if `folder` can't be written to.
        kind: "documents", "conversations" or "preferences".
    """

    name: str
    folder: Path
    fingerprint: str
    column: str = ""
    cut: str = "auto"
    cache: Path | None = None
    kind: str = KINDS[0]

    def path(self, split: str) -> Path:
        """Return the file of a split, "train" or "val".

        Raises:
            UserError: there is no such file, or there are two.
        """
        found = find_split(self.folder, split)
        if found is None:
            raise UserError(f"{self.folder} has no {split}.jsonl or {split}.txt: prepare it again.")
        return found

    def made(self, name: str) -> Path:
        """Return the path of a file that is made from the corpus, such as its tokens, whether or not it is there."""
        path = self.folder / name
        return path if self.cache is None or path.exists() else self.cache / name

    def check_unchanged(self) -> None:
        """Check that the files still have the content that `fingerprint` stands for.

        Raises:
            UserError: somebody has changed them.
        """
        if fingerprint_of(self.folder, self.column, self.cut) != self.fingerprint:
            raise UserError(f"The text in {self.folder} was changed while it was read: run the command again.")

    def documents(self, split: str, echo: Echo = ignore_line) -> Iterator[str]:
        """Yield the usable documents of a split, normalised; `echo` as in `usable`.

        Raises:
            UserError: the file is missing, or as in `read_kind`.
        """
        return self._usable("documents", split, echo)

    def conversations(self, split: str, echo: Echo = ignore_line) -> Iterator[Conversation]:
        """Yield the usable conversations of a split; `echo` as in `usable`.

        Raises:
            UserError: the file is missing, or as in `read_kind`.
        """
        return self._usable("conversations", split, echo)

    def rows(self, split: str, echo: Echo = ignore_line) -> Iterator[Any]:
        """Yield the usable rows of a split, all of the corpus's kind; `echo` as in `usable`.

        Raises:
            UserError: the file is missing, or as in `read_kind`.
        """
        return self._usable(self.kind, split, echo)

    def _usable(self, kind: str, split: str, echo: Echo) -> Iterator[Any]:
        return usable(read_kind(self.path(split), kind, column=self.column, documents=self.cut), echo)


def usable(rows: Iterable[Row], echo: Echo = ignore_line) -> Iterator[Any]:
    """Yield the rows without the dropped ones and empty documents; documents are normalised.

    At the end `echo` is called with a line for each reason for which rows were dropped.
    """
    drops, parts = Drops(), Drops()
    for row in rows:
        if isinstance(row, Dropped):
            (parts if isinstance(row, DroppedPart) else drops).add(row.reason, row.place)
        elif not isinstance(row, str):
            yield row
        elif row.strip():
            yield normalise(row)
    for what, counted in (("rows: ", drops), ("", parts)):
        for reason, count in counted.counts.items():
            first = f" (first in {counted.first[reason]})" if reason in counted.first else ""
            echo(printable(f"WARNING: left out {count:,} {what}{reason}{first}."))


def open_corpus(
    data: Path | str,
    *,
    column: str = "",
    documents: str = "auto",
    val_fraction: float = 0.1,
    cache: Path | str = Path("data/cache"),
    echo: Echo = ignore_line,
    progress: ByteProgress = ignore_progress,
) -> Corpus:
    """Return the corpus at `data`, preparing it first if necessary.

    A folder with a train file and a val file is used unchanged. Everything else (a file, a folder of files, a folder
    with only a train file, or "builtin") is prepared into a folder in `cache`. That folder is named after the content
    and the settings, so it is found again the next time.

    Args:
        data: a file, a folder or "builtin".
        column: as in `read_rows`.
        documents: as in `read_rows`.
        val_fraction: as in `prepare`.
        cache: the folder in which corpora are prepared, and for the tokens of a corpus that can't be written to.
        echo: called with each line of the report, if a corpus was prepared.
        progress: as in `prepare`.

    Raises:
        UserError: as in `prepare`; or the train or val file of a folder is missing, empty or there twice.
    """
    path, cache = Path(data), Path(cache)
    sources: list[Path | str] = [data]
    name = BUILTIN if str(data) == BUILTIN else path.stem
    remove_leftovers(path)
    for folder in cache.glob("*"):
        if remove_leftovers(folder):
            with contextlib.suppress(OSError):  # it is not empty
                folder.rmdir()
    with os_errors_explained(f"read {path}"):
        if str(data) != BUILTIN and path.is_dir():
            finish_publishing(path)
            name = path.resolve().name
            train, val = (find_split(path, split) for split in SPLITS)
            if train and val:
                return _opened(name, path, column, documents, cache, echo)
            if val:
                raise UserError(f"{path} has {val.name} but no train.jsonl or train.txt: add one.")
            if train:
                sources = [train]
    fingerprint = source_fingerprint(find_sources(sources)[0], column, documents, val_fraction)
    folder = _inside(cache, name, fingerprint)
    finish_publishing(folder)
    complete = all(split_file(folder, split).exists() for split in SPLITS)
    if not complete or prepared_record(folder).get("source_fingerprint") != fingerprint:
        check_writable(folder)
        report = prepare(
            sources,
            folder,
            column=column,
            documents=documents,
            val_fraction=val_fraction,
            overwrite=True,  # it belongs to the cache, so nobody's work is lost
            progress=progress,
        )
        echo(f"prepared {data} in {folder}")
        for line in report.lines():
            echo(line)
    return _opened(name, folder, "", "auto", cache, echo)


def check_writable(folder: Path) -> None:
    """Check that files can be written to a folder, which need not exist yet, of the cache or of a corpus.

    Raises:
        UserError: the folder, or the one in which it would be made, can't be written to.
    """
    place = nearest_existing(folder)
    if place.is_dir() and not os.access(place, os.W_OK):
        raise UserError(
            f"mlx-gpt needs {folder} for what it makes from a text, but {place} can't be written to: run the command "
            "from a folder that you can write to."
        )


def _inside(cache: Path, name: str, fingerprint: str) -> Path:
    """Return the folder in the cache for a corpus of this name and content."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "data"
    return cache / f"{name}-{fingerprint[:8]}"


def _opened(name: str, folder: Path, column: str, documents: str, cache: Path, echo: Echo) -> Corpus:
    """Return the corpus in `folder`, after checking that each of its files has a row of its kind."""
    record = prepared_record(folder)
    cut = "line" if documents == "auto" else documents
    column = "" if record else column  # the setting names a column of the source; a prepared file lacks it
    fingerprint, elsewhere = fingerprint_of(folder, column, cut), None
    kind = record["kind"] if record.get("fingerprint") == fingerprint else _kind(folder, column)
    if not os.access(folder, os.W_OK):
        elsewhere = _inside(cache, name, fingerprint)
        echo(f"{folder} can't be written to: the tokens and the tokenizer that are made from it go to {elsewhere}.")
    column = "text" if record and kind == "documents" else column
    corpus = Corpus(name, folder, fingerprint, column, cut, elsewhere, kind)
    for split in SPLITS:
        if next(corpus.rows(split), None) is None:
            raise UserError(f"{corpus.path(split)} has no {one_of(kind)} in it: add some text.")
    return corpus


def _kind(folder: Path, column: str) -> str:
    """Return the kind of the rows in `folder`, after reading all of them.

    Raises:
        UserError: the kind is not clear, or as in `read_rows`.
    """
    kinds = Kinds()
    files = [path for split in SPLITS if (path := find_split(folder, split)) and path.suffix == ".jsonl"]
    for path in [] if column else files:
        for row, place in read_rows(path):
            if not isinstance(row, Dropped) and (not isinstance(row, str) or row.strip()):
                kinds.add(row, place)
    return kinds.meant()
