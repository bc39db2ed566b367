"""Batches of training windows, in an order that is a function of the seed and the position alone.

A *window* is `seq_len` tokens and the token after them. The text counts as a ring: its end is joined to its start. Each
epoch cuts the ring into windows from an offset of its own and visits them in an order of its own.

Windows are numbered across epochs, so any batch can be made again from its number. A resume therefore needs no saved
state, and no window is lost at the end of an epoch: its last windows share a batch with the first of the next epoch.
"""

import itertools
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
        self.per_epoch = len(tokens) // seq_len
        self.facts: list[str] = []
        self.warnings: list[str] = []

    def training(
        self, batch_size: int, seed: int, start: int = 0, shard: Shard = WHOLE
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield batches in which each target has weight 1."""

        def samples() -> Iterator[dict[str, np.ndarray]]:
            for number, begin in enumerate(self._beginnings(seed, start), start):
                if shard.has(number):
                    places = np.arange(begin, begin + self._seq_len + 1) % len(self._tokens)
                    yield {"window": self._tokens[places].astype(np.int32)}

        weights = np.ones((batch_size, self._seq_len), np.float32)
        # One prefetch thread keeps the order; several would not.
        stream = dx.stream_python_iterable(samples).batch(batch_size).prefetch(PREFETCH_BATCHES, 1)
        for sample in stream:
            yield sample["window"], weights

    def places(self, seed: int, start: int, count: int) -> list[int]:
        """Return where windows begin."""
        return list(itertools.islice(self._beginnings(seed, start), count))

    def validation_count(self, limit: int = 0, shard: Shard = WHOLE) -> int:
        """Return the number of validation windows of a shard."""
        return len(self._validation_windows(limit, shard))

    def validation(
        self, batch_size: int, limit: int = 0, shard: Shard = WHOLE
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield every token but the first exactly once as a target; padding after the end of the text has weight 0."""
        chosen = self._validation_windows(limit, shard)
        for first in range(0, len(chosen), batch_size):
            windows = np.zeros((batch_size, self._seq_len + 1), np.int32)
            weights = np.zeros((batch_size, self._seq_len), np.float32)
            for row, index in enumerate(chosen[first : first + batch_size]):
                window = self._tokens[index * self._seq_len : (index + 1) * self._seq_len + 1]
                windows[row, : len(window)] = window
                weights[row, : len(window) - 1] = 1
            yield windows, weights

    def _validation_windows(self, limit: int, shard: Shard) -> np.ndarray:
        return spread(-(-(len(self._tokens) - 1) // self._seq_len), limit, shard)

    def _beginnings(self, seed: int, start: int) -> Iterator[int]:
        """Yield the position of each window in the text, from window number `start` on."""
        epoch, first = divmod(start, self.per_epoch)
        while True:
            generator = generator_of(seed, epoch)
            offset = int(generator.integers(len(self._tokens)))
            for index in generator.permutation(self.per_epoch)[first:]:
                yield offset + int(index) * self._seq_len
            epoch, first = epoch + 1, 0


def spread(count: int, limit: int = 0, shard: Shard = WHOLE) -> np.ndarray:
    """Return the numbers below `count`, or `limit` of them that are spread evenly, that belong to a shard."""
    chosen = np.arange(count)
    if limit and limit < count:
        chosen = np.linspace(0, count - 1, limit).round().astype(int)
    return chosen[shard.rank :: shard.ranks]


def generator_of(seed: int, epoch: int) -> np.random.Generator:
    """Return a generator of random numbers that depends on the seed and the epoch alone."""
    # Philox is counter-based: its key alone decides what it draws (Salmon et al. 2011).
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
