"""Turns conversations into token ids in memory-mapped files.

Training sees the ids that the model will see in a real conversation: the whole prompt, encoded at once, and then the
answer. Only a date that the template writes differs, because training uses a fixed one.

A file is one row of uint32. The bits `ID` of a number are a token, and the other bits are marks for training.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mlx_gpt.chat_template import ChatTemplate
from mlx_gpt.data.conversations import Conversation
from mlx_gpt.data.corpus import Corpus, usable
from mlx_gpt.data.documents import read_kind
from mlx_gpt.data.rows import Drops
from mlx_gpt.data.sources import find_files, hash_of
from mlx_gpt.data.tokens import ID, Tokens, make_tokens, write_ids
from mlx_gpt.errors import UserError, printable
from mlx_gpt.progress import ByteProgress, Echo, ignore_line, ignore_progress
from mlx_gpt.tokenizer import Encoded, Tokenizer

COUNTS = np.uint32(1 << 31)  # the token counts in the loss
BEGINS = np.uint32(1 << 30)  # the token begins an example: a conversation, or a part of one (see `transcripts`)
MAY_END = np.uint32(1 << 29)  # an example that is too long may be cut before the token
NEW = np.uint32(1 << 28)  # the example that begins here is the first of its conversation
AT_ONCE = 200  # conversations
# For templates that write today's date: with the real one, a run could not be resumed the next day.
WRITTEN = datetime(2026, 1, 1)
MARK = "\N{OBJECT REPLACEMENT CHARACTER}" * 3  # takes the place of a message
REASONS = 10  # further reasons are counted together, because a template can word each refusal differently
FORMAT_VERSION = 4  # raise it when the ids or their marks change, so that the files are made again


class Transcript(NamedTuple):
    """The text that the template makes from a conversation.

    Attributes:
        answers: the span of each answer with its end, in characters.
        new: where the newest question begins; 0 in the first transcript of a conversation.
    """

    text: str
    answers: list[tuple[int, int]]
    new: int = 0


def tokenize_conversations(
    corpus: Corpus,
    tokenizer: Tokenizer,
    loss_on: str = "assistant",
    progress: ByteProgress = ignore_progress,
    echo: Echo = ignore_line,
) -> Tokens:
    """Encode a corpus of conversations, or open the files of an earlier call if nothing has changed since.

    Conversations that the template refuses, and examples in which no token counts, are left out; `echo` is called with
    their number. Each example ends with the end-of-text token.

    Args:
        loss_on: "assistant" if only the answers and their ends count, or "all". If the template does not end an answer
            with a token, the end-of-text token after the last answer counts as its end.

    Raises:
        UserError: the corpus cannot be read, was changed since it was opened, or has no conversation that can be used.
    """
    ends = [tokenizer.end_of_text, *sorted(tokenizer.ends)]
    chat = sorted(tokenizer.chat.items())
    fingerprint = hash_of(FORMAT_VERSION, corpus.fingerprint, tokenizer.to_json(), chat, ends, loss_on)[:16]

    def encode(split: str, path: Path, advance: Callable[[int], None]) -> None:
        conversations = _counted(corpus.conversations(split, echo), advance)
        _encode(conversations, corpus.path(split), tokenizer, loss_on, path, echo)

    return make_tokens(corpus, fingerprint, encode, progress)


def encode_conversations(
    path: Path, tokenizer: Tokenizer, folder: Path, loss_on: str = "assistant", echo: Echo = ignore_line
) -> np.ndarray:
    """Return the marked tokens (tokens,) uint32 of a file of conversations, or of a folder of such files.

    Args:
        folder: the folder for the file that the tokens are memory-mapped from.
        loss_on: as in `tokenize_conversations`.
        echo: called with a line for each reason why rows are left out.

    Raises:
        UserError: a file cannot be read, or has no conversation that can be used.
    """
    files, _ = find_files([path])
    conversations = usable((row for file in files for row in read_kind(file, "conversations")), echo)
    target = folder / "tokens.npy"
    _encode(conversations, path, tokenizer, loss_on, target, echo)
    tokens: np.ndarray = np.load(target, mmap_mode="r")
    return tokens


def _encode(
    conversations: Iterable[Conversation], source: Path, tokenizer: Tokenizer, loss_on: str, target: Path, echo: Echo
) -> None:
    """Write the marked tokens of conversations from `source` to the file `target`."""
    template, drops = ChatTemplate.of(tokenizer, now=lambda: WRITTEN), Drops()
    assert template is not None
    rows = _encoded(conversations, tokenizer, template, loss_on == "all", drops)
    length = write_ids(target, np.dtype(np.uint32), (row.tobytes() for row in rows))
    for reason, count in drops.counts.items():
        echo(printable(f"WARNING: left out {count:,} conversations: {reason}"))
    if not length:
        reason = next(iter(drops.counts), "there is none.")
        raise UserError(printable(f"No conversation of {source} can be used: {reason}"))


def _counted(conversations: Iterable[Conversation], advance: Callable[[int], None]) -> Iterator[Conversation]:
    """Yield conversations, and call `advance` with the number of characters so far."""
    characters = 0
    for conversation in conversations:
        yield conversation
        characters += sum(len(message["content"]) for message in conversation)
        advance(characters)


def transcripts(conversation: Conversation, template: ChatTemplate) -> list[Transcript]:
    """Return the texts to train on for a conversation, which ends with an answer.

    Usually this is one text. Some templates change earlier turns when the conversation continues, for example by
    removing the reasoning from an earlier answer. Then each answer gets a text of its own, so that the model sees the
    same text before the answer as it will when it is used.

    Raises:
        UserError: the template refuses the messages, or does not write an answer where it asks for one.
    """
    separate: list[Transcript] = []
    prompts: list[Conversation] = []
    done, grows = "", True
    for i, message in enumerate(conversation):
        if message["role"] == "assistant":
            before = template.text(conversation[:i])
            after = before + _answer(conversation[: i + 1], before, template)
            separate.append(Transcript(after, [(len(before), len(after))]))
            prompts.append(conversation[:i])
            grows = grows and before.startswith(done)
            done = after
    if grows:
        return [Transcript(done, [span for transcript in separate for span in transcript.answers])]
    return [
        transcript._replace(new=_place_of_question(prompt, transcript, template)) if number else transcript
        for number, (prompt, transcript) in enumerate(zip(prompts, separate, strict=True))
    ]


def _place_of_question(prompt: Conversation, transcript: Transcript, template: ChatTemplate) -> int:
    """Return where the last message of a prompt begins in its transcript; if it is not there, where the answer does."""
    *others, last = prompt
    try:
        place = template.text([*others, {**last, "content": MARK}]).find(MARK)
    except UserError:
        place = -1
    return transcript.answers[0][0] if place < 0 else place


def _answer(conversation: Conversation, before: str, template: ChatTemplate) -> str:
    """Return what the template writes for the last message of a conversation after the text `before`, its prompt."""
    after = template.text(conversation, answering=False)
    if after.startswith(before):
        return after[len(before) :]
    # Mistral's templates put the system message into the last message if that is the user's; if not, they leave it out.
    turns = [message for message in conversation if message["role"] != "system"]
    if len(turns) < len(conversation):
        before, after = template.text(turns[:-1]), template.text(turns, answering=False)
        if after.startswith(before):
            return after[len(before) :]
    raise UserError(
        "The model's chat template does not put an answer right after its generation prompt, so mlx-gpt can't train on "
        "it: use a model with another template."
    )


def _encoded(
    conversations: Iterable[Conversation], tokenizer: Tokenizer, template: ChatTemplate, count_all: bool, drops: Drops
) -> Iterator[np.ndarray]:
    """Yield rows (tokens,) uint32 of marked ids."""
    ends = np.array(sorted(tokenizer.ends), np.uint32)
    dividing = tokenizer.dividing_ids()
    end_of_text = np.array([tokenizer.end_of_text], np.uint32) | MAY_END
    written = _written(conversations, template, drops)
    while batch := list(itertools.islice(written, AT_ONCE)):
        encoded = tokenizer.encode_with_places([transcript.text for transcript in batch])
        heads = [_heads(*pair, dividing) for pair in zip(batch, encoded, strict=True)]
        again = iter(tokenizer.encode_batch([text for found in heads for _, text in found], special=True))
        for transcript, whole, found in zip(batch, encoded, heads, strict=True):
            prompts = [np.append(whole.ids[:kept], np.array(next(again), np.uint32)) for kept, _ in found]
            try:
                rows = _marked(transcript, whole, prompts, tokenizer, ends, count_all)
            except UserError as error:
                drops.add(str(error))
                continue
            for number, row in enumerate(rows):
                unended = row[-1] & COUNTS and row[-1] & ID not in ends
                row = np.append(row, end_of_text | (COUNTS if unended or count_all else np.uint32(0)))
                row[0] = (row[0] & ~COUNTS) | BEGINS | MAY_END | (np.uint32(0) if number or transcript.new else NEW)
                yield row


def _heads(transcript: Transcript, whole: Encoded, dividing: Sequence[int]) -> list[tuple[int, str]]:
    """Return two things for each answer: how many ids its prompt shares with the whole text, and the rest as text.

    The tokenizer encodes the text before and after each of the tokens `dividing` separately. Therefore the ids before
    the last of them in a prompt are the same as in the whole text. The rest of the prompt has to be encoded again,
    because without the answer after it, it may have other ids.
    """
    divisions = np.flatnonzero(np.isin(whole.ids, dividing))
    heads = []
    for begin, _ in transcript.answers:
        before = divisions[whole.places[divisions, 1] <= begin]
        kept, start = (int(before[-1]), int(whole.places[before[-1], 0])) if len(before) else (0, 0)
        heads.append((kept, transcript.text[start:begin]))
    return heads


def _marked(
    transcript: Transcript,
    whole: Encoded,
    prompts: list[np.ndarray],
    tokenizer: Tokenizer,
    ends: np.ndarray,
    count_all: bool,
) -> list[np.ndarray]:
    """Return the rows of a transcript: one for the whole text, and one more for some of the answers.

    In the whole text, a token may span the end of a prompt and the beginning of its answer. In use the model sees the
    prompt encoded alone. Such an answer therefore counts in a row of its own, after the ids of the prompt alone.

    Args:
        count_all: everything new counts, and not only the answers.

    Raises:
        UserError: no answer counts, or the tokenizer has no ids for an answer alone.
    """
    row, rows, begins = whole.ids.copy(), list[np.ndarray](), whole.places[:, 0]
    if count_all:
        row[np.searchsorted(begins, transcript.new) :] |= COUNTS
    for prompt, (begin, end) in zip(prompts, transcript.answers, strict=True):
        stop = int(np.searchsorted(begins, end))
        if np.array_equal(whole.ids[: len(prompt)], prompt):
            _mark_answer(row, len(prompt), stop, ends)
        else:
            text = transcript.text[begin:end]
            answer = tokenizer.continuation(prompt.tolist(), text, whole.ids[:stop].tolist())
            row[np.searchsorted(begins, begin) : stop] &= ~COUNTS
            rows.append(np.append(prompt, np.array(answer, np.uint32)))
            _mark_answer(rows[-1], len(prompt), len(rows[-1]), ends)
    rows = [each for each in [row, *rows] if np.any(each & COUNTS)]
    if not rows:
        raise UserError("the template writes no answer.")
    return rows


def _mark_answer(row: np.ndarray, start: int, stop: int, ends: np.ndarray) -> None:
    """Mark an answer in a row: its tokens count up to and including the first one that ends it."""
    found = np.flatnonzero(np.isin(row[start:stop] & ID, ends))
    stop = start + int(found[0]) + 1 if len(found) else stop
    row[start:stop] |= COUNTS
    row[stop : stop + 1] |= MAY_END


def _written(conversations: Iterable[Conversation], template: ChatTemplate, drops: Drops) -> Iterator[Transcript]:
    """Yield the transcripts of all conversations that the template does not refuse."""
    for conversation in conversations:
        try:
            yield from transcripts(conversation, template)
        except UserError as error:
            reason = str(error)
            drops.add(reason if reason in drops.counts or len(drops.counts) < REASONS else "other reasons.")
