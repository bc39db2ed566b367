"""The kinds of corpora: documents, conversations and preferences, and which of them mixed rows are meant to be."""

from collections import Counter
from typing import Any

from mlx_gpt.errors import UserError

KINDS = ("documents", "conversations", "preferences")
CLEAR = 0.9  # of all rows: a kind with as many is the one that is meant


def kind_of(row: object) -> str:
    """Return the kind of a corpus in which this is a row."""
    return "documents" if isinstance(row, str) else "conversations" if isinstance(row, list) else "preferences"


def one_of(kind: str) -> str:
    """Return what one row of a corpus of this kind is called."""
    return kind.removesuffix("s")


def misplaced(found: str, wanted: str) -> str:
    """Return why rows of the kind `found` are dropped from a corpus of the kind `wanted`."""
    return f"{found} among {wanted}"


def to_json(row: Any) -> dict[str, Any]:
    """Return the object that a prepared file holds for a row."""
    return {"text": row} if isinstance(row, str) else {"messages": row} if isinstance(row, list) else row


def from_json(written: dict[str, Any]) -> Any:
    """Return the row of an object that `to_json` made."""
    return written.get("text", written.get("messages", written))


def characters(row: Any) -> int:
    """Return the length of all text in a row."""
    if isinstance(row, str):
        return len(row)
    messages = row if isinstance(row, list) else [message for part in row.values() for message in part]
    return sum(len(message["content"]) for message in messages)


def turns(row: Any) -> int:
    """Return how often the user or the assistant speaks in a conversation; 0 for rows of the other kinds."""
    return sum(message["role"] != "system" for message in row) if isinstance(row, list) else 0


class Kinds:
    """Counts the rows of each kind, with the place of the first of each."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.first: dict[str, str] = {}

    def add(self, row: object, place: str) -> str:
        """Count one row and return its kind."""
        kind = kind_of(row)
        self.counts[kind] += 1
        self.first.setdefault(kind, place)
        return kind

    def meant(self) -> str:
        """Return the kind that the corpus is meant to be, which nine rows in ten have; documents if there are none.

        Raises:
            UserError: no kind has as many.
        """
        kind, most = self.counts.most_common(1)[0] if self.counts else (KINDS[0], 0)
        if most >= CLEAR * self.counts.total():
            return kind
        (kind, most), (other, fewer) = self.counts.most_common(2)
        raise UserError(
            f"It is not clear whether these are {kind} or {other}: {most:,} rows are {kind} (first "
            f"{self.first[kind]}), {fewer:,} are {other} (first {self.first[other]}). Name files of one kind, or read "
            "one column of them as documents with --column."
        )
