"""The keys and values of the sequences that are decoded together.

Shapes: B sequences, T new tokens in each, S tokens in the longest one with its new ones, H heads of width D.
"""

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt import models
from mlx_gpt.errors import UserError
from mlx_gpt.models.base import Mask

FEWEST = 256  # tokens of each row that are allocated at first, unless the rows have room for fewer


class Rows:
    """The places of the tokens of several sequences. Each sequence has a row, and fills it from the left.

    Attributes:
        count: the highest number of sequences.
        capacity: the highest number of tokens of each.
        lengths: the number of tokens in each row in use; these are the first rows.
        offset: how many tokens came before the pass announced by `grow`; (B,) if the sequences differ.
        places: where the tokens of that pass go, (count, 1, T, 1), if the sequences differ; otherwise None.
    """

    def __init__(self, count: int, capacity: int) -> None:
        self.count, self.capacity = count, capacity
        self.lengths: list[int] = []
        self.offset: int | mx.array = 0
        self.places: mx.array | None = None

    def begin(self, sequences: int = 1) -> None:
        """Begin this many sequences in the next rows."""
        self.lengths += [0] * sequences

    def grow(self, T: int) -> None:
        """Announce a pass over `T` more tokens of each sequence."""
        before, self.lengths = self.lengths, [length + T for length in self.lengths]
        self.offset, self.places = before[0], None
        if len(set(before)) > 1:
            self.offset = mx.array(before)
            positions_bt = self.offset[:, None] + mx.arange(T)
            self.places = mx.pad(positions_bt, [(0, self.count - len(before)), (0, 0)])[:, None, :, None]

    def mask(self, T: int, window: int | None = None) -> Mask:
        """Return the mask of the announced pass, for `T` queries that see at most the last `window` tokens."""
        S = max(self.lengths)
        if not isinstance(self.offset, mx.array) and (window is None or window >= S):
            return "causal" if T > 1 else None
        positions_bt = mx.array(self.offset).reshape(-1, 1) + mx.arange(T)
        mask_bts = mx.arange(S) <= positions_bt[..., None]
        if window is not None:
            mask_bts = mask_bts & (mx.arange(S) > positions_bt[..., None] - window)
        return mask_bts[:, None]


class BatchCache:
    """The keys and values of several sequences. It grows by doubling, up to the capacity of its rows.

    Attributes:
        rows: the places of the sequences; every pass over the network must be announced to it.
        layers: one cache for each layer of the network, which reads and writes it.

    Args:
        layers: the number of layers.
    """

    def __init__(self, layers: int, rows: Rows) -> None:
        self.rows = rows
        self.layers = [LayerCache(rows) for _ in range(layers)]

    def begin_with(self, other: "BatchCache", length: int) -> None:
        """Begin a sequence with the first `length` tokens in the first row of another cache."""
        row = len(self.rows.lengths)
        for ours, theirs in zip(self.layers, other.layers, strict=True):
            ours.put(row, theirs, 0, length)
        self.rows.lengths.append(length)

    def add(self, other: "BatchCache") -> None:
        """Copy the only sequence of another cache into the next row."""
        [length] = other.rows.lengths
        self.begin_with(other, length)

    def remove(self, row: int) -> None:
        """Remove a sequence. The last one takes its row."""
        length = self.rows.lengths.pop()
        last = len(self.rows.lengths)
        if row != last:
            for layer in self.layers:
                layer.put(row, layer, last, length)
            self.rows.lengths[row] = length


class LayerCache:
    """The keys and values of one layer, (rows, H, allocated tokens, D) both, with the methods of mlx-lm's caches."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._arrays: list[mx.array] = []

    @property
    def offset(self) -> int | mx.array:
        """How many tokens came before; (B,) if the sequences differ."""
        return self._rows.offset

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(array.nbytes for array in self._arrays)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """Return the mask for `N` queries that see at most the last `window_size` tokens.

        With `return_array` a causal mask is an array, too.
        """
        mask = self._rows.mask(N, window_size)
        if return_array and isinstance(mask, str):
            S = max(self._rows.lengths)
            return mx.arange(S) <= mx.arange(S - N, S)[:, None]
        return mask

    def update_and_fetch(self, keys_bhtd: mx.array, values_bhtd: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values, and return those of all tokens so far, (B, H, S, D) both."""
        B, _, T, _ = keys_bhtd.shape
        places, stop = self._rows.places, max(self._rows.lengths)
        self._allocate(stop, keys_bhtd, values_bhtd)
        for i, new_bhtd in enumerate((keys_bhtd, values_bhtd)):
            if places is None:
                self._arrays[i][:B, :, stop - T : stop] = new_bhtd
            else:
                # All rows are written, in use or not: this works in place, and is twice as fast as a general index.
                new_bhtd = mx.pad(new_bhtd, [(0, self._rows.count - B), (0, 0), (0, 0), (0, 0)])
                self._arrays[i] = mx.put_along_axis(self._arrays[i], places, new_bhtd, axis=2)
        keys, values = (array[:B, :, :stop] for array in self._arrays)
        return keys, values

    def put(self, row: int, other: "LayerCache", source: int, length: int) -> None:
        """Copy the first tokens of a row of this cache or of another."""
        self._allocate(length, *other._arrays)
        for ours, theirs in zip(self._arrays, other._arrays, strict=True):
            ours[row, :, :length] = theirs[source, :, :length]

    def _allocate(self, needed: int, *like: mx.array) -> None:
        """Make room for this many tokens in each row, with heads and widths as in the arrays `like`."""
        room = self._arrays[0].shape[2] if self._arrays else 0
        if needed > room or not self._arrays:
            size = min(self._rows.capacity, max(FEWEST, 1 << (needed - 1).bit_length()))
            new = [mx.zeros((self._rows.count, a.shape[1], size - room, a.shape[3]), a.dtype) for a in like]
            grown = [mx.concatenate(pair, axis=2) for pair in zip(self._arrays, new, strict=True)] if room else new
            self._arrays = grown


def make_cache(model: nn.Module, rows: int, capacity: int) -> BatchCache:
    """Return an empty cache for sequences of at most `capacity` tokens.

    Raises:
        UserError: the model keeps something other than keys and values, as recurrent networks do.
    """
    own = model.make_cache() if hasattr(model, "make_cache") else []
    if other := {type(cache).__name__ for cache in own} - {"KVCache", "RotatingKVCache"}:
        raise UserError(
            f"A model of type {model.model_type} can't generate here: it needs a cache of the kind {other.pop()}, and "
            "only keys and values are kept. Use mlx_lm.generate."
        )
    return BatchCache(len(model.layers), Rows(rows, capacity))


def bytes_per_token(model: nn.Module) -> int:
    """Return the bytes that the cache takes for each token of a sequence, measured with one token."""
    cache = make_cache(model, 1, 1)
    cache.rows.begin()
    cache.rows.grow(1)
    mx.eval(models.hidden(model, mx.array([[0]]), cache.layers))
    return sum(layer.nbytes for layer in cache.layers)
