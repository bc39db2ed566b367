"""Read the rows of CSV and Parquet files."""

import csv
import io
import re
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

from mlx_gpt.data.decoding import MAX_DOCUMENT, lines, numbered, pieces
from mlx_gpt.data.rows import LONG, SAMPLE, Dropped, named_column, text_column
from mlx_gpt.errors import UserError

MARKS = ("\t", "|", ";", ",")  # the separators of fields, beginning with the one that occurs least in prose
NO_MARK = "\uffff"  # separates nothing: Unicode has no character of this number
COMMENT = "comment above the header"
SENTENCE = re.compile(r"[.,;!?](\s|$)")  # a mark of a sentence, which few names have


# ---- CSV ------------------------------------------------------------------------------------------------------------


def read_csv(path: Path, column: str, advance: Callable[[int], None], *, tabs: bool) -> Iterator[str | Dropped]:
    """Yield the documents of a CSV file, or of a TSV file (`tabs`).

    Raises:
        UserError: as in `read_documents`.
    """
    # The limit holds for the whole process, so it is only ever raised. Its default, 128 KB, is less than many chapters.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_DOCUMENT))
    file = lines(path, advance)
    head = _head(path)
    above, mark = _above_the_header(head, column)
    for number, line in numbered(islice(file, above), path, "line"):
        if line.startswith("#"):
            yield Dropped(COMMENT, f"{path}, line {number:,}")
    head = head[above:]
    mark = mark or _separator(head, column, tabs)
    spaced = _has_spaced_quotes(head, _parsed(head, mark), mark)
    record: list[str] = []  # the lines of the row that is being read

    def recorded() -> Iterator[str]:
        for line in file:
            record.append(line)
            yield line

    # Strict, because otherwise a quotation mark that is never closed would swallow the rest of the file.
    table = csv.reader(recorded(), delimiter=mark, strict=True, skipinitialspace=spaced)
    header = [name.strip() for name in next((row for _, row in numbered(table, path, "header row") if row), [])]
    header[:1] = [name.lstrip("# ") for name in header[:1]]
    record.clear()

    def checked() -> Iterator[tuple[int, list[str], str]]:
        for number, row in numbered(table, path, "row"):
            odd = not spaced and _has_spaced_quotes(record, [row], mark)
            record.clear()
            if row:
                yield number, row, "a space before a quotation mark" if odd else ""

    rows = checked()
    sample = list(islice(rows, SAMPLE))
    index = _text_index(path, header, [row for _, row, _ in sample], column)
    faults = [(number, why) for number, row, odd in sample if (why := odd or _fault(row, len(header), index))]
    if len(faults) > len(sample) / 2:
        raise UserError(
            f"{path} has {len(header)} columns by its first row, but most rows do not fit (row {faults[0][0]:,} has "
            f"{faults[0][1]}): name every column there, and put quotation marks around text with separators in it."
        )
    if not column and len(header) == 1 and not named_column(header, ""):
        yield Dropped("first row, taken for the column's name", f"{path}, header row")
    for number, row, odd in chain(sample, rows):
        if why := odd or _fault(row, len(header), index):
            yield Dropped(why, f"{path}, row {number:,}")
        else:
            yield row[index]


def _head(path: Path) -> list[str]:
    """Return the first lines of a file, as far as they can be decoded."""
    try:
        return list(io.StringIO(next(pieces(path), ""), newline=""))
    except UnicodeDecodeError:  # in the first byte; reading the file reports it
        return []


def _above_the_header(head: list[str], column: str) -> tuple[int, str]:
    """Return the number of lines above the header, and the separator if one of them says it, as Excel's `sep=;`."""
    mark = ""
    for number, line in enumerate(head):
        if found := re.fullmatch(r"sep=(.)\s*", line):
            mark = found[1]
        elif line.strip() and not (line.startswith("#") and _is_comment(head[number:], column)):
            return number, mark
    return 0, ""


def _is_comment(head: list[str], column: str) -> bool:
    """Return whether a first line that begins with # is a comment, and not a header whose first name begins so."""
    mark = _separator(head, column, tabs=False)
    names = [name.strip() for name in _parsed(head[:1], mark)[0]]
    below = next((line for line in head[1:] if line.strip() and not line.startswith("#")), "")
    if named_column([name.lstrip("#").strip() for name in names], column):
        return False
    if any(named_column([name.strip() for name in row], column) for row in _parsed([below], mark)):
        return True
    # `# made by me, 2024` is a comment and `#id,title` is not, although both may have the fields of a table.
    fields = len(next(iter(_parsed([below], mark)), []))
    return len(names) == 1 or len(names) != fields or head[0].startswith("# ")


