"""Batches of training windows, in an order that is a function of the seed and the position alone.

A *window* is `seq_len` tokens and the token after them. The text counts as a ring: its end is joined to its start. Each
epoch cuts the ring into windows from an offset of its own and visits them in an order of its own.

Windows are numbered across epochs, so any batch can be made again from its number. A resume therefore needs no saved
state, and no window is lost at the end of an epoch: its last windows share a batch with the first of the next epoch.
"""

import itertools
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

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


class Windows(ABC):
    """A split, cut into windows that training and validation read in batches.

    A batch is windows (batch_size, seq_len + 1) int32, and the weight (batch_size, seq_len) float32 of each target. In
    validation, windows may be shorter.

    Args:
        count: validation windows.

    Attributes:
        warnings: lines about text that is not read.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self.warnings: list[str] = []

    @property
    @abstractmethod
    def per_epoch(self) -> int:
        """Training windows in one pass."""

    @property
    def facts(self) -> list[str]:
        """Lines about the training windows, for the plan of a run."""
        return []

    @abstractmethod
    def window(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return validation window `number` (seq_len + 1,) int32, and the weight (seq_len,) float32 of each target."""

    @abstractmethod
    def _order(self, seed: int, start: int) -> Iterator[Any]:
        """Yield an argument for `_drawn` and `_place` per training window, without end, from number `start` on."""

    @abstractmethod
    def _drawn(self, drawn: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return a training window and its weights, as `window` does."""

    @abstractmethod
    def _place(self, drawn: Any) -> int:
        """Return the position of a training window in the text, in tokens."""

    def training(
        self, batch_size: int, seed: int, start: int = 0, shard: Shard = WHOLE
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield batches of a shard without end, prefetched, from window number `start` on."""

        def samples() -> Iterator[dict[str, np.ndarray]]:
            for number, drawn in enumerate(self._order(seed, start), start):
                if shard.has(number):
                    window, weights = self._drawn(drawn)
                    yield {"window": window, "weights": weights}

        # One prefetch thread keeps the order; several threads would not.
        stream = dx.stream_python_iterable(samples).batch(batch_size).prefetch(PREFETCH_BATCHES, 1)
        for sample in stream:
            yield sample["window"], sample["weights"]

    def places(self, seed: int, start: int, count: int) -> list[int]:
        """Return the position in the text, in tokens, of each window from number `start` to `start + count - 1`."""
        return [self._place(drawn) for drawn in itertools.islice(self._order(seed, start), count)]

    def validation_count(self, limit: int = 0, shard: Shard = WHOLE) -> int:
        """Return the number of windows of a shard that `validation` reads."""
        return len(spread(self._count, limit, shard))

    def validation(
        self, batch_size: int, limit: int = 0, shard: Shard = WHOLE
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield each window of a shard once, or only `limit` windows, spread evenly; 0 takes all.

        The last batch is filled up with empty windows, whose weights are 0.
        """
        chosen = spread(self._count, limit, shard)
        for first in range(0, len(chosen), batch_size):
            rows = [self.window(number) for number in chosen[first : first + batch_size]]
            missing = ((0, batch_size - len(rows)), (0, 0))
            windows, weights = (np.pad(np.stack(arrays), missing) for arrays in zip(*rows, strict=True))
            yield windows, weights


class TextWindows(Windows):
    """The windows of a text. In validation, every token but the first is a target exactly once.

    Args:
        tokens: (tokens,) ids.
        seq_len: targets per window.
    """

    def __init__(self, tokens: np.ndarray, seq_len: int) -> None:
        super().__init__(-(-(len(tokens) - 1) // seq_len))
        self._tokens, self._seq_len = tokens, seq_len

    @property
    def per_epoch(self) -> int:
        """Training windows in one pass. They leave out less than one window of the text."""
        return len(self._tokens) // self._seq_len

    def window(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a validation window; padding after the end of the text has weight 0."""
        window, weights = np.zeros(self._seq_len + 1, np.int32), np.zeros(self._seq_len, np.float32)
        tokens = self._tokens[number * self._seq_len : (number + 1) * self._seq_len + 1]
        window[: len(tokens)] = tokens
        weights[: len(tokens) - 1] = 1
        return window, weights

    def _order(self, seed: int, start: int) -> Iterator[int]:
        epoch, first = divmod(start, self.per_epoch)
        while True:
            generator = generator_of(seed, epoch)
            offset = int(generator.integers(len(self._tokens)))
            for index in generator.permutation(self.per_epoch)[first:]:
                yield offset + int(index) * self._seq_len
            epoch, first = epoch + 1, 0

    def _drawn(self, drawn: int) -> tuple[np.ndarray, np.ndarray]:
        places = np.arange(drawn, drawn + self._seq_len + 1) % len(self._tokens)
        return self._tokens[places].astype(np.int32), np.ones(self._seq_len, np.float32)

    def _place(self, drawn: int) -> int:
        return drawn


def spread(count: int, limit: int = 0, shard: Shard = WHOLE) -> np.ndarray:
    """Return a shard's numbers out of those below `count`, or out of `limit` of them, spread evenly."""
    chosen = np.arange(count)
    if limit and limit < count:
        chosen = np.linspace(0, count - 1, limit).round().astype(int)
    return chosen[shard.rank :: shard.ranks]


def generator_of(seed: int, epoch: int) -> np.random.Generator:
    """Return a generator of random numbers that depends on the seed and the epoch alone."""
    # Philox is counter-based: its key alone decides what it draws (Salmon et al. 2011).
    return np.random.Generator(np.random.Philox(key=np.array([seed, epoch], np.uint64)))
