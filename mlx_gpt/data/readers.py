"""Files to documents: plain `str`, one at a time, so that a corpus is never wholly in memory."""

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, TypeVar

from mlx_gpt.data.sniffing import HEAD, kind_of, refusal
from mlx_gpt.errors import UserError

DOCUMENTS = ("auto", "line", "blank-line", "file")  # what is one document in a plain text file
HAND_MADE = ("train.txt", "val.txt")  # corpora that people type by hand: one document per line
MAX_DOCUMENT = 100_000_000  # characters, thirty times War and Peace: preparing holds it four times over
MAX_LINE = 8 * MAX_DOCUMENT  # bytes: such a document still fits into a line of JSON, escapes and all

SAMPLE = 100  # rows looked at to find the text column
LONG = 40  # characters: labels, ids and UUIDs (36) average less, prose averages more

T = TypeVar("T")


@dataclass(frozen=True)
class Dropped:
    """Stands where a document would, for a row that holds none: `reason` is short, for counting."""

    reason: str


def read_documents(
    path: Path | str,
    *,
    column: str = "",
    documents: str = "auto",
    advance: Callable[[int], None] = lambda size: None,
) -> Iterator[str | Dropped]:
    """Yield the documents of one file in order, and a `Dropped` for each row that has no usable text.

    The suffix tells the format: .csv, .tsv, .jsonl (also .ndjson and .json: an object or a string on each line) and
    .parquet; anything else is plain text. Text is UTF-8, with or without BOM, or UTF-16 with BOM. Line endings are as
    the file has them.

    In a table the text is the column `column`; or else `text`, exactly or in other capitals; or else the only column
    of strings; or else the only *long* one: the one whose values average 40 characters or more over the first 100
    rows. Plain text is cut according to `documents`: "line", "blank-line" (blocks between blank lines), "file" (one
    document) or "auto": "line" in train.txt and val.txt, "file" elsewhere.

    Args:
        path: the file.
        column: the table's text column; "" finds it.
        documents: how plain text is cut, one of `DOCUMENTS`.
        advance: called with the bytes that were read since the last call.

    Raises:
        UserError: the file cannot be read, is empty, is not text, is malformed or has no clear text column.
    """
    path = Path(path)
    documents = documents_in(path, documents)
    with plainly("read", path):
        if reason := refusal(path):
            raise UserError(reason)
        found: Iterator[str | Dropped]
        match kind_of(path):
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
    """Return how the text file `path` is cut: `documents` itself, or what "auto" means for this name.

    Raises:
        UserError: `documents` is none of `DOCUMENTS`.
    """
    if documents not in DOCUMENTS:
        raise UserError(f"--documents is one of {', '.join(DOCUMENTS)}, not {documents!r}.")
    if documents != "auto":
        return documents
    return "line" if path.name in HAND_MADE else "file"


@contextmanager
def plainly(doing: str, path: Path) -> Iterator[None]:
    """Turn what the operating system says about `path` into a sentence; `doing` is "read" or "write".

    Raises:
        UserError: there was an `OSError` inside; names the file that it was about.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"There is no file or folder {error.filename or path}: check the name.") from error
    except PermissionError as error:
        raise UserError(f"No permission to {doing} {error.filename or path}: change it or choose another.") from error
    except OSError as error:
        raise UserError(f"Cannot {doing} {error.filename or path}: {error.strerror or error}.") from error


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate: JSON and UTF-16 can hold one, UTF-8 cannot
        return False
    return True


# ---- lines and rows: where in the file are we? ----------------------------------------------------------------------


def _lines(path: Path, advance: Callable[[int], None]) -> Iterator[str]:
    """Yield lines with their endings (LF, CRLF, lone CR); U+2028 and its kind are text, which `splitlines` forgets.

    UTF-8 is decoded line by line, so that a decoding error comes after every line before it has been handed out, and
    the reader that asked for the line knows which it was. The error's `start` counts from the start of the file.
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
                except UnicodeDecodeError as error:  # half a character: only at the end
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


def _counted(items: Iterator[T], path: Path, unit: str, first: int = 1) -> Iterator[tuple[int, T]]:
    """Number `items` from `first`, and say in a sentence at which one they broke."""
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
    for _, line in _counted(lines, path, "line"):
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
    """Return what separates the names in the header: a comma, or the semicolon of European spreadsheets, or a tab."""
    with path.open("rb") as file:
        header = file.readline(HEAD)
    return max(",", ";", "\t", key=lambda mark: header.count(mark.encode()))


def _csv(path: Path, lines: Iterator[str], delimiter: str, column: str) -> Iterator[str | Dropped]:
    # The limit is one for the whole process, and only there to be raised: 128 KB is less than many a book chapter.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_DOCUMENT))
    # Strict, because a quotation mark that is never closed would otherwise swallow the rest of the file.
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    counted = _counted(table, path, "row", first=0)
    header = [name.strip() for name in next((row for _, row in counted if row), [])]
    rows = (row for _, row in counted if row)
    sample = list(islice(rows, SAMPLE))
    if not sample:
        raise UserError(f"{path} has no rows under its first one: it needs a header, such as `text`, and rows.")
    if not column and "text" not in map(str.lower, header) and any(map(_is_data, header)):
        raise UserError(
            f"{path} has no header: put a first row with the columns' names there, `text` for the one to read."
        )
    values = {name: [row[i] for row in sample if i < len(row)] for i, name in enumerate(header)}
    index = header.index(_text_column(path, header, values, column))
    for row in chain(sample, rows):
        yield row[index] if index < len(row) else Dropped("too few fields")


def _is_data(cell: str) -> bool:
    """Whether a cell of the first row is more likely a value than a column's name: a number, or prose."""
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
    for number, line in _counted(lines, path, "line"):
        if not line.strip():
            continue
        try:
            yield json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}, line {number:,} is not valid JSON: each line has to be one object, or one string, of its own "
                "(a JSON array has to be written one element a line)."
            ) from error


def _parquet(path: Path, column: str, advance: Callable[[int], None]) -> Iterator[str | Dropped]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"Reading {path} takes pyarrow: pip install 'mlx-gpt[parquet]'") from error
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
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # pyarrow's own OSErrors are about content
        raise UserError(f"{path} is damaged or not Parquet ({str(error).splitlines()[0]}): write it anew.") from error


def _text_column(path: Path, names: list[str], values: dict[str, list[str]], wanted: str) -> str:
    """Return the name of the text column; `read_documents` states the rule.

    `names` are all columns, and `values` has the sampled values of those that hold strings.
    """
    name = wanted or "text"
    alike = [name] if name in names else [other for other in names if other.lower() == name.lower()]
    if len(alike) == 1:
        return alike[0]
    shown = ", ".join(name if len(name) <= 40 else name[:40] + "..." for name in names[:20])
    if wanted:
        raise UserError(f"{path} has no column {wanted!r}: name one of those it has with --column ({shown}).")
    long = [name for name, found in values.items() if found and sum(map(len, found)) >= LONG * len(found)]
    for candidates in (list(values), long):
        if len(candidates) == 1:
            return candidates[0]
    raise UserError(f"{path} does not show which column is the text: say it with --column NAME, one of {shown}.")
