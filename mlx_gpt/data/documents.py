"""Turns files into documents, conversations or preferences, one at a time: a corpus need not fit in memory."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

from mlx_gpt.config import DOCUMENTS
from mlx_gpt.data.csv_rows import read_csv
from mlx_gpt.data.decoding import MAX_DOCUMENT, ignore_bytes, lines, numbered, pieces
from mlx_gpt.data.json_rows import read_json
from mlx_gpt.data.kinds import kind_of, misplaced
from mlx_gpt.data.parquet_rows import read_parquet
from mlx_gpt.data.rows import Dropped, DroppedPart
from mlx_gpt.data.schemas import Row
from mlx_gpt.data.sniffing import format_of, refusal
from mlx_gpt.errors import UserError, is_utf8, os_errors_explained

HAND_MADE = ("train.txt", "val.txt")  # corpora that people write by hand, one document per line


def read_rows(
    path: Path | str,
    *,
    column: str = "",
    documents: str = "auto",
    advance: Callable[[int], None] = ignore_bytes,
) -> Iterator[tuple[Row, str]]:
    """Yield the rows of one file in order, each with its place, which is the file and the row or line.

    A row is a document, a conversation, a preference, or else a `Dropped` without its place. If the last question of a
    conversation has no answer, a `DroppedPart` for the question comes first, then the conversation without it.

    The suffix decides the format: .csv, .tsv, .jsonl (also .ndjson and .json: objects and strings, one after another
    or in one array) or .parquet; anything else is plain text. Text is UTF-8 with or without a byte order mark, or
    UTF-16 or UTF-32 with one. Line endings stay as they are in the file.

    In a table, the columns decide the kind of a row, by `SCHEMAS`. With a `column`, every row is a document.

    The text of a table is in the column `column`. If that is "", it is in the first of these that exists: the column
    `text`, in any capitals; the only column of strings, unless another holds lists or objects; the only column of
    strings that are long, which means that the first 100 rows average 40 characters or more.

    Plain text is cut into documents as `documents` says: "line"; "blank-line", for blocks between blank lines; "file",
    for one document; or "auto", for "line" in train.txt and val.txt and "file" elsewhere.

    Args:
        path: the file.
        column: the table's text column; "" finds it.
        documents: how plain text is cut, one of `DOCUMENTS`.
        advance: called with the number of bytes that were read since the last call.

    Raises:
        UserError: the file cannot be read, is empty, is not text, is malformed, or has no clear text column.
    """
    path = Path(path)
    documents = documents_in(path, documents)
    with os_errors_explained(f"read {path}"):
        if reason := refusal(path):
            raise UserError(reason)
        found: Iterator[tuple[Row, str]]
        match format_of(path):
            case "csv" | "tsv":
                found = read_csv(path, column, advance, tabs=format_of(path) == "tsv")
            case "jsonl":
                found = read_json(path, pieces(path, advance), column)
            case "parquet":
                found = read_parquet(path, column, advance)
            case _:
                texts = _text(path, lines(path, advance), documents)
                found = ((text, f"{path}, document {number:,}") for number, text in enumerate(texts, 1))
        for number, (row, place) in enumerate(found, 1):
            # JSON and UTF-16 can hold a lone surrogate, and UTF-8 cannot.
            if isinstance(row, str) and not is_utf8(row):
                yield Dropped("not valid Unicode"), f"{path}, document {number:,}"
            elif isinstance(row, list) and row[-1]["role"] == "user":
                yield DroppedPart("last questions without an answer"), place
                yield row[:-1], place
            else:
                yield row, place


def read_kind(
    path: Path | str,
    kind: str,
    *,
    column: str = "",
    documents: str = "auto",
    advance: Callable[[int], None] = ignore_bytes,
) -> Iterator[Row]:
    """Yield the rows of one kind in a file, and a `Dropped` with its place for each other row.

    Args:
        path: the file.
        kind: one of `KINDS`.
        column: as in `read_rows`.
        documents: as in `read_rows`.
        advance: as in `read_rows`.

    Raises:
        UserError: as in `read_rows`; or all rows that can be used are of another kind.
    """
    found, other = False, ""
    for row, place in read_rows(path, column=column, documents=documents, advance=advance):
        if isinstance(row, Dropped):
            if kind == "conversations" or not isinstance(row, DroppedPart):
                yield replace(row, place=place)
        elif kind_of(row) == kind:
            found = True
            yield row
        else:
            other = kind_of(row)
            yield Dropped(misplaced(other, kind), place)
    if other and not found:
        instead = ", or read one of its columns with --column" if kind == "documents" else ""
        raise UserError(f"{path} holds {other}, not {kind}: name a file of {kind}{instead}.")


def read_documents(
    path: Path | str,
    *,
    column: str = "",
    documents: str = "auto",
    advance: Callable[[int], None] = ignore_bytes,
) -> Iterator[str | Dropped]:
    """Yield the documents of one file in order, and a `Dropped` for each row that has no usable text.

    Arguments and errors as in `read_rows`.

    Raises:
        UserError: also if the file holds conversations or preferences.
    """
    rows = read_kind(path, "documents", column=column, documents=documents, advance=advance)
    return cast(Iterator[str | Dropped], rows)


def documents_in(path: Path, documents: str) -> str:
    """Return how the text file `path` is cut: `documents`, or the meaning of "auto" for a file of this name.

    Raises:
        UserError: `documents` is not one of `DOCUMENTS`.
    """
    if documents not in DOCUMENTS:
        raise UserError(f"--documents must be one of {', '.join(DOCUMENTS)}, not {documents!r}.")
    if documents != "auto":
        return documents
    return "line" if path.name in HAND_MADE else "file"


def _text(path: Path, file: Iterator[str], documents: str) -> Iterator[str]:
    block: list[str] = []
    size = 0
    for _, line in numbered(file, path, "line"):
        if documents == "line":
            if line.strip():
                yield line.rstrip("\r\n")
        elif documents == "blank-line" and not line.strip():
            if block:
                yield "".join(block).rstrip("\r\n")
            block, size = [], 0
        else:
            block.append(line)
            size += len(line)
            if size > MAX_DOCUMENT:
                raise UserError(
                    f"{path} has a document of over {MAX_DOCUMENT // 10**6} million characters: "
                    "cut it at its blank lines with --documents blank-line, or split the file."
                )
    if block:
        yield "".join(block) if documents == "file" else "".join(block).rstrip("\r\n")
