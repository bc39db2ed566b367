"""Reads preferences from rows: a prompt with two answers, one chosen and one rejected."""

from collections.abc import Mapping
from typing import Any

from mlx_gpt.data.conversations import Conversation, check_columns, checked, read_turns, with_system
from mlx_gpt.data.rows import RowError

Preference = dict[str, Conversation]
"""The messages of the "prompt", and of the two answers, "chosen" and "rejected". None of the three is empty."""


def read_preference(fields: Mapping[str, Any]) -> Preference:
    """Return the preference of a row with `chosen`, `rejected` and perhaps `prompt`.

    Without `prompt`, the messages with which both answers begin are the prompt.

    Args:
        fields: as in `read_conversation`.

    Raises:
        RowError: the row has no sound preference.
    """
    check_columns(fields, ("chosen", "rejected"))
    chosen, rejected = (read_turns(fields, name, "assistant") for name in ("chosen", "rejected"))
    prompt = read_turns(fields, "prompt", "user") if "prompt" in fields else []
    if not prompt and chosen[0]["role"] == "assistant":
        raise RowError("no `prompt`")
    if chosen == rejected:
        raise RowError("`chosen` and `rejected` are alike")
    if chosen[0]["role"] != "assistant":
        shared = _shared(chosen, rejected)
        if not shared or any(message not in shared for message in prompt):
            raise RowError("`chosen` and `rejected` have different prompts")
        prompt, chosen, rejected = shared, chosen[len(shared) :], rejected[len(shared) :]
    prompt = with_system(fields, prompt)
    for answer in (chosen, rejected):
        if checked([*prompt, *answer])[-1]["role"] == "user" or not answer:
            raise RowError("no answer")
    if prompt[-1]["role"] != "user":
        raise RowError("a prompt that does not end with the user")
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def _shared(chosen: Conversation, rejected: Conversation) -> Conversation:
    """Return the messages with which both lists begin."""
    pairs = list(zip(chosen, rejected, strict=False))
    return chosen[: next((number for number, (one, other) in enumerate(pairs) if one != other), len(pairs))]
