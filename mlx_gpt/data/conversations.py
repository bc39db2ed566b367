"""Reads conversations from prepared files, one at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

from mlx_gpt.data.decoding import ignore_bytes, pieces
from mlx_gpt.data.json_rows import _rows
from mlx_gpt.errors import UserError, os_errors_explained

Message: TypeAlias = dict[str, str]
"""Has the keys "role" ("system", "user" or "assistant") and "content"."""
Conversation: TypeAlias = list[Message]


def has_conversations(path: Path) -> bool:
    """Return whether the first row of a file is a conversation."""
    try:
        with os_errors_explained(f"read {path}"), path.open(encoding="utf-8") as file:
            return path.suffix == ".jsonl" and "messages" in json.loads(file.readline())
    except (ValueError, TypeError):
        return False


def read_conversations(path: Path) -> Iterator[Conversation]:
    """Yield the conversations of a file with rows {"messages": [...]}.

    Raises:
        UserError: the file cannot be read, or a row is not such a conversation.
    """
    with os_errors_explained(f"read {path}"):
        for line, row in _rows(path, pieces(path, ignore_bytes)):
            try:
                yield [{"role": message["role"], "content": message["content"]} for message in row["messages"]]
            except (TypeError, KeyError):
                raise UserError(f"{path}, line {line:,} is not a conversation: correct or remove it.") from None
