"""Turns files into documents, one `str` at a time, so that a corpus never has to fit in memory."""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from mlx_gpt.config import DOCUMENTS
from mlx_gpt.data.sniffing import HEAD, format_of, refusal
from mlx_gpt.errors import UserError, os_errors_explained
from mlx_gpt.packages import install

HAND_MADE = ("train.txt", "val.txt")  # corpora that people write by hand, one document per line
MAX_DOCUMENT = 100_000_000  # characters, thirty times War and Peace; preparing holds four copies in memory
MAX_LINE = 8 * MAX_DOCUMENT  # bytes: the longest document still fits on a line of JSON, with its escapes

SAMPLE = 100  # rows that are read to find the text column
LONG = 40  # characters: labels, ids and UUIDs (36) are shorter on average, prose is longer

T = TypeVar("T")


@dataclass(frozen=True)
class Dropped:
    """Takes the place of a document for a row without usable text. `reason` is short, so that it can be counted."""

    reason: str


def read_documents(
    path: Path | str,
    *,
    column: str = "",
    documents: str = "auto",
    advance: Callable[[int], None] = lambda size: None,
) -> Iterator[str | Dropped]:
    """Yield the documents of one file in order, and a `Dropped` for each row that has no usable text.

    The suffix decides the format: .csv, .tsv, .jsonl (also .ndjson and .json: an object or a string on each line) or
    .parquet; anything else is plain text. Text is UTF-8 with or without a byte order mark, or UTF-16 with one. Line
    endings stay as they are in the file.

    The text of a table is in the column `column`. If that is "", it is in the first of these that exists: the column
    `text`, in any capitals; the only column of strings; the only column of strings that are long, which means that the
    first 100 rows average 40 characters or more.

    Plain text is cut into documents as `documents` says: "line"; "blank-line", for blocks between blank lines; "file",
    for one document; or "auto", for "line" in train.txt and val.txt and "file" elsewhere.

    Args:
        path: the file.
        column: the table's text column; "" finds it.
        documents: how plain text is cut, one of `DOCUMENTS`.
        advance: called with the number of bytes that were read since the last call.

    Raises:
        UserError: the file cannot be read, is empty, is not text, is malformed or has no clear text column.
    """
    path = Path(path)
    documents = documents_in(path, documents)
    with os_errors_explained(f"read {path}"):
        if reason := refusal(path):
            raise UserError(reason)
        found: Iterator[str | Dropped]
        match format_of(path):
            case "csv":
                found = _csv(path, _lines(path, advance), _delimiter(path), column)
            case "tsv":
                found = _csv(path, _lines(path, advance), "\t", column)
            case "jsonl":
                found = _jsonl(path, _lines(path, advance), column)
            case "parquet":
                found = _parquet(path, column, advance)
            case _:
                found = _text(path, _lines(path, advance), documents)
        for document in found:
            yield document if isinstance(document, Dropped) or _is_unicode(document) else Dropped("not valid Unicode")


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


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate, which JSON and UTF-16 can hold and UTF-8 cannot
        return False
    return True


# ---- numbered lines and rows ----------------------------------------------------------------------------------------


