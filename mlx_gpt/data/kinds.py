"""The kinds of corpora: documents, conversations and preferences. Decides the kind of a corpus with mixed rows."""

from collections import Counter
from typing import Any

from mlx_gpt.errors import UserError

KINDS = ("documents", "conversations", "preferences")
CLEAR = 0.9  # a corpus has the kind that at least this fraction of its rows have


def kind_of(row: object) -> str:
    """Return the kind of the corpora that have such rows."""
    return "documents" if isinstance(row, str) else "conversations" if isinstance(row, list) else "preferences"


def one_of(kind: str) -> str:
    """Return the word for one row of a corpus of this kind."""
    return kind.removesuffix("s")


def noun(count: int, kind: str) -> str:
    """Return the word for this many rows of a kind, such as "document" for 1."""
    return one_of(kind) if count == 1 else kind


def counted(count: int, kind: str) -> str:
    """Return a number of rows of a kind in words, such as "1 document" or "1,000 documents"."""
    return f"{count:,} {noun(count, kind)}"


def misplaced(found: str, wanted: str) -> str:
    """Return why rows of the kind `found` are dropped from a corpus of the kind `wanted`."""
    return f"{found} among {wanted}"


def to_json(row: Any) -> dict[str, Any]:
    """Return a row as the JSON object in a prepared file."""
    return {"text": row} if isinstance(row, str) else {"messages": row} if isinstance(row, list) else row


def from_json(written: dict[str, Any]) -> Any:
    """Return the row from an object that `to_json` made."""
    return written.get("text", written.get("messages", written))


def characters(row: Any) -> int:
    """Return the number of characters in a row."""
    if isinstance(row, str):
        return len(row)
    messages = row if isinstance(row, list) else [message for part in row.values() for message in part]
    return sum(len(message["content"]) for message in messages)


def turns(row: Any) -> int:
    """Return the number of messages by the user and the assistant in a conversation; 0 for rows of other kinds."""
    return sum(message["role"] != "system" for message in row) if isinstance(row, list) else 0


class Kinds:
    """Counts the rows of each kind, and keeps the place of the first row of each kind."""

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
        """Return the kind of at least nine rows in ten, or documents if there are no rows.

        Raises:
            UserError: no kind is so frequent.
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
