"""Helpers for rows of CSV, JSON and Parquet: they find the text column, count dropped rows and normalise text."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mlx_gpt.errors import UserError, shown

SAMPLE = 100  # rows that are read to find the text column
LONG = 40  # characters: labels, ids and UUIDs (36) are shorter on average, prose is longer


class RowError(ValueError):
    """A row cannot be used. The message is a short reason, so that rows can be counted by reason."""


@dataclass(frozen=True)
class Dropped:
    """Takes the place of a document, conversation or preference for a row without a usable one.

    Attributes:
        reason: a short reason, so that rows can be counted by reason.
        place: the file and the row or line, for people.
    """

    reason: str
    place: str = field(default="", compare=False)


class DroppedPart(Dropped):
    """A part of a row that is dropped. The rest of the row comes after it."""


class Drops:
    """Counts dropped rows by reason, and keeps the place of the first row for each reason.

    Attributes:
        counts: the number of rows, by reason.
        first: the place of the first row, by reason, if it is known.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, reason: str, place: str = "", count: int = 1) -> None:
        """Count one row, or several rows, the first of which is at `place`."""
        self.counts[reason] += count
        if place:
            self.first.setdefault(reason, place)


def normalise(text: str) -> str:
    """Return `text` with CRLF and lone CR replaced by LF, and every other character unchanged."""
    return text.replace("\r\n", "\n").replace("\r", "\n")


def text_column(
    path: Path,
    names: Sequence[str],
    values: Mapping[str, list[str]],
    wanted: str,
    nested: Collection[str] = (),
    rows: int = SAMPLE,
) -> str:
    """Return the name of the text column by the rule that `read_documents` states.

    Args:
        path: the table's file, for the message.
        names: all columns.
        values: the sampled values of each column that holds strings.
        wanted: the column that the user names, or "".
        nested: the columns that hold strings inside lists or objects.
        rows: the number of rows in the sample.

    Raises:
        UserError: no column fits, or several do.
    """
    name = named_column(names, wanted)
    if name and names.count(name) > 1:
        raise UserError(f"{path} has {names.count(name)} columns called {shown(name)!r}: rename all but one.")
    if name and (name in values or name not in nested):
        return name
    columns = _listed(names)
    strings = [other for other in values if other not in nested]
    if name:
        raise UserError(f"{path} has lists or objects in its column {shown(name)!r}: write each text as one string.")
    if wanted:
        raise UserError(f"{path} has no column {wanted!r}: name one of its columns with --column ({columns}).")
    long = [name for name, found in values.items() if found and sum(map(len, found)) >= LONG * len(found)]
    # A short text beside lists or objects may be the title of what is in them. A lone object may be metadata, so a long
    # text in it may be the title of the whole file.
    for candidates in (long if rows > 1 else [],) if nested else (list(values), long):
        if len(candidates) == 1:
            return candidates[0]
    if nested:
        instead = f", or name one of the columns of strings with --column ({_listed(strings)})" if strings else ""
        raise UserError(
            f"{path} may have its texts in {_listed(list(nested))}, inside lists or objects: "
            f"write one object on each line, with a `text` or with `messages`{instead}."
        )
    raise UserError(
        f"It is not clear which column of {path} is the text: name it with --column NAME, one of {columns}."
    )


def named_column(names: Sequence[str], wanted: str) -> str:
    """Return the column that is called `wanted`, or `text` if that is "", in any capitals; "" if there is none."""
    name = wanted or "text"
    alike = [name] if name in names else [other for other in names if other.lower() == name.lower()]
    return alike[0] if len(set(alike)) == 1 else ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(shown(name, 43) for name in names[:20]) + (", ..." if len(names) > 20 else "")