def _separator(head: list[str], column: str, tabs: bool) -> str:
    """Return the separator of the columns' names, or `NO_MARK` if the header has one name alone.

    If there are several, it is the one that gives the name that is looked for, or else the one by which most rows have
    as many fields as the header.
    """
    best, found = (False, 0.0, 0), NO_MARK
    for mark in MARKS:
        rows = _parsed(head, mark)
        names = len(rows[0]) if rows else 0
        if names < 2:
            continue
        if tabs and mark == "\t":
            return mark
        fitting = sum(len(row) == names for row in rows[1:]) / max(1, len(rows) - 1)
        score = (bool(named_column([name.strip() for name in rows[0]], column)), fitting, names)
        if score > best:
            best, found = score, mark
    return found


def _parsed(head: list[str], mark: str) -> list[list[str]]:
    """Return the first rows by this separator, without the blank ones."""
    return [row for row in islice(csv.reader(head, delimiter=mark), SAMPLE) if row]


def _has_spaced_quotes(record: list[str], rows: list[list[str]], mark: str) -> bool:
    """Return whether lines have a field with a space before its quotation marks, which did not count in `rows`."""
    if not any(' "' in line for line in record):
        return False
    others = csv.reader(record, delimiter=mark, skipinitialspace=True)
    before, after = (
        sum(field.startswith(" ") and field.lstrip(" ").startswith('"') for row in some for field in row)
        for some in (rows, islice(others, SAMPLE))
    )
    return before > after


def _text_index(path: Path, header: list[str], sample: list[list[str]], column: str) -> int:
    """Return the index of the text column, after checking that the first row is a header."""
    if not sample:
        raise UserError(f"{path} has no rows under its first one: give it a header, such as `text`, and rows.")
    named = named_column(header, column)
    if not column and not named and any(map(_is_data, header)):
        raise UserError(
            f"{path} has no header: add a first row with the columns' names, with `text` for the one to read."
        )
    values = {name: [row[i] for row in sample if i < len(row)] for i, name in enumerate(header)}
    name = text_column(path, header, values, column)
    if not named and (len(name) >= LONG or SENTENCE.search(name)):
        raise UserError(
            f"{path} may have no header, because its first row is like a text: add one that names the columns, "
            "or name the column with --column."
        )
    if not named and len(header) == 1:
        _refuse_title(path, sample)
    return header.index(name)


def _refuse_title(path: Path, sample: list[list[str]]) -> None:
    """Refuse rows of several fields under a first row that has one, which may be a title above the header."""
    for mark in MARKS:
        counts = {row[0].count(mark) for row in sample}
        if len(sample) > 1 and len(counts) == 1 and counts != {0}:
            raise UserError(
                f"{path} has one name in its first row, but several fields in the others: "
                "begin with a row that names all columns, with `text` for the one to read."
            )


def _is_data(cell: str) -> bool:
    """Return whether a cell of the first row is more likely a value (a number or prose) than a column's name."""
    return len(cell) > 100 or "\n" in cell or re.fullmatch(r"[-+]?\d*\.?\d+", cell) is not None


def _fault(row: list[str], columns: int, index: int) -> str:
    """Return why a row does not fit the header, or ""."""
    if any(field.strip() for field in row[columns:]):
        return "more fields than the header"
    # A line break without quotation marks cuts a row in two, and the rest of a text may then be in another column. A
    # row of one field can hold nothing but the text if that is the first column.
    if len(row) < columns and (index > 0 or len(row) > 1):
        return "too few fields"
    return ""


# ---- Parquet --------------------------------------------------------------------------------------------------------


def read_parquet(path: Path, column: str, advance: Callable[[int], None]) -> Iterator[str | Dropped]:
    """Yield the documents of a Parquet file.

    Raises:
        UserError: as in `read_documents`.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UserError(f"Reading {path} needs pyarrow: pip install 'mlx-gpt[parquet]'") from error

    def holds_strings(kind: pa.DataType) -> bool:
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        return pa.types.is_string(kind) or pa.types.is_large_string(kind)

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            nested = [field.name for field in schema if pa.types.is_nested(field.type)]
            strings = [field.name for field in schema if holds_strings(field.type)]
            if len(set(schema.names)) < len(schema.names):
                raise UserError(f"{path} has two columns of one name: rename one of them.")
            head = next(file.iter_batches(SAMPLE, columns=strings), None)
            values = {name: [v for v in head[name].to_pylist() if v is not None] if head else [] for name in strings}
            name = text_column(path, schema.names, values, column, nested)
            size_of_row = path.stat().st_size / max(1, file.metadata.num_rows)
            number = 0
            for batch in file.iter_batches(1024, columns=[name]):
                for text in batch[name].to_pylist():
                    number += 1
                    yield text if isinstance(text, str) else Dropped("not a string", f"{path}, row {number:,}")
                advance(int(size_of_row * len(batch)))
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # pyarrow raises OSError for damaged content
        raise UserError(f"{path} is damaged or not Parquet ({str(error).splitlines()[0]}): export it again.") from error
