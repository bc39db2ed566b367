"""Encodes gigabytes of text, each distinct word once."""

import re
from collections.abc import Sequence

import numpy as np

from mlx_gpt.tokenizer import Tokenizer
from mlx_gpt.tokenizer_training import SPACE

# This splits text more coarsely than GPT-2 does (Radford et al. 2019): letters, digits and signs are one class. Each of
# GPT-2's words lies within one chunk, and a chunk alone is split into the same words, so the ids of a text are the ids
# of its chunks.
CHUNKS = re.compile(rf" ?[^{SPACE}]+|[{SPACE}]+(?![^{SPACE}])|[{SPACE}]+")
CACHE_CHARACTERS = 50_000_000  # characters of distinct chunks, plus 100 each for Python's overhead: about 100 MB


class CorpusEncoder:
    """Encodes gigabytes of text, with the same ids as `Tokenizer.encode`.

    The library spends most of its time in a regular expression, and a corpus repeats its words. If the tokenizer splits
    text as GPT-2 does, each distinct chunk is therefore encoded once and looked up from then on.

    Args:
        tokenizer: the tokenizer to encode with.
        dtype: the type of the ids.
    """

    def __init__(self, tokenizer: Tokenizer, dtype: np.dtype) -> None:
        self._tokenizer, self._dtype = tokenizer, dtype
        self._cache: dict[str, bytes] = {}
        self._cached_characters = 0

    def encode_batch(self, texts: Sequence[str]) -> list[bytes]:
        """Return the ids of several texts, as the bytes of arrays of `dtype`. Errors as in `Tokenizer.encode`."""
        if self._tokenizer.is_bytes or not self._tokenizer.splits_like_gpt2:
            return self._encode(texts)
        if self._cached_characters > CACHE_CHARACTERS:
            self._cache.clear()
            self._cached_characters = 0
        chunked = [CHUNKS.findall(text) for text in texts]
        new = list(set().union(*chunked) - self._cache.keys())
        self._cache.update(zip(new, self._encode(new), strict=True))
        self._cached_characters += sum(map(len, new)) + 100 * len(new)
        return [b"".join(map(self._cache.__getitem__, chunks)) for chunks in chunked]

    def _encode(self, texts: Sequence[str]) -> list[bytes]:
        return [np.array(ids, self._dtype).tobytes() for ids in self._tokenizer.encode_batch(texts)]
