"""Batches of training windows, in an order that is a function of the seed and the position alone.

A *window* is `seq_len` tokens and the token after them. The text counts as a ring: its end is joined to its start. Each
epoch cuts the ring into windows from an offset of its own and visits them in an order of its own.

Windows are numbered across epochs, so any batch can be made again from its number. A resume therefore needs no saved
state, and no window is lost at the end of an epoch: its last windows share a batch with the first of the next epoch.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import mlx.data as dx
import numpy as np

PREFETCH_BATCHES = 4


class Shard(NamedTuple):
    """The windows that one rank reads.

    Training gives each rank an equal, contiguous run of every `per_step` windows. Validation gives rank r every
    `ranks`-th window, starting at the r-th.
    """

    rank: int = 0
    ranks: int = 1
    per_step: int = 1

    def has(self, window: int) -> bool:
        """Return whether this rank trains on window number `window`."""
        return window % self.per_step * self.ranks // self.per_step == self.rank


WHOLE = Shard()


class Windows(Protocol):
    """A split as training and validation read it.

    Attributes:
        per_epoch: training windows in one pass.
        facts: lines for the plan of a run.
        warnings: lines about what is not read.
    """

    per_epoch: int
    facts: list[str]
    warnings: list[str]

    def training(
        self, batch_size: int, seed: int, start: int = 0, shard: Shard = WHOLE
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield batches of a shard without end, prefetched, from window number `start` on.

        A batch is windows (batch_size, seq_len + 1) int32, and the weight (batch_size, seq_len) float32 of each target.
        """
        ...

    def places(self, seed: int, start: int, count: int) -> list[int]:
        """Return the position in the text, in tokens, of each window from number `start` to `start + count - 1`."""
        ...

    def validation_count(self, limit: int = 0, shard: Shard = WHOLE) -> int:
        """Return how many windows of a shard `validation` reads."""
        ...

    def validation(
        self, batch_size: int, limit: int = 0, shard: Shard = WHOLE
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield batches as in `training`, each window once, or `limit` windows that are spread evenly; 0 takes all."""
        ...


class TextWindows:
    """The `Windows` of a text.

    Args:
        tokens: (tokens,) ids.
        seq_len: targets per window.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int) -> None:
        self._tokens, self._seq_len = tokens, seq_len
        self.per_epoch = windows_per_epoch(tokens, seq_len)
        self.facts: list[str] = []
        self.warnings: list[str] = []

    def training(
        self, batch_size: int, seed: int, start: int = 0, shard: Shard = WHOLE
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield batches in which each target has weight 1."""
        weights = np.ones((batch_size, self._seq_len), np.float32)
        for windows in training_batches(self._tokens, self._seq_len, batch_size, seed, start, shard):
            yield windows, weights

    def places(self, seed: int, start: int, count: int) -> list[int]:
        """Return where windows begin."""
        return window_numbers(self._tokens, self._seq_len, seed, start, count)

    def validation_count(self, limit: int = 0, shard: Shard = WHOLE) -> int:
        """Return the number of validation windows of a shard."""
        return len(validation_windows(self._tokens, self._seq_len, limit, shard))

    def validation(
        self, batch_size: int, limit: int = 0, shard: Shard = WHOLE
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield every token but the first exactly once as a target."""
        return validation_batches(self._tokens, self._seq_len, batch_size, limit, shard)


def windows_per_epoch(tokens: np.ndarray, seq_len: int) -> int:
    """Return how many windows of `seq_len` tokens one pass over (tokens,) ids has."""
    return len(tokens) // seq_len


def window_numbers(tokens: np.ndarray, seq_len: int, seed: int, start: int, count: int) -> list[int]:
    """Return the position in the text, in tokens, of each window from number `start` to `start + count - 1`."""
    return [begin for begin, _ in zip(_beginnings(len(tokens), seq_len, seed, start), range(count), strict=False)]


def training_windows(
    tokens: np.ndarray, seq_len: int, seed: int, start: int = 0, shard: Shard = WHOLE
) -> Iterator[np.ndarray]:
    """Yield windows (seq_len + 1,) int32 of a shard without end, from window number `start` on."""
    for number, begin in enumerate(_beginnings(len(tokens), seq_len, seed, start), start):
        if shard.has(number):
            yield _cut(tokens, begin, begin + seq_len + 1)


def training_batches(
    tokens: np.ndarray, seq_len: int, batch_size: int, seed: int, start: int = 0, shard: Shard = WHOLE
) -> Iterator[np.ndarray]:
    """Yield batches (batch_size, seq_len + 1) int32 of a shard without end, prefetched, from window `start` on."""
    windows = ({"window": window} for window in training_windows(tokens, seq_len, seed, start, shard))
    # One prefetch thread keeps the order; several would not.
    stream = dx.stream_python_iterable(lambda: windows).batch(batch_size).prefetch(PREFETCH_BATCHES, 1)
    for sample in stream:
        yield sample["window"]


def validation_windows(tokens: np.ndarray, seq_len: int, limit: int = 0, shard: Shard = WHOLE) -> np.ndarray:
    """Return the numbers of the validation windows of a shard.

    Rank r takes every n-th window of all, or of the `limit` windows that are spread evenly over the text.
    """
    return spread(-(-(len(tokens) - 1) // seq_len), limit, shard)


def spread(count: int, limit: int = 0, shard: Shard = WHOLE) -> np.ndarray:
    """Return the numbers below `count`, or `limit` of them that are spread evenly, that belong to a shard."""
    chosen = np.arange(count)
    if limit and limit < count:
        chosen = np.linspace(0, count - 1, limit).round().astype(int)
    return chosen[shard.rank :: shard.ranks]


def validation_batches(
    tokens: np.ndarray, seq_len: int, batch_size: int, limit: int = 0, shard: Shard = WHOLE
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield every token but the first exactly once as a target, in batches of fixed shape.

    Args:
        tokens: (tokens,) ids.
        seq_len: targets per window.
        batch_size: windows per batch.
        limit: use only this many windows, spread evenly over the text; 0 uses all.
        shard: use only the windows of this rank.

    Yields:
        Windows (batch_size, seq_len + 1) int32, and the weight (batch_size, seq_len) float32 of each target. Padding
        after the end of the text has weight 0.
    """
    chosen = validation_windows(tokens, seq_len, limit, shard)
    for first in range(0, len(chosen), batch_size):
        windows = np.zeros((batch_size, seq_len + 1), np.int32)
        weights = np.zeros((batch_size, seq_len), np.float32)
        for row, index in enumerate(chosen[first : first + batch_size]):
            window = tokens[index * seq_len : (index + 1) * seq_len + 1]
            windows[row, : len(window)] = window
            weights[row, : len(window) - 1] = 1
        yield windows, weights


def _beginnings(length: int, seq_len: int, seed: int, start: int) -> Iterator[int]:
    """Yield the position of each window in a text of `length` tokens, from window number `start` on."""
    per_epoch = length // seq_len
    epoch, first = divmod(start, per_epoch)
    while True:
        generator = generator_of(seed, epoch)
        offset = int(generator.integers(length))
        for index in generator.permutation(per_epoch)[first:]:
            yield offset + int(index) * seq_len
        epoch, first = epoch + 1, 0


def generator_of(seed: int, epoch: int) -> np.random.Generator:
    """Return a generator of random numbers that depends on the seed and the epoch alone."""
    # Philox is counter-based: its key alone decides what it draws (Salmon et al. 2011).
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))


def _cut(tokens: np.ndarray, begin: int, end: int) -> np.ndarray:
    """Return `tokens[begin:end]` as int32, continuing at the start of the text where its end is reached."""
    indices = np.arange(begin, end) % len(tokens)
    return tokens[indices].astype(np.int32)
