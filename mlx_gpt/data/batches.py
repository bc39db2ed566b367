"""Token ids to batches of training windows, in an order that is a function of (seed, position).

A *window* is `seq_len` tokens and the one after them. An epoch cuts the text, joined end to start, into windows from
an offset of its own and visits them in an order of its own. Windows are counted across epochs, so that any batch can be
made again from its number: a resume needs no saved state, and the last windows of an epoch share a batch with the
first of the next, so none is lost.
"""

from collections.abc import Iterator
from typing import NamedTuple

import mlx.data as dx
import numpy as np

PREFETCH_BATCHES = 4


def windows_per_epoch(tokens: np.ndarray, seq_len: int) -> int:
    """How many windows of `seq_len` tokens one pass over (tokens,) ids has."""
    return len(tokens) // seq_len


def window_numbers(tokens: np.ndarray, seq_len: int, seed: int, start: int, count: int) -> list[int]:
    """Where the windows number `start` to `start + count - 1` begin in the text, in tokens."""
    return [begin for begin, _ in zip(_beginnings(len(tokens), seq_len, seed, start), range(count), strict=False)]


class Part(NamedTuple):
    """The windows that one of several ranks reads: of each `per_step` of them, its even and contiguous part."""

    rank: int = 0
    ranks: int = 1
    per_step: int = 1

    def has(self, window: int) -> bool:
        """Whether window number `window` is among them."""
        return window % self.per_step * self.ranks // self.per_step == self.rank


WHOLE = Part()


def training_windows(
    tokens: np.ndarray, seq_len: int, seed: int, start: int = 0, part: Part = WHOLE
) -> Iterator[np.ndarray]:
    """Windows (seq_len + 1,) int32 without end, from window number `start` on."""
    for number, begin in enumerate(_beginnings(len(tokens), seq_len, seed, start), start):
        if part.has(number):
            yield _cut(tokens, begin, begin + seq_len + 1)


def _beginnings(length: int, seq_len: int, seed: int, start: int) -> Iterator[int]:
    """Where each window begins in a text of `length` tokens, from window number `start` on."""
    per_epoch = length // seq_len
    epoch, first = divmod(start, per_epoch)
    while True:
        # Philox is counter-based: its key alone, (seed, epoch), decides what it draws (Salmon et al. 2011).
        generator = np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
        offset = int(generator.integers(length))
        for index in generator.permutation(per_epoch)[first:]:
            yield offset + int(index) * seq_len
        epoch, first = epoch + 1, 0


def training_batches(
    tokens: np.ndarray, seq_len: int, batch_size: int, seed: int, start: int = 0, part: Part = WHOLE
) -> Iterator[np.ndarray]:
    """Batches (batch_size, seq_len + 1) int32 without end, prefetched, from window number `start` on."""
    windows = ({"window": window} for window in training_windows(tokens, seq_len, seed, start, part))
    # One prefetch thread keeps the order; several do not.
    stream = dx.stream_python_iterable(lambda: windows).batch(batch_size).prefetch(PREFETCH_BATCHES, 1)
    for sample in stream:
        yield sample["window"]


def validation_windows(tokens: np.ndarray, seq_len: int, limit: int = 0, part: Part = WHOLE) -> np.ndarray:
    """The numbers of the windows to validate on: all of them, or `limit` that are spread evenly over the text.

    Of `part`, a rank's: every so manieth of them.
    """
    count = -(-(len(tokens) - 1) // seq_len)
    chosen = np.arange(count)
    if limit and limit < count:
        chosen = np.linspace(0, count - 1, limit).round().astype(int)
    return chosen[part.rank :: part.ranks]


def validation_batches(
    tokens: np.ndarray, seq_len: int, batch_size: int, limit: int = 0, part: Part = WHOLE
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Every token of `tokens` once as a target, in batches of fixed shape.

    Args:
        limit: take only this many windows, spread evenly over the text; 0 takes all.
        part: take those of a rank.

    Yields:
        Windows (batch_size, seq_len + 1) int32 and the weight (batch_size, seq_len) float32 of each target: 0 where
        the text had ended and the window is filled up.
    """
    chosen = validation_windows(tokens, seq_len, limit, part)
    for first in range(0, len(chosen), batch_size):
        windows = np.zeros((batch_size, seq_len + 1), np.int32)
        weights = np.zeros((batch_size, seq_len), np.float32)
        for row, index in enumerate(chosen[first : first + batch_size]):
            window = tokens[index * seq_len : (index + 1) * seq_len + 1]
            windows[row, : len(window)] = window
            weights[row, : len(window) - 1] = 1
        yield windows, weights


def _cut(tokens: np.ndarray, begin: int, end: int) -> np.ndarray:
    """`tokens[begin:end]` as int32, going on at the start where the text ends."""
    indices = np.arange(begin, end) % len(tokens)
    return tokens[indices].astype(np.int32)
