"""Read the rows of a CSV file."""

import csv
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path

from mlx_gpt.data.csv_header import text_index
from mlx_gpt.data.csv_layout import Layout, has_spaced_quotes, layout_of
from mlx_gpt.data.decoding import MAX_DOCUMENT, lines, numbered
from mlx_gpt.data.rows import SAMPLE, Dropped, named_column
from mlx_gpt.data.schemas import COLUMNS, Row, Schema, read_row, schema_in
from mlx_gpt.errors import UserError


def read_csv(path: Path, column: str, advance: Callable[[int], None], *, tabs: bool) -> Iterator[tuple[Row, str]]:
    """Yield the rows of a CSV file, or of a TSV file (`tabs`), each with its place.

    Raises:
        UserError: as in `read_rows`.
    """
    # The limit holds for the whole process, so it is only ever raised. Its default, 128 KB, is less than many chapters.
    csv.field_size_limit(max(csv.field_size_limit(), MAX_DOCUMENT))
    layout = layout_of(path, column, tabs=tabs)
    file = lines(path, advance)
    for number, line in numbered(islice(file, layout.above), path, "line"):
        if line.startswith("#"):
            yield Dropped("commented out above the header"), f"{path}, line {number:,}"
    table = _Table(path, file, layout)
    rows = table.rows()
    sample = list(islice(rows, SAMPLE))
    header = table.header
    schema = None if column or named_column(header, "") else _schema(path, header)
    # A conversation or preference needs all of its fields, and so does a row whose text is in the last column.
    index = len(header) - 1 if schema else text_index(path, header, [row for _, row, _ in sample], column)
    columns = len(header)
    faults = [(number, why) for number, row, fault in sample if (why := fault or _misfit(row, columns, index))]
    if len(faults) > len(sample) / 2:
        raise UserError(
            f"The first row of {path} names {columns} columns, but most rows do not fit that (row {faults[0][0]:,} has "
            f"{faults[0][1]}): name every column in the first row, and put quotation marks around text with "
            "separators in it."
        )
    if not column and header[0] and sum(map(bool, header)) == 1 and not named_column(header, ""):
        yield Dropped("first row, taken for the column's name"), f"{path}, header row"
    for number, row, fault in chain(sample, rows):
        place = f"{path}, row {number:,}"
        if why := fault or _misfit(row, columns, index):
            yield Dropped(why), place
        elif schema:
            yield read_row(dict(zip(header, row, strict=False)), schema), place
        else:
            yield row[index], place


class _Table:
    """A table's rows, each compared with the lines from which it was parsed."""

    def __init__(self, path: Path, file: Iterator[str], layout: Layout) -> None:
        self._path, self._layout = path, layout
        self._record: list[str] = []  # the lines of the row that is being parsed
        # Strict, because otherwise a quotation mark that is never closed would swallow the rest of the file.
        self._reader = csv.reader(
            self._recorded(file), delimiter=layout.separator, strict=True, skipinitialspace=layout.spaced
        )
        header = next((row for _, row in numbered(self._reader, path, "header row") if row), [])
        # A header may begin with the # of a comment.
        self.header = [name.strip() if i else name.lstrip("# ").strip() for i, name in enumerate(header)]
        self._record.clear()

    def rows(self) -> Iterator[tuple[int, list[str], str]]:
        """Yield each row that is not blank with its number and, if it was parsed otherwise than it reads, the fault."""
        for number, row in numbered(self._reader, self._path, "row"):
            fault = not self._layout.spaced and has_spaced_quotes(self._record, [row], self._layout.separator)
            self._record.clear()
            if row:
                yield number, row, "a space before a quotation mark" if fault else ""

    def _recorded(self, file: Iterator[str]) -> Iterator[str]:
        for line in file:
            self._record.append(line)
            yield line


def _schema(path: Path, header: list[str]) -> Schema | None:
    """Return the schema of conversations or preferences by the header; None if the file has documents.

    Raises:
        UserError: two of the schema's columns have the same name.
    """
    names = [name.lower() for name in header]
    schema = schema_in(names, ())
    if schema and (twice := next((name for name in names if name in COLUMNS and names.count(name) > 1), "")):
        raise UserError(f"{path} has {names.count(twice)} columns called {twice!r}: rename all but one.")
    return schema


def _misfit(row: list[str], columns: int, index: int) -> str:
    """Return why a row does not fit the header, or ""."""
    if any(field.strip() for field in row[columns:]):
        return "more fields than the header"
    # A line break without quotation marks cuts a row in two, and the rest of a text may then be in another column. A
    # row of one field can hold nothing but the text if that is the first column.
    if len(row) < columns and (index > 0 or len(row) > 1):
        return "too few fields"
    return ""
