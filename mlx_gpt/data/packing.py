"""Packs whole examples of conversations into training windows with little padding.

The longest examples are placed first. Each epoch shuffles the windows, and the examples inside each window: people
begin with any question, so each must sometimes stand first in training. Examples of the same length also change places,
so that a model can't learn which ones stand together.
"""

import bisect
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from mlx_gpt.data.batches import WHOLE, Shard, Windows, generator_of
from mlx_gpt.data.chat_tokens import BEGINS, COUNTS, MAY_END, NEW
from mlx_gpt.data.kinds import counted
from mlx_gpt.data.tokens import ID
from mlx_gpt.errors import UserError
from mlx_gpt.seeds import seed_from

SCANNED = 2**24  # tokens that are searched at a time


class PackedWindows(Windows):
    """Windows of whole examples: conversations, or parts of them that the template makes separate.

    A window gives a token everything before it, earlier examples included. Validation reads each example by itself, as
    a person will. An example that is longer than a window keeps its beginning, and is cut after the last answer that
    fits. If not even the first answer fits, the example is left out.

    Args:
        marked: (tokens,) uint32, as `tokenize_conversations` makes them.
        seq_len: targets per window.
        seed: decides which of two examples of equal length comes first.
        name: the name of the split, for messages.
        context: the highest number of targets for this model; 0 if it can be raised.

    Raises:
        UserError: no example fits; the message names a length that suffices.
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
            lost = marked[place : ends[i] - 1]  # the end of text, which comes last, is no turn
            shortened += bool(place > begins[i] and np.any(lost & COUNTS))
            ends[i] = place
        kept, count = ends > begins, len(begins)
        these = f"{name} {'conversations' if np.all(marked[begins] & NEW) else 'examples'}"
        if not kept.any():
            raise UserError(_nothing_fits(marked, begins, these, seq_len, context))
        self._begins, self._ends, self._seed = begins[kept], ends[kept], seed
        self._conversations = len(np.unique(np.cumsum((marked[begins] & NEW) > 0)[kept]))
        self._lengths = self._ends - self._begins
        self._by_length = np.argsort(self._lengths, kind="stable").tolist()
        super().__init__(len(self._lengths))
        if shortened:
            self.warnings.append(
                f"WARNING: {shortened:,} of the {count:,} {these} are longer than a window of {seq_len} "
                "tokens: only their first turns count."
            )
        if left_out := count - int(kept.sum()):
            self.warnings.append(
                f"WARNING: left out {left_out:,} of {count:,} {these}, in which not even one answer fits into a window "
                f"of {seq_len} tokens{': raise --seq-len' if not context or seq_len < context else ''}."
            )

    @functools.cached_property
    def _windows(self) -> list[list[int]]:
        """The examples of each training window, packed when training asks, because validation never does."""
        return pack(self._lengths, self._length, self._seed)

    @property
    def per_epoch(self) -> int:
        """Training windows in one pass."""
        return len(self._windows)

    @property
    def facts(self) -> list[str]:
        """How tightly the examples are packed."""
        count, padding = len(self._lengths), 1 - self._lengths.sum() / (self.per_epoch * self._length)
        these = counted(self._conversations, "conversations")
        if self._conversations < count:
            these = f"{count:,} examples from {these}"
        return [f"{these} packed into {counted(self.per_epoch, 'windows')}, with {padding:.1%} padding"]

    def window(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return a window with the example that is at this place among all examples, the shortest first."""
        return self._drawn([self._by_length[number]])

    def validation(
        self, batch_size: int, limit: int = 0, shard: Shard = WHOLE
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield each example alone, as `Windows.validation` does; batches of short ones have shorter windows."""
        for windows, weights in super().validation(batch_size, limit, shard):
            longest, width = int(np.flatnonzero(weights.any(axis=0))[-1]) + 1, weights.shape[1]
            while width % 2 == 0 and width // 2 >= longest:  # by halves, because each width is compiled
                width //= 2
            yield windows[:, : width + 1], weights[:, :width]

    def _order(self, seed: int, start: int) -> Iterator[list[int]]:
        """Yield the examples of each window in order."""
        epoch, first = divmod(start, self.per_epoch)
        instead = np.empty(self._count, np.int64)
        while True:
            generator = generator_of(seed, epoch)
            windows, shuffled = generator.permutation(self.per_epoch), generator.permutation(self._count)
            instead[self._by_length] = shuffled[np.argsort(self._lengths[shuffled], kind="stable")]
            for index in windows[first:].tolist():
                drawn = generator_of(seed_from(seed, epoch), index).permutation(self._windows[index])
                yield instead[drawn].tolist()
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


def pack(lengths: Sequence[int] | np.ndarray, room: int, seed: int = 0) -> list[list[int]]:
    """Divide items of these lengths among windows with `room` each, and return the indices of the items in each.

    Lengths that vary much fit well with `best_fit`. If they hardly vary, it can leave much room, and `fill` less.
    """
    windows = best_fit(lengths, room, seed)
    fewest = math.ceil(len(lengths) / (room // np.min(lengths)))  # if all were as short as the shortest
    if len(windows) == fewest or np.sum(lengths) > 0.99 * room * len(windows):
        return windows
    return min(windows, fill(lengths, room, seed), key=len)


def fill(lengths: Sequence[int] | np.ndarray, room: int, seed: int = 0) -> list[list[int]]:
    """Fill one window after the other. Arguments and result are as in `pack`.

    Each begins with the longest item that is left, and gets those that fill it best (minimum bin slack: Gupta & Ho
    1999).
    """
    items: dict[int, list[int]] = {}  # by length
    for i in np.random.Generator(np.random.Philox(seed)).permutation(len(lengths)).tolist():
        items.setdefault(int(lengths[i]), []).append(i)
    windows = []
    while items:
        counts = {length: len(left) for length, left in items.items()}
        longest = max(counts)
        counts[longest] -= 1
        window = []
        for length in [longest, *_best_sum(counts, room - longest)]:
            window.append(items[length].pop())
            if not items[length]:
                del items[length]
        windows.append(window)
    return windows


def _best_sum(counts: Mapping[int, int], room: int) -> list[int]:
    """Return those lengths, each at most as often as its count, whose sum comes closest to `room` from below."""
    sums, steps = 1, []  # bit s of `sums` is set if there are lengths whose sum is s
    for length in sorted(counts, reverse=True):
        left, copies = min(counts[length], room // length), 1
        while left and not sums >> room & 1:
            copies = min(copies, left)
            steps.append((length, copies, sums))
            sums |= sums << copies * length & (1 << room + 1) - 1
            left, copies = left - copies, 2 * copies
    best, chosen = sums.bit_length() - 1, list[int]()
    for length, copies, before in reversed(steps):
        if not before >> best & 1:
            chosen += [length] * copies
            best -= length * copies
    return chosen


def best_fit(lengths: Sequence[int] | np.ndarray, room: int, seed: int = 0) -> list[list[int]]:
    """Place the longest items first, each in the window where it leaves the least room (Johnson 1973).

    Arguments and result are as in `pack`.
    """
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


def _nothing_fits(marked: np.ndarray, begins: np.ndarray, these: str, seq_len: int, context: int) -> str:
    """Return the message for examples of which none fits into a window up to its first answer."""
    stops = np.append(marked_places(marked, MAY_END), len(marked))
    needed = int((stops[np.searchsorted(stops, begins, "right")] - begins).min()) - 1
    none = f"A window of {seq_len} tokens is too short for the first answer of any of the {len(begins):,} {these}"
    if context and needed > context:
        return f"{none}. The shortest needs {needed} tokens, but the model's context has {context}: shorten them."
    return f"{none}: use --seq-len {needed} or more, or shorten them."


def marked_places(marked: np.ndarray, mark: np.uint32) -> np.ndarray:
    """Return the positions (places,) int64 of the tokens that have a mark."""
    parts = range(0, len(marked), SCANNED)
    return np.concatenate([start + np.flatnonzero(marked[start : start + SCANNED] & mark) for start in parts])
