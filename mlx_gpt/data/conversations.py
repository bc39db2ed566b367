"""Reads conversations from rows of several schemas, and gives all of them one form."""

from collections.abc import Mapping, Sequence
from typing import Any

from mlx_gpt.data.rows import RowError, normalise
from mlx_gpt.errors import is_utf8

Message = dict[str, str]
"""A message with the keys "role" ("system", "user" or "assistant") and "content"."""

Conversation = list[Message]
"""Messages: perhaps one from the system, then the user and the assistant in turn, with the assistant last."""

ROLES = (
    dict.fromkeys(("system", "developer"), "system")
    | dict.fromkeys(("user", "human", "prompter"), "user")
    | dict.fromkeys(("assistant", "gpt", "chatgpt", "model", "bot", "chatbot", "ai", "bing", "bard"), "assistant")
)
TOOLS = ("tool", "function", "function_call", "function_response", "observation", "ipython")
CALLS = ("tool_calls", "function_call")
# Rows with a value in these columns are dropped: without it, they would be other conversations.
UNREAD = ("tools", "functions", "history", "images", "image", "videos", "video", "audios", "audio")
INPUTS = ("input", "context")  # the column's text is put below the question


def read_conversation(fields: Mapping[str, Any], schema: Sequence[str]) -> Conversation:
    """Return the conversation of a row. Its last message may be a question without an answer.

    Args:
        fields: the row's values by the names of their columns, in small letters, without nulls.
        schema: the column of messages, or the columns of the question and the answer.

    Raises:
        RowError: the row has no sound conversation.
    """
    check_columns(fields, schema)
    if len(schema) == 1:
        messages = read_messages(fields[schema[0]], schema[0])
    else:
        question, answer = schema
        messages = read_turns(fields, question, "user")
        messages[-1]["content"] += _input(fields)
        messages += read_turns(fields, answer, "assistant")
    return checked(with_system(fields, messages))


def check_columns(fields: Mapping[str, Any], needed: Sequence[str]) -> None:
    """Check that a row has the columns that it needs, and nothing that cannot be read.

    Raises:
        RowError: a column is missing, or the row has tools, images or the like.
    """
    for name in needed:
        if name not in fields:
            raise RowError(f"no `{name}`")
    for name in UNREAD:
        if fields.get(name):
            raise RowError(f"a column `{name}`, which is not supported")


def read_turns(fields: Mapping[str, Any], name: str, role: str) -> Conversation:
    """Return the messages in a column, which holds a text by this role, a message or a list of messages.

    Raises:
        RowError: the column holds something else.
    """
    value = fields[name]
    if isinstance(value, str):
        return [{"role": role, "content": normalise(value)}]
    return read_messages([value] if isinstance(value, dict) else value, name, "neither a text nor a list of messages")


def read_messages(value: Any, name: str, fault: str = "not a list of messages") -> Conversation:
    """Return messages with the roles and keys of `Message`, without an empty system message.

    Args:
        value: the list, with `role` and `content`, or `from` and `value`, in each message.
        name: the list's column.
        fault: the reason to give for a value that is not a list.

    Raises:
        RowError: the value is not such a list, or a message has an unknown role or a content that is not text.
    """
    if not isinstance(value, list) or not all(isinstance(item, dict) for item in value):
        raise RowError(f"`{name}` is {fault}")
    messages = [_message(item) for item in value]
    if messages and messages[0]["role"] == "system" and not messages[0]["content"].strip():
        messages = messages[1:]
    if not messages:
        raise RowError(f"`{name}` is empty")
    return messages


def checked(messages: Conversation) -> Conversation:
    """Return the messages, after checking their order, and that no answered message and no answer is empty.

    Raises:
        RowError: the messages are not a conversation.
    """
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if any(message["role"] != ("user", "assistant")[number % 2] for number, message in enumerate(turns)):
        raise RowError("roles out of order")
    for number, message in enumerate(turns[: len(turns) // 2 * 2]):
        if not message["content"].strip():
            raise RowError("an empty answer" if number % 2 else "an empty question")
    if len(turns) < 2:
        raise RowError("no answer")
    if not all(is_utf8(message["content"]) for message in messages):
        raise RowError("not valid Unicode")
    return messages


def with_system(fields: Mapping[str, Any], messages: Conversation) -> Conversation:
    """Return the messages, after the system message from the row's column `system` if it has one.

    Raises:
        RowError: the column holds something other than text.
    """
    content = fields.get("system", "")
    if not isinstance(content, str):
        raise RowError("`system` is not a text")
    found = {"role": "system", "content": normalise(content)}
    return [found, *messages] if content.strip() and found not in messages[:1] else messages


def _input(fields: Mapping[str, Any]) -> str:
    """Return what is put below the question.

    Raises:
        RowError: a column holds something other than text, or it is not clear which column belongs there.
    """
    given = {name: fields[name] for name in INPUTS if fields.get(name)}
    for name, content in given.items():
        if not isinstance(content, str):
            raise RowError(f"`{name}` is not a text")
    found = [content for content in given.values() if content.strip()]
    if len(found) > 1:
        raise RowError(f"a text in both `{INPUTS[0]}` and `{INPUTS[1]}`")
    return f"\n\n{normalise(found[0])}" if found else ""


def _message(item: Mapping[str, Any]) -> Message:
    """Return a message in the form of `Message`. A key whose value is null counts as missing."""
    role = item.get("role") or item.get("from")
    if not isinstance(role, str):
        raise RowError("a message without a role")
    role = role.strip().lower()
    if role in TOOLS or any(item.get(name) for name in CALLS):
        raise RowError("a call of a tool")
    if role not in ROLES:
        raise RowError("an unknown role")
    if item.get("weight") == 0:
        raise RowError("a message with the weight 0")
    content = item["content"] if item.get("content") is not None else item.get("value")
    if content is None:
        raise RowError("a message without content")
    content = "".join(map(_part, content)) if isinstance(content, list) else content
    if not isinstance(content, str):
        raise RowError("a message whose content is not a text")
    return {"role": ROLES[role], "content": normalise(content)}


def _part(part: Any) -> str:
    """Return the text of one part of a content that is a list."""
    text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else part
    if not isinstance(text, str):
        raise RowError("an image or another part that is not text")
    return text
