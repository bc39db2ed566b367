"""Trains a byte-level BPE like GPT-2's, in bounded time and memory."""

import contextlib
import itertools
import queue
import random
import re
import threading
from collections.abc import Callable, Iterable, Iterator

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

END_OF_TEXT = "<|endoftext|>"
START_OF_TURN, END_OF_TURN = "<|im_start|>", "<|im_end|>"  # around each message of a conversation, in ChatML
# Every tokenizer that is made here has these, so that its model can learn to converse without growing.
SPECIAL_TOKENS = [END_OF_TEXT, START_OF_TURN, END_OF_TURN]

# White space as Unicode and the library define it. Python's own \s has four more control characters.
SPACE = r"\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"
# Each of GPT-2's words lies within one of these, except for the space that may begin it.
WORDS = re.compile(rf" ?[^\W_]+| ?(?:[^\w{SPACE}]|_)+|[{SPACE}]+")

# The library takes two seconds and 110 MB for each megabyte of distinct words. A merge that changes a word shortens it,
# and the library walks the whole word to do so, so the time also grows with the length of the words.
WORD_CHARACTERS = 256
WORD_BYTES = 4_000_000
SAMPLE_BYTES = 32_000_000  # twice as much gave 0.06 % fewer tokens

PATIENCE = 5.0  # seconds that an interrupted training may take to stop reading


class Sample:
    """As much of a text as a tokenizer is trained on: all of it, or a part that is spread evenly.

    It has at most `SAMPLE_BYTES` of text and `WORD_BYTES` of distinct words. Whenever it has more, a random half of it
    is dropped, and from then on only half as much is taken. Words are cut after `WORD_CHARACTERS`.

    Attributes:
        bytes: length of the sample in UTF-8.
        text_bytes: length of the whole text in UTF-8.
        share: the share of the text that was taken, by the number of pieces.

    Args:
        pieces: the text, in pieces that are far shorter than the limits.

    Raises:
        UnicodeEncodeError: a piece has half of a surrogate pair.
    """

    def __init__(self, pieces: Iterable[str]) -> None:
        self.bytes, self.text_bytes, self.share = 0, 0, 1.0
        self._draw = random.Random(0)
        self._parts: list[bytes] = []  # as bytes, because one emoji makes a str four times as large
        self._words: set[str] = set()
        self._word_bytes = 0
        for piece in pieces:
            self.text_bytes += len(piece.encode())
            if self.share == 1 or self._draw.random() < self.share:
                for part in _with_short_words(piece):
                    self._add(part.encode(), part)
                while self.bytes > SAMPLE_BYTES or self._word_bytes > WORD_BYTES:
                    self._halve()
        self._words.clear()

    def __iter__(self) -> Iterator[str]:
        return (part.decode() for part in self._parts)

    def _add(self, encoded: bytes, part: str) -> None:
        new = set(WORDS.findall(part)) - self._words
        self._words |= new
        self._word_bytes += sum(len(word.encode()) for word in new)
        self._parts.append(encoded)
        self.bytes += len(encoded)

    def _halve(self) -> None:
        before, self._parts = self._parts, []
        self._words.clear()
        self.bytes = self._word_bytes = 0
        self.share /= 2
        for part in before:
            if self._draw.random() < 0.5:
                self._add(part, part.decode())


def byte_level(model: models.BPE) -> HFTokenizer:
    """Return a tokenizer that splits text as GPT-2 does, and decodes bytes as GPT-2 does."""
    backend = HFTokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def train(texts: Iterable[str], vocab_size: int, read: Callable[[int], object] = lambda done: None) -> HFTokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016, arXiv:1508.07909).

    Args:
        texts: the texts, such as a `Sample`.
        vocab_size: the most entries; there are fewer if the text has too few pairs that occur twice.
        read: called now and then, until the end, with the UTF-8 bytes read so far.
    """
    backend = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    done, stopped, all_read = 0, threading.Event(), threading.Event()

    def counted() -> Iterator[str]:
        nonlocal done
        for text in texts:
            if stopped.is_set():
                raise InterruptedError
            yield text
            done += len(text.encode())
        all_read.set()

    def work() -> None:
        try:
            backend.train_from_iterator(counted(), trainer)
        finally:
            all_read.set()

    try:
        _interruptibly(work, lambda: read(done))
    finally:
        stopped.set()
        # The library's threads call Python for each text, and would crash if the interpreter ended meanwhile. So this
        # waits until they have stopped reading, but no longer than a person does after Ctrl-C.
        all_read.wait(PATIENCE)
    return backend


def _interruptibly(work: Callable[[], object], meanwhile: Callable[[], object]) -> None:
    """Call `work` in a thread, because the library does not answer Ctrl-C, and `meanwhile` every tenth of a second.

    Ctrl-C raises at once, while the thread still works. The thread ends with its work or with the process.
    """
    outcome: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            work()
            outcome.put(None)
        except BaseException as error:  # a panic of the library raises a bare BaseException
            outcome.put(error)

    threading.Thread(target=run, daemon=True).start()  # the interpreter ends without waiting for such a thread
    while True:
        with contextlib.suppress(queue.Empty):
            error = outcome.get(timeout=0.1)
            break
        meanwhile()
    if error:
        raise error


def _with_short_words(text: str) -> list[str]:
    """Return a text in parts, of which no word is longer than `WORD_CHARACTERS`."""
    if max(map(len, WORDS.findall(text)), default=0) <= WORD_CHARACTERS:
        return [text]
    words = (match.span() for match in WORDS.finditer(text))
    cuts = [cut for start, end in words for cut in range(start + WORD_CHARACTERS, end, WORD_CHARACTERS)]
    return [text[start:end] for start, end in itertools.pairwise([0, *cuts, len(text)])]
