"""Tell how a CSV file is laid out from its first lines: where its header is, and what separates its fields."""

import csv
import io
import re
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mlx_gpt.data.decoding import pieces
from mlx_gpt.data.rows import SAMPLE, named_column

SEPARATORS = ("\t", "|", ";", ",")  # beginning with the one that occurs least in prose
BLANK = "".join(SEPARATORS) + " \r\n"  # a spreadsheet exports a blank row as separators alone
NO_SEPARATOR = "\uffff"  # Unicode has no character of this number


@dataclass(frozen=True)
class Layout:
    """How a CSV file is laid out.

    Attributes:
        above: the number of lines above the header: blank ones, comments and Excel's `sep=;`.
        separator: what separates the fields; `NO_SEPARATOR` if the header has one name alone.
        spaced: whether there are spaces between separators and quotation marks, which are then no part of a field.
    """

    above: int
    separator: str
    spaced: bool


def layout_of(path: Path, column: str, *, tabs: bool) -> Layout:
    """Return the layout of a file whose text is in the column `column`, where the user names one.

    Tabs are preferred as separators if `tabs` says so.
    """
    head = _head(path)
    above, separator = _above_the_header(head, column)
    head = head[above:]
    separator = separator or _separator(head, column, tabs)
    return Layout(above, separator, has_spaced_quotes(head, _parsed(head, separator), separator))


def has_spaced_quotes(record: list[str], rows: list[list[str]], separator: str) -> bool:
    """Return whether lines have a field with a space before its quotation marks, which did not count in `rows`."""
    if not any(' "' in line for line in record):
        return False
    others = csv.reader(record, delimiter=separator, skipinitialspace=True)
    before, after = (
        sum(field.startswith(" ") and field.lstrip(" ").startswith('"') for row in some for field in row)
        for some in (rows, islice(others, SAMPLE))
    )
    return before > after


def _head(path: Path) -> list[str]:
    """Return the first lines of a file, as far as they can be decoded."""
    try:
        return list(io.StringIO(next(pieces(path), ""), newline=""))
    except UnicodeDecodeError:  # in the first byte; reading the file reports it
        return []


def _above_the_header(head: list[str], column: str) -> tuple[int, str]:
    """Return the number of lines above the header, and the separator if one of them says it, as Excel's `sep=;`."""
    separator = ""
    for number, line in enumerate(head):
        if found := re.fullmatch(r"sep=([,;|\t])\s*", line):
            separator = found[1]
        elif line.strip(BLANK) and not (line.startswith("#") and _is_comment(head[number:], column)):
            return number, separator
    return 0, ""


def _is_comment(head: list[str], column: str) -> bool:
    """Return whether a first line that begins with # is a comment, and not a header whose first name begins so."""
    separator = _separator(head, column, tabs=False)
    names = [name.strip() for name in _parsed(head[:1], separator)[0]]
    below = next((line for line in head[1:] if line.strip() and not line.startswith("#")), "")
    if named_column([name.lstrip("#").strip() for name in names], column):
        return False
    if any(named_column([name.strip() for name in row], column) for row in _parsed([below], separator)):
        return True
    # `# made by me, 2024` is a comment and `#id,title` is not, although both may have the fields of a table.
    fields = len(next(iter(_parsed([below], separator)), []))
    return len(names) == 1 or len(names) != fields or head[0].startswith("# ")


def _separator(head: list[str], column: str, tabs: bool) -> str:
    """Return the separator of the columns' names, or `NO_SEPARATOR` if the header has one name alone.

    If there are several, it is the one that gives the name that is looked for, or else the one by which most rows have
    as many fields as the header.
    """
    best, found = (False, 0.0, 0), NO_SEPARATOR
    for separator in SEPARATORS:
        rows = _parsed(head, separator)
        names = len(rows[0]) if rows else 0
        if names < 2:
            continue
        if tabs and separator == "\t":
            return separator
        fitting = sum(len(row) == names for row in rows[1:]) / max(1, len(rows) - 1)
        score = (bool(named_column([name.strip() for name in rows[0]], column)), fitting, names)
        if score > best:
            best, found = score, separator
    return found


def _parsed(head: list[str], separator: str) -> list[list[str]]:
    """Return the first rows by this separator, without the blank ones."""
    return [row for row in islice(csv.reader(head, delimiter=separator), SAMPLE) if row]
