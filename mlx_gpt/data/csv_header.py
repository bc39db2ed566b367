"""Find the text column of a CSV file by its header, after checking that the first row is one."""

import re
from pathlib import Path

from mlx_gpt.data.csv_layout import SEPARATORS
from mlx_gpt.data.rows import LONG, named_column, text_column
from mlx_gpt.errors import UserError, shown

SENTENCE = re.compile(r"[.,;!?](\s|$)")  # a mark of a sentence, which few names have
TITLES = 10  # rows below the first one that may still be above the header
NUMBER = re.compile(r"[-+]?\d*[.,]?\d+")


def text_index(path: Path, header: list[str], sample: list[list[str]], column: str) -> int:
    """Return the index of the text column.

    Args:
        path: the file, for the message.
        header: the cells of the first row, stripped.
        sample: the first rows below it.
        column: the column that the user names, or "".

    Raises:
        UserError: the first row is no header, no column fits, or several do.
    """
    if not sample:
        raise UserError(f"{path} has no rows under its first one: give it a header, such as `text`, and rows.")
    named = named_column(header, column)
    if not column and not named and any(map(_is_data, header)):
        raise UserError(
            f"{path} has no header: add a first row with the columns' names, with `text` for the one to read."
        )
    cells = [[row[i] for row in sample if i < len(row)] for i in range(len(header))]
    # A spreadsheet exports empty columns at the right of the table, and has no name for them.
    used = [i for i, name in enumerate(header) if name or any(cell.strip() for cell in cells[i])]
    if not named:
        if len(header) == 1:
            _refuse_several_fields(path, cells[0])
        _refuse_title(path, [header[i] for i in used], [cells[i] for i in used], sample, column)
    # Each column needs a name of its own here, or one would take the place of another.
    names = [
        name if name and (name == named or header.count(name) == 1) else f"{name} (column {i + 1})".strip()
        for i, name in enumerate(header)
    ]
    index = names.index(text_column(path, [names[i] for i in used], {names[i]: cells[i] for i in used}, column))
    name = header[index]
    like_the_rows = any(cell and cell in cells[i] for i, cell in enumerate(header))
    if not named and (like_the_rows or len(name) >= LONG or SENTENCE.search(name)):
        raise UserError(
            f"{path} may have no header, because its first row is like the others: add one that names the columns, "
            "or name the column with --column."
        )
    if not name and not column:
        raise UserError(
            f"{path} has its text in column {index + 1}, which has no name in the first row: name it `text` there."
        )
    return index


def _refuse_several_fields(path: Path, cells: list[str]) -> None:
    """Refuse lines that seem to have several fields each, under a first row that has one."""
    for separator in SEPARATORS:
        counts = {cell.count(separator) for cell in cells}
        if len(cells) > 1 and len(counts) == 1 and counts != {0}:
            raise UserError(
                f"{path} has one name in its first row, but several fields in the others: "
                "begin with a row that names all columns, with `text` for the one to read."
            )


def _refuse_title(path: Path, header: list[str], cells: list[list[str]], sample: list[list[str]], column: str) -> None:
    """Refuse a first row that may be a title above the header, in a table without a column of the name looked for.

    Args:
        path: the file, for the message.
        header: the first row, without the columns that are empty.
        cells: the values of each of these columns.
        sample: the first rows below.
        column: as in `text_index`.
    """
    names = [name for name in header if name]
    if len(names) == len(header) > 1:
        return  # a title would leave some of the columns blank
    for number, row in enumerate(sample[:TITLES], 1):
        if _is_header(row, sample[number:], column):
            found = shown(", ".join(cell.strip() for cell in row if cell.strip()))
            raise UserError(
                f"{path} has a title above its header ({found}): remove the lines above the header, or name a column "
                "of the first row with --column."
            )
    if len(names) == 1 < len(header):
        # Programs write the number of each row first, in a column without a name.
        numbered = len(header) == 2 and not header[0] and all(NUMBER.fullmatch(cell.strip()) for cell in cells[0])
        if not numbered:
            raise UserError(
                f"{path} has {len(header)} columns, but its first row names only {shown(names[0], 43)!r}. If that row "
                "is a title, remove it. Otherwise name every column in it, and call the column to read `text`."
            )


def _is_header(row: list[str], below: list[list[str]], column: str) -> bool:
    """Return whether a row has the name that is looked for, or a word above numbers, and no number itself."""
    row = [cell.strip() for cell in row]
    if any(map(_is_data, row)):
        return False
    return bool(named_column(row, column)) or any(cell and _are_numbers(below, i) for i, cell in enumerate(row))


def _are_numbers(rows: list[list[str]], index: int) -> bool:
    """Return whether several rows have something in a column, and all of these have a number there."""
    cells = [cell for row in rows for cell in row[index : index + 1] if cell.strip()]
    return len(cells) > 1 and all(NUMBER.fullmatch(cell.strip()) for cell in cells)


def _is_data(cell: str) -> bool:
    """Return whether a cell of the first row is more likely a value (a number or prose) than a column's name."""
    return len(cell) > 100 or "\n" in cell or NUMBER.fullmatch(cell) is not None
