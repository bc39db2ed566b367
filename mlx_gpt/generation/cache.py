"""What a network remembers of the texts that it reads.

Shapes: B texts of T new tokens, S tokens of the longest with them, H heads of width D.
"""

import mlx.core as mx


class Rows:
    """Where the tokens of several texts lie: each text has a row, and fills it from the left.

    Attributes:
        count: how many texts there can be.
        capacity: how many tokens each may have.
        lengths: how many each has, for the rows in use, which are the first.
        offset: of the pass that `grow` has announced: how many tokens came before, (B, 1) where texts differ in it.
        mask: of that pass: which tokens each query may see, (B, 1, T, S); None for all up to its own.
        places: of that pass, where texts differ in it: where the tokens go, (count, 1, T, 1).
    """

    def __init__(self, count: int, capacity: int) -> None:
        self.count, self.capacity = count, capacity
        self.lengths: list[int] = []
        self.offset: int | mx.array = 0
        self.mask: mx.array | None = None
        self.places: mx.array | None = None

    def begin(self, texts: int = 1) -> None:
        """Begin so many texts in the next rows."""
        self.lengths += [0] * texts

    def grow(self, T: int) -> None:
        """Announce a pass over `T` more tokens of each text."""
        before, self.lengths = self.lengths, [length + T for length in self.lengths]
        if len(set(before)) == 1:
            self.offset, self.mask, self.places = before[0], None, None
        else:
            self.offset = mx.array(before)[:, None]
            positions_bt = self.offset + mx.arange(T)
            self.mask = (mx.arange(max(self.lengths)) <= positions_bt[..., None])[:, None]
            self.places = mx.pad(positions_bt, [(0, self.count - len(before)), (0, 0)])[:, None, :, None]


class KVCache:
    """The keys and values of texts, allocated once.

    Attributes:
        rows: where the texts lie; each pass over the network is announced to it.
        layers: what each layer of the network reads and writes; give them to it.

    Args:
        layers: how many.
    """

    def __init__(self, layers: int, rows: Rows) -> None:
        self.rows = rows
        self.layers = [LayerCache(rows) for _ in range(layers)]

    def add(self, other: "KVCache") -> None:
        """Copy the only text of another cache into the next row."""
        [length] = other.rows.lengths
        for ours, theirs in zip(self.layers, other.layers, strict=True):
            ours.put(len(self.rows.lengths), theirs, 0, length)
        self.rows.lengths.append(length)

    def remove(self, row: int) -> None:
        """Give up a text. The last one takes its row."""
        length = self.rows.lengths.pop()
        last = len(self.rows.lengths)
        if row != last:
            for layer in self.layers:
                layer.put(row, layer, last, length)
            self.rows.lengths[row] = length


class LayerCache:
    """The keys and values of one layer, or of some of its heads, (rows, H, capacity, D) both."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows
        self._arrays: list[mx.array] = []

    @property
    def offset(self) -> int | mx.array:
        """How many tokens came before, (B, 1) where texts differ in it."""
        return self._rows.offset

    @property
    def mask(self) -> mx.array | None:
        """Which tokens each query may see, (B, 1, T, S); None for all up to its own."""
        return self._rows.mask

    def update(self, keys_bhtd: mx.array, values_bhtd: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values, and return those of all tokens so far, (B, H, S, D) both."""
        B, _, T, _ = keys_bhtd.shape
        places, stop = self._rows.places, max(self._rows.lengths)
        self._allocate(keys_bhtd)
        for i, new_bhtd in enumerate((keys_bhtd, values_bhtd)):
            if places is None:
                self._arrays[i][:B, :, stop - T : stop] = new_bhtd
            else:
                # For all rows, in use or not: in place, and twice as fast as a general index.
                new_bhtd = mx.pad(new_bhtd, [(0, self._rows.count - B), (0, 0), (0, 0), (0, 0)])
                self._arrays[i] = mx.put_along_axis(self._arrays[i], places, new_bhtd, axis=2)
        keys, values = (array[:B, :, :stop] for array in self._arrays)
        return keys, values

    def put(self, row: int, other: "LayerCache", source: int, length: int) -> None:
        """Copy the first tokens of a row of this cache or of another."""
        self._allocate(other._arrays[0])
        for ours, theirs in zip(self._arrays, other._arrays, strict=True):
            ours[row, :, :length] = theirs[source, :, :length]

    def _allocate(self, like: mx.array) -> None:
        if not self._arrays:
            shape = (self._rows.count, like.shape[1], self._rows.capacity, like.shape[3])
            self._arrays = [mx.zeros(shape, like.dtype) for _ in range(2)]
