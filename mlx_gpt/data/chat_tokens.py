"""Turns conversations into token ids in memory-mapped files.

The ids are exactly those of a conversation with the model: a prompt up to the place of the answer, then the answer. So
a conversation is encoded in *exchanges*, each a prompt (the messages before an answer) and the answer.

A file is one row of uint32. Its bits `ID` are the token, and the others mark what training needs to know about it.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_gpt.chat_template import ChatTemplate
from mlx_gpt.data.conversations import Conversation
from mlx_gpt.data.corpus import Corpus
from mlx_gpt.data.rows import Drops
from mlx_gpt.data.sources import hash_of
from mlx_gpt.data.tokens import Tokens, make_tokens, write_ids
from mlx_gpt.errors import UserError, printable
from mlx_gpt.progress import ByteProgress, Echo, ignore_line, ignore_progress
from mlx_gpt.tokenizer import Tokenizer

COUNTS = np.uint32(1 << 31)  # the token has a loss
BEGINS = np.uint32(1 << 30)  # it is the first of a conversation
CUT = np.uint32(1 << 29)  # a conversation that is too long may end before it
AT_ONCE = 1000  # conversations
REASONS = 10  # a template may write any
FORMAT_VERSION = 1  # a change of the marks has to make the files anew


class Exchange(NamedTuple):
    """A part of a conversation's text: what comes before an answer, and the answer with its end."""

    prompt: str
    answer: str


def tokenize_conversations(
    corpus: Corpus,
    tokenizer: Tokenizer,
    loss_on: str = "assistant",
    progress: ByteProgress = ignore_progress,
    echo: Echo = ignore_line,
) -> Tokens:
    """Encode a corpus of conversations, or open the files of an earlier call if nothing has changed since.

    Conversations that the template refuses, or in which no token counts, are left out; `echo` is called with their
    number. Each conversation ends with the end-of-text token.

    Args:
        loss_on: "assistant", so that only the answers and their ends count, or "all".

    Raises:
        UserError: the corpus cannot be read, was changed since it was opened, or has no conversation that can be used.
    """
    template = ChatTemplate.of(tokenizer)
    assert template is not None
    ends = [tokenizer.end_of_text, *sorted(tokenizer.ends)]
    chat = sorted(tokenizer.chat.items())
    fingerprint = hash_of(FORMAT_VERSION, corpus.fingerprint, tokenizer.to_json(), chat, ends, loss_on)[:16]

    def encode(split: str, path: Path, advance: Callable[[int], None]) -> None:
        drops = Drops()
        conversations = _counted(corpus.conversations(split, echo), advance)
        rows = _encoded(conversations, tokenizer, template, loss_on == "all", drops)
        length = write_ids(path, np.dtype(np.uint32), (row.tobytes() for row in rows))
        for reason, count in drops.counts.items():
            echo(printable(f"WARNING: left out {count:,} conversations: {reason}"))
        if not length:
            reason = next(iter(drops.counts), "there is none.")
            raise UserError(printable(f"No conversation of {corpus.path(split)} can be used: {reason}"))

    return make_tokens(corpus, fingerprint, encode, progress)


def _counted(conversations: Iterable[Conversation], advance: Callable[[int], None]) -> Iterator[Conversation]:
    """Yield conversations, calling `advance` with the characters so far."""
    characters = 0
    for conversation in conversations:
        yield conversation
        characters += sum(len(message["content"]) for message in conversation)
        advance(characters)


def exchanges(conversation: Conversation, template: ChatTemplate) -> list[list[Exchange]]:
    """Return the rows of exchanges that a conversation is trained on.

    It is one row if the text of each answer stays the same when the conversation continues. Some templates change
    earlier turns, for example by removing an earlier answer's reasoning. Their conversations give a row for each
    answer, which has the text before it as the model will see it then. What follows the last answer has none.

    Raises:
        UserError: the template refuses the messages, or writes an answer elsewhere than it asks for one.
    """
    row: list[Exchange] = []
    rows: list[list[Exchange]] = []
    done, grows = "", True
    for i, message in enumerate(conversation):
        if message["role"] == "assistant":
            before, after = template.text(conversation[:i]), template.text(conversation[: i + 1], answering=False)
            if not after.startswith(before):
                raise UserError("The model's chat template does not write an answer where it asks for one.")
            answer = after[len(before) :]
            rows.append([Exchange(before, answer)])
            if grows := grows and before.startswith(done):
                row.append(Exchange(before[len(done) :], answer))
            done = after
    whole = template.text(conversation, answering=False)
    if grows and whole.startswith(done) and whole != done:
        row.append(Exchange(whole[len(done) :], ""))
    return [row] if grows else rows


def _encoded(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, template: ChatTemplate, count_all: bool, drops: Drops
) -> Iterator[np.ndarray]:
    """Yield rows (tokens,) uint32 of marked ids."""
    ends = np.array(sorted(tokenizer.ends), np.uint32)
    rows = _divided(conversations, template, drops)
    while batch := list(itertools.islice(rows, AT_ONCE)):
        texts = [text for row in batch for prompt, answer in row for text in (prompt, prompt + answer, answer)]
        encoded = iter(tokenizer.encode_batch(texts, special=True))
        for row in batch:
            parts: list[np.ndarray] = []
            for _ in row:
                prompt, both, answer = next(encoded), next(encoded), next(encoded)
                if both[: len(prompt)] == prompt:  # or the two would share a token
                    answer = both[len(prompt) :]
                parts += _marked(prompt, answer, ends, count_all)
            end = np.array([tokenizer.end_of_text], np.uint32) | CUT
            tokens = np.concatenate([*parts, end | COUNTS if count_all else end])
            tokens[0] = (tokens[0] & ~COUNTS) | BEGINS | CUT
            if np.any(tokens & COUNTS):
                yield tokens
            else:
                drops.add("the template writes no answer.")


def _divided(conversations: Iterable[Conversation], template: ChatTemplate, drops: Drops) -> Iterator[list[Exchange]]:
    """Yield the rows of exchanges of all conversations that the template does not refuse."""
    for conversation in conversations:
        try:
            yield from exchanges(conversation, template)
        except UserError as error:
            reason = str(error)
            drops.add(reason if reason in drops.counts or len(drops.counts) < REASONS else "other reasons.")


def _marked(prompt: list[int], answer: list[int], ends: np.ndarray, count_all: bool) -> list[np.ndarray]:
    """Return the ids of an exchange with their marks: an answer counts up to its first end, and with that."""
    before, after = np.array(prompt, np.uint32), np.array(answer, np.uint32)
    found = np.flatnonzero(np.isin(after, ends))
    end = int(found[0]) + 1 if len(found) else len(after)
    if count_all:
        before, after = before | COUNTS, after | COUNTS
    else:
        after[:end] |= COUNTS
    before[:1] |= CUT
    after[end : end + 1] |= CUT
    return [before, after]
