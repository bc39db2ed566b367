"""Gives a trained network rows for new tokens."""

import dataclasses
from collections.abc import Sequence
from types import MappingProxyType

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place

# isort: split

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt import models
from mlx_gpt.errors import UserError
from mlx_gpt.models import quantized

NOISE = 0.1  # of each column's deviation


def grow_vocabulary(model: nn.Module, added: Sequence[int], seed: int) -> list[str]:
    """Give the tokens `added` fresh rows in the embedding and in an untied head, and make these longer if necessary.

    A head that has rows beyond the tokenizer's ids keeps its size, and the new tokens take these rows. A new row is the
    mean of the known rows, so that the new logits take little probability from the others (Hewitt 2021, "Initializing
    new word embeddings for pretrained language models"), with a little noise, so that the tokens differ.

    Args:
        added: the new tokens, whose ids come after all others.
        seed: decides the noise.

    Returns:
        The names of the parameters that have fresh rows.

    Raises:
        UserError: the network has no table with a row for each entry of its vocabulary, or a quantised one.
    """
    before = models.vocab_size(model)
    if any(isinstance(module, quantized.LAYERS) and len(module.weight) == before for module in model.modules()):
        raise UserError(
            "The weights are quantised, so <|im_start|> and <|im_end|> can't be added to the vocabulary: begin from "
            "the same model before it was quantised, or from one that has these tokens."
        )
    size = max(before, *(token + 1 for token in added))
    key = mx.random.key(seed)
    tables = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.Linear) and len(module.weight) == before and "wpe" not in name
    }
    if not tables:
        raise UserError("This model's vocabulary can't grow: begin from a model that has <|im_start|> and <|im_end|>.")
    grown = [(place, name) for place, table in tables.items() for name in ("weight", "bias") if name in table]
    for place, name in grown:
        key, subkey = mx.random.split(key)
        tables[place][name] = _grown(tables[place][name], size, added, subkey)
    model.args = dataclasses.replace(model.args, vocab_size=size)
    if getattr(model, "config", None) is not None:
        model.config = MappingProxyType({**model.config, "vocab_size": size})
    return [f"{place}.{name}" for place, name in grown]


def _grown(rows: mx.array, size: int, added: Sequence[int], key: mx.array) -> mx.array:
    """Return (size, ...) rows: the old ones, with those of the tokens `added` drawn anew."""
    old = rows[: min(added)].astype(mx.float32)
    mean, deviation = old.mean(axis=0), mx.sqrt(old.var(axis=0))
    fresh = mean + NOISE * deviation * mx.random.normal((len(added), *rows.shape[1:]), key=key)
    grown = mx.concatenate([rows, mx.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])
    grown[mx.array(added)] = fresh.astype(rows.dtype)
    mx.eval(grown)
    return grown
