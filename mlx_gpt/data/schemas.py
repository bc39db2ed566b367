"""Decides by a row's columns whether the row is a document, a conversation or a preference."""

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

from mlx_gpt.data.conversations import INPUTS, UNREAD, Conversation, read_conversation
from mlx_gpt.data.preferences import Preference, read_preference
from mlx_gpt.data.rows import Dropped, RowError

Row = str | Conversation | Preference | Dropped

Schema = tuple[str, ...]
"""The columns by which a row is recognised as a conversation or a preference."""

# A column that is enough by itself must hold messages, because a column of strings with the same name may well be the
# text of documents.
SCHEMAS: tuple[Schema, ...] = (
    ("chosen", "rejected"),
    ("messages",),
    ("conversations",),
    ("conversation",),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("instruction", "output"),
    ("instruction", "response"),
)
KEYS = frozenset(schema[0] for schema in SCHEMAS)
COLUMNS = frozenset({"text", "prompt", "system", *INPUTS, *UNREAD, *(name for schema in SCHEMAS for name in schema)})


def schema_of(row: Any) -> Schema | None:
    """Return the columns that make a row a conversation or a preference; None if it is neither.

    A row with a text in a column `text` is a document, whatever its other columns are.
    """
    if not isinstance(row, dict) or KEYS.isdisjoint(map(str.lower, row)):
        return None
    fields = _fields(row)
    return None if _text(fields) else schema_in(fields, [name for name, value in fields.items() if _has_objects(value)])


def schema_in(names: Collection[str], lists: Collection[str]) -> Schema | None:
    """Return the schema of a table by the names of its columns, in small letters.

    Args:
        names: the names of all columns.
        lists: the names of the columns that hold lists of objects.
    """
    return next((each for each in SCHEMAS if set(each) <= set(lists if len(each) == 1 else names)), None)


def read_row(row: Any, expected: Schema) -> Row:
    """Return a row of a file, whose rows should have the schema `expected`, as what it is."""
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        return Dropped("not an object")
    fields = _fields(row)
    if text := _text(fields):
        return text
    schema = schema_of(row) or expected
    try:
        return read_preference(fields) if "chosen" in schema else read_conversation(fields, schema)
    except RowError as fault:
        return Dropped(str(fault))


def usual_schema(rows: Sequence[Any]) -> Schema | None:
    """Return the most frequent schema of these rows; None if fewer than half of the objects have one."""
    objects = [row for row in rows if isinstance(row, dict)]
    schemas = Counter(schema for row in objects if (schema := schema_of(row)))
    return schemas.most_common(1)[0][0] if schemas and 2 * schemas.total() >= len(objects) else None


def _fields(row: dict[str, Any]) -> dict[str, Any]:
    return {name.lower(): value for name, value in row.items() if value is not None}


def _text(fields: dict[str, Any]) -> str:
    text = fields.get("text")
    return text if isinstance(text, str) and text.strip() else ""


def _has_objects(value: Any) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)
