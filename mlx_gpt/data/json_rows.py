"""Read the rows of a JSON file, one at a time, however many are on a line."""

import json
import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from mlx_gpt.data.decoding import MAX_LINE, not_decoded
from mlx_gpt.data.rows import SAMPLE, Dropped, named_column, text_column
from mlx_gpt.data.schemas import Row, read_row, schema_of, usual_schema
from mlx_gpt.errors import UserError, shown

SPACE = re.compile(r"[ \t\r\n]*")
CUT_SHORT = 16  # characters: an error this near the end may come from a word or an escape that continues there


def read_json(path: Path, texts: Iterator[str], column: str) -> Iterator[tuple[Row, str]]:
    """Yield the rows of a JSON file, each with its place. `texts` are pieces of the file's text.

    Raises:
        UserError: as in `read_rows`.
    """
    rows = _rows(path, texts)
    sample = list(islice(rows, SAMPLE))
    rest = chain(sample, rows)
    if not column and (schema := usual_schema([row for _, row in sample])):
        yield from ((read_row(row, schema), _place(path, line)) for line, row in rest)
    else:
        yield from _documents(path, sample, rest, column)


def _documents(
    path: Path, sample: list[tuple[int, Any]], rows: Iterator[tuple[int, Any]], column: str
) -> Iterator[tuple[Row, str]]:
    """Yield the rows of a file that begins with documents."""
    objects = [row for _, row in sample if isinstance(row, dict) and (column or not schema_of(row))]
    wanted, known, sure = column, set[str](), False
    if objects:
        names = list(dict.fromkeys(chain.from_iterable(objects)))
        values = {name: [row[name] for row in objects if isinstance(row.get(name), str)] for name in names}
        values = {name: found for name, found in values.items() if found}
        nested = [name for name in names if any(_has_strings_inside(row.get(name)) for row in objects)]
        sure = bool(column) or bool(named_column(names, column))
        # A column that the user names may come after the sample, so only the end of the file shows that it does not.
        if not column or named_column(names, column):
            column = text_column(path, names, values, column, nested, len(sample))
        known = set(values)
    else:
        column, sure = column or "text", True
    seen = not objects
    for line, row in rows:
        place = _place(path, line)
        if not wanted and (schema := schema_of(row)):
            seen = True
            yield read_row(row, schema), place
            continue
        if isinstance(row, dict):
            if not sure and not known.issuperset(row):
                _refuse_new_columns(place, row, known, column)
            if column not in row:
                yield Dropped("column missing"), place
                continue
            seen = True
            row = row[column]
        yield row if isinstance(row, str) else Dropped("not a string"), place
    if not seen:
        text_column(path, names, values, wanted, nested, len(sample))


def _place(path: Path, line: int) -> str:
    return f"{path}, line {line:,}"


def _has_strings_inside(value: Any) -> bool:
    # Without recursion, because values can be as deep as Python's stack.
    inside = [value] if isinstance(value, dict | list) else []
    while inside:
        item = inside.pop()
        if isinstance(item, str):
            return True
        inside += item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
    return False


def _refuse_new_columns(place: str, row: dict[str, Any], known: set[str], column: str) -> None:
    """Refuse a row with a column of strings that the sample does not have, because it may be the text."""
    new = [name for name, value in row.items() if isinstance(value, str) and name not in known]
    if new:
        choice = f"--column {shown(new[0])}" + (f" or --column {shown(column)}" if column else "")
        raise UserError(
            f"{place} has a column {shown(new[0])!r}, which the first {SAMPLE} rows do not have: "
            f"name the column with the text, {choice}."
        )


def _rows(path: Path, texts: Iterator[str]) -> Iterator[tuple[int, Any]]:
    """Yield each row with its line: the elements if the file is one array, and otherwise its values."""
    scanner = _Scanner(path, texts)
    if scanner.peek() != "[":
        while scanner.peek():
            yield scanner.line, scanner.value()
        return
    scanner.skip()
    if scanner.peek() == "]":
        scanner.skip()
    else:
        mark = ","
        while mark == ",":
            scanner.peek()
            yield scanner.line, scanner.value()
            mark = scanner.peek()
            if mark not in (",", "]"):
                raise scanner.malformed("no comma between two values")
            scanner.skip()
    if scanner.peek():
        raise UserError(
            f"{path}, line {scanner.line:,} follows an array: write one object or one string on each line, "
            "or all of them in one array."
        )


class _Scanner:
    """Steps through JSON whose text arrives in pieces, and keeps no more of it than one value."""

    def __init__(self, path: Path, texts: Iterator[str]) -> None:
        self._path, self._texts = path, texts
        self._decode = json.JSONDecoder(object_pairs_hook=_object).raw_decode
        self._text = ""
        self._at = 0  # the next character
        self.line = 1  # its line

    def peek(self) -> str:
        """Return the next character that is not white space; "" at the end."""
        while True:
            self._move(SPACE.match(self._text, self._at).end())  # type: ignore[union-attr] # it matches everywhere
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._more():
                return ""

    def skip(self) -> None:
        """Move over the character that `peek` returned."""
        self._at += 1

    def value(self) -> Any:
        """Return the value that begins at the next character."""
        while True:
            try:
                value, end = self._decode(self._text, self._at)
            except json.JSONDecodeError as error:
                partial = "Unterminated string" in error.msg or error.pos >= len(self._text) - CUT_SHORT
                if not partial or not self._more():
                    raise self.malformed(error.msg) from error
                continue
            except (ValueError, RecursionError) as error:
                raise self.malformed(str(error)) from error
            # A number may continue in the next piece; everything else shows its own end.
            if end == len(self._text) and isinstance(value, int | float) and self._more():
                continue
            self._move(end)
            return value

    def malformed(self, why: str) -> UserError:
        """Return the sentence about what is at the next character."""
        return UserError(
            f"{self._path}, line {self.line:,} is not valid JSON ({why}): write one object or one string on each line, "
            "or all of them in one array."
        )

    def _move(self, end: int) -> None:
        self.line += self._text.count("\n", self._at, end)
        self._at = end

    def _more(self) -> bool:
        """Drop what was read, and add at least as much as is left, so that a long value is decoded only a few times."""
        left = self._text[self._at :]
        if len(left) > MAX_LINE:
            raise UserError(
                f"{self._path}, line {self.line:,} has a value of over {MAX_LINE // 10**6:,} million characters: "
                "break it into shorter ones."
            )
        parts, size = [left], 0
        try:
            for text in self._texts:
                parts.append(text)
                size += len(text)
                if size >= len(left):
                    break
        except UnicodeDecodeError as error:
            line = self.line + sum(part.count("\n") for part in parts)
            raise not_decoded(f"{self._path}, line {line:,}", error) from error
        self._text, self._at = "".join(parts), 0
        return size > 0


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object, unless it has a name twice: `json` would keep the last value and lose the others."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has one name twice")
    return found