def _lines(path: Path, advance: Callable[[int], None]) -> Iterator[str]:
    """Yield lines with their endings (LF, CRLF or lone CR).

    `str.splitlines` will not do, because it also splits at U+2028 and the like, which are text here.

    UTF-8 is decoded line by line, so a decoding error is raised only after all earlier lines were yielded, and the
    caller knows which line it is in. The error's `start` counts bytes from the start of the file.
    """
    with path.open("rb") as file:
        bom = file.read(3)
        for mark, encoding in ((codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be")):
            if bom.startswith(mark):
                file.seek(len(mark))
                try:
                    for line in io.TextIOWrapper(file, encoding, errors="surrogatepass", newline=""):
                        advance(2 * len(line))
                        yield line
                except UnicodeDecodeError as error:  # half a character, which only the end of a file can have
                    error.start = path.stat().st_size - 1
                    raise
                return
        start = len(bom) if bom == codecs.BOM_UTF8 else 0
        file.seek(start)
        while raw := file.readline(MAX_LINE + 1):
            if len(raw) > MAX_LINE:
                raise UserError(f"{path} has a line of over {MAX_LINE // 10**6:,} MB: break it into shorter ones.")
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                error.start += start
                raise
            start += len(raw)
            advance(len(raw))
            yield from re.split(r"(?<=\r)(?=[^\n])", line) if "\r" in line else (line,)


def _numbered(items: Iterator[T], path: Path, unit: str, first: int = 1) -> Iterator[tuple[int, T]]:
    """Number `items` from `first`, and turn an error in them into a `UserError` that names the line or row."""
    number = first
    while True:
        place = f"{path}, the header row" if number == 0 else f"{path}, {unit} {number:,}"
        try:
            item = next(items)
        except StopIteration:
            return
        except UnicodeDecodeError as error:
            raise UserError(
                f"{place}: the byte at offset {error.start:,} is not {error.encoding.upper()}; "
                "save the file as UTF-8 and try again."
            ) from error
        except csv.Error as error:
            raise UserError(
                f"{place} is not valid CSV ({error}): close every quotation mark, and double those inside a field."
            ) from error
        yield number, item
        number += 1


# ---- formats --------------------------------------------------------------------------------------------------------


def _text(path: Path, lines: Iterator[str], documents: str) -> Iterator[str]:
    block: list[str] = []
    size = 0
    for _, line in _numbered(lines, path, "line"):
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


def _delimiter(path: Path) -> str:
    """Return the character that separates the names in the header: a comma, a tab, or a semicolon as in Europe."""
    with path.open("rb") as file:
        header = file.readline(HEAD)
    return max(",", ";", "\t", key=lambda mark: header.count(mark.encode()))


def _csv(path: Path, lines: Iterator[str], delimiter: str, column: str) -> Iterator[str | Dropped]:
    # The limit holds for the whole process, so it is only ever raised. Its default, 128 KB, is less than many chapters.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_DOCUMENT))
    # Strict, because otherwise a quotation mark that is never closed would swallow the rest of the file.
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    numbered = _numbered(table, path, "row", first=0)
    header = [name.strip() for name in next((row for _, row in numbered if row), [])]
    rows = (row for _, row in numbered if row)
    sample = list(islice(rows, SAMPLE))
    if not sample:
        raise UserError(f"{path} has no rows under its first one: give it a header, such as `text`, and rows.")
    if not column and "text" not in map(str.lower, header) and any(map(_is_data, header)):
        raise UserError(
            f"{path} has no header: add a first row with the columns' names, with `text` for the one to read."
        )
    values = {name: [row[i] for row in sample if i < len(row)] for i, name in enumerate(header)}
    index = header.index(_text_column(path, header, values, column))
    for row in chain(sample, rows):
        yield row[index] if index < len(row) else Dropped("too few fields")


def _is_data(cell: str) -> bool:
    """Return whether a cell of the first row is more likely a value (a number or prose) than a column's name."""
    return len(cell) > 100 or "\n" in cell or re.fullmatch(r"[-+]?\d*\.?\d+", cell) is not None


def _jsonl(path: Path, lines: Iterator[str], column: str) -> Iterator[str | Dropped]:
    rows = _json_values(path, lines)
    sample = list(islice(rows, SAMPLE))
    objects = [row for row in sample if isinstance(row, dict)]
    if objects:
        names = list(dict.fromkeys(chain.from_iterable(objects)))
        strings = {name: [row[name] for row in objects if isinstance(row.get(name), str)] for name in names}
        column = _text_column(path, names, {name: found for name, found in strings.items() if found}, column)
    for row in chain(sample, rows):
        if isinstance(row, dict) and column not in row:
            yield Dropped("column missing")
            continue
        text = row[column] if isinstance(row, dict) else row
        yield text if isinstance(text, str) else Dropped("not a string")


def _json_values(path: Path, lines: Iterator[str]) -> Iterator[Any]:
    for number, line in _numbered(lines, path, "line"):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number:,} is not valid JSON: write one object or one string on each line "
                "(and a JSON array as one element on each line)."
            ) from error


def _parquet(path: Path, column: str, advance: Callable[[int], None]) -> Iterator[str | Dropped]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"Reading {path} needs pyarrow: {install('parquet')}.") from error
    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            strings = [
                field.name for field in schema if pa.types.is_string(field.type) or pa.types.is_large_string(field.type)
            ]
            head = next(file.iter_batches(SAMPLE, columns=strings), None)
            values = {name: [v for v in head[name].to_pylist() if v is not None] if head else [] for name in strings}
            name = _text_column(path, schema.names, values, column)
            size_of_row = path.stat().st_size / max(1, file.metadata.num_rows)
            for batch in file.iter_batches(1024, columns=[name]):
                for text in batch[name].to_pylist():
                    yield text if isinstance(text, str) else Dropped("not a string")
                advance(int(size_of_row * len(batch)))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # pyarrow raises OSError for damaged content
        raise UserError(f"{path} is damaged or not Parquet ({str(error).splitlines()[0]}): export it again.") from error


def _text_column(path: Path, names: list[str], values: dict[str, list[str]], wanted: str) -> str:
    """Return the name of the text column by the rule that `read_documents` states.

    Args:
        path: the table's file, for the message.
        names: all columns.
        values: the sampled values of each column that holds strings.
        wanted: the column that the user names, or "".

    Raises:
        UserError: no column fits, or several do.
    """
    name = wanted or "text"
    alike = [name] if name in names else [other for other in names if other.lower() == name.lower()]
    if len(alike) == 1:
        return alike[0]
    shown = ", ".join(name if len(name) <= 40 else name[:40] + "..." for name in names[:20])
    if wanted:
        raise UserError(f"{path} has no column {wanted!r}: name one of its columns with --column ({shown}).")
    long = [name for name, found in values.items() if found and sum(map(len, found)) >= LONG * len(found)]
    for candidates in (list(values), long):
        if len(candidates) == 1:
            return candidates[0]
    raise UserError(f"It is not clear which column of {path} is the text: name it with --column NAME, one of {shown}.")
