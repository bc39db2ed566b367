"""Packs whole conversations into training windows with little padding.

The longest conversations are placed first, each in the window where it leaves the least room (best-fit decreasing:
Johnson 1973). A window holds the same conversations in every epoch. Each epoch shuffles the windows, and the
conversations inside each window: people begin with any question, so each must sometimes stand first in training.
"""

import bisect
from collections.abc import Iterator, Sequence

import numpy as np

from mlx_gpt.data.batches import Windows, generator_of
from mlx_gpt.data.chat_tokens import BEGINS, COUNTS, MAY_END
from mlx_gpt.data.tokens import ID
from mlx_gpt.errors import UserError
from mlx_gpt.seeds import seed_from

SCANNED = 2**24  # tokens that are searched at a time


class PackedWindows(Windows):
    """Windows of whole conversations. Validation reads each conversation once.

    A conversation that is longer than a window keeps its beginning, and is cut after the last answer that fits. If not
    even the first answer fits, the conversation is left out.

    Args:
        marked: (tokens,) uint32, as `tokenize_conversations` makes them.
        seq_len: targets per window.
        seed: decides which of two conversations of equal length comes first.
        name: the name of the split, for messages.
        context: the highest number of targets for this model; 0 if it can be raised.

    Raises:
        UserError: no conversation fits; the message names a length that suffices.
    """

    def __init__(
        self, marked: np.ndarray, seq_len: int, seed: int = 0, name: str = "training", context: int = 0
    ) -> None:
        self._marked, self._length = marked, seq_len + 1
        begins = marked_places(marked, BEGINS)
        ends = np.append(begins[1:], len(marked))
        shortened = 0
        for i in np.flatnonzero(ends - begins > self._length):
            place = begins[i] + np.flatnonzero(marked[begins[i] : begins[i] + self._length + 1] & MAY_END)[-1]
            shortened += bool(place > begins[i] and np.any(marked[place : ends[i]] & COUNTS))
            ends[i] = place
        kept = ends > begins
        if not kept.any():
            raise UserError(_nothing_fits(marked, begins, name, context))
        self._begins, self._ends = begins[kept], ends[kept]
        lengths = self._ends - self._begins
        self._windows = best_fit(lengths, self._length, seed)
        super().__init__(len(self._windows), len(self._windows))
        count = len(begins)
        if shortened:
            self.warnings.append(
                f"WARNING: {shortened:,} of the {count:,} {name} conversations are longer than a window of {seq_len} "
                "tokens: only their first turns are trained on."
            )
        if left_out := count - int(kept.sum()):
            self.warnings.append(
                f"WARNING: left out {left_out:,} of {count:,} {name} conversations, whose first answer does not fit "
                f"into a window of {seq_len} tokens: raise --seq-len."
            )
        padding = 1 - lengths.sum() / (self.per_epoch * self._length)
        self.facts.append(
            f"{len(lengths):,} conversations packed into {self.per_epoch:,} windows, {padding:.1%} of which is padding"
        )

    def window(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a window; its conversations are in the order in which they were packed."""
        return self._drawn(self._windows[number])

    def _order(self, seed: int, start: int) -> Iterator[list[int]]:
        """Yield the conversations of each window in order."""
        epoch, first = divmod(start, self.per_epoch)
        while True:
            for index in generator_of(seed, epoch).permutation(self.per_epoch)[first:].tolist():
                yield generator_of(seed_from(seed, epoch), index).permutation(self._windows[index]).tolist()
            epoch, first = epoch + 1, 0

    def _drawn(self, drawn: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        window, weights = np.zeros(self._length, np.int32), np.zeros(self._length, np.float32)
        start = 0
        for i in drawn:
            part = self._marked[self._begins[i] : self._ends[i]]
            window[start : start + len(part)] = part & ID
            weights[start : start + len(part)] = (part & COUNTS) > 0
            start += len(part)
        return window, weights[1:]

    def _place(self, drawn: Sequence[int]) -> int:
        return int(self._begins[drawn[0]])


def best_fit(lengths: Sequence[int] | np.ndarray, room: int, seed: int = 0) -> list[list[int]]:
    """Divide items of these lengths among windows with `room` each, and return the indices of the items in each."""
    order = np.random.Generator(np.random.Philox(seed)).permutation(len(lengths))
    order = order[np.argsort(-np.asarray(lengths)[order], kind="stable")]
    windows: list[list[int]] = []
    open_windows: dict[int, list[int]] = {}
    rooms: list[int] = []  # the keys of `open_windows` in order
    for i in order.tolist():
        length = int(lengths[i])
        at = bisect.bisect_left(rooms, length)
        if at == len(rooms):
            left, number = room, len(windows)
            windows.append([])
        else:
            left = rooms[at]
            number = open_windows[left].pop()
            if not open_windows[left]:
                del open_windows[left], rooms[at]
        windows[number].append(i)
        if left := left - length:
            if left not in open_windows:
                bisect.insort(rooms, left)
            open_windows.setdefault(left, []).append(number)
    return windows


def _nothing_fits(marked: np.ndarray, begins: np.ndarray, name: str, context: int) -> str:
    """Return the message for conversations none of which fits into a window up to its first answer."""
    stops = np.append(marked_places(marked, MAY_END), len(marked))
    needed = int((stops[np.searchsorted(stops, begins, "right")] - begins).min()) - 1
    none = f"None of the {len(begins):,} {name} conversations fits into a window up to its first answer: "
    if context and needed > context:
        return f"{none}that takes at least {needed} tokens, but the model's context has {context}. Shorten them."
    return f"{none}use --seq-len {needed} or more, or shorten them."


def marked_places(marked: np.ndarray, mark: np.uint32) -> np.ndarray:
    """Return the positions (places,) int64 of the tokens that have a mark."""
    parts = range(0, len(marked), SCANNED)
    return np.concatenate([start + np.flatnonzero(marked[start : start + SCANNED] & mark) for start in parts])
