"""Reads sequences piece by piece through the cache, as generation does."""

import mlx.core as mx
import numpy as np

from mlx_gpt.generation.cache import BatchCache, Rows


def logits_in_pieces(model, ids, pieces):
    """The logits of equally long sequences, read in pieces of these lengths."""
    cache, parts, start = BatchCache(len(model.layers), Rows(len(ids), capacity=32)), [], 0
    cache.rows.begin(len(ids))
    for length in pieces:
        cache.rows.grow(length)
        parts.append(model(mx.array(ids[:, start : start + length]), cache.layers))
        start += length
    return np.array(mx.concatenate(parts, axis=1))
