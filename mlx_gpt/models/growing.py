"""Adds rows for new tokens to a trained network."""

from collections.abc import Sequence

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place

# isort: split

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt import models
from mlx_gpt.errors import UserError
from mlx_gpt.models import quantized

NOISE = 0.1  # as a fraction of each column's standard deviation
# Names of the embedding and of an untied head, in our networks and in mlx-lm's.
EMBEDDINGS = (
    "wte", "embed_tokens", "tok_embeddings", "token_embeddings", "word_embeddings", "embeddings", "embedding", "embed",
    "embed_in",
)  # fmt: skip
HEADS = ("lm_head", "output", "embed_out")


def grow_vocabulary(model: nn.Module, added: Sequence[int], seed: int) -> list[str]:
    """Give the tokens `added` fresh rows in the embedding, and in the head if it is untied.

    A table that has spare rows beyond the tokenizer's ids keeps its size, and the new tokens take the spare rows. Other
    tables get longer. A fresh row is the mean of the known rows, so that the new tokens take little probability from
    the others (Hewitt 2021, "Initializing new word embeddings for pretrained language models"). A little noise is
    added, so that the new tokens differ.

    Args:
        added: ids of the new tokens, higher than all other ids.
        seed: decides the noise.

    Returns:
        The names of the parameters with fresh rows.

    Raises:
        UserError: the network has no embedding that can grow, its tables are quantised, or its head has an unknown
            name.
    """
    before = models.vocab_size(model)
    if any(isinstance(module, quantized.LAYERS) and len(module.weight) == before for module in model.modules()):
        raise UserError(
            "The weights are quantised, so <|im_start|> and <|im_end|> can't be added to the vocabulary: begin from "
            "the same model before it was quantised, or from one that has these tokens."
        )
    size = max(before, *(token + 1 for token in added))
    key = mx.random.key(seed)
    grown = tables_of_vocabulary(model)
    modules = dict(model.named_modules())
    for place, _, name in (table.rpartition(".") for table in grown):
        key, subkey = mx.random.split(key)
        modules[place][name] = _grown(modules[place][name], size, added, subkey)
    models.set_vocab_size(model, size)
    embeddings = [place for place, module in modules.items() if isinstance(module, nn.Embedding)]
    if not any(f"{place}.weight" in grown for place in embeddings) or _entries(model) != size:
        raise UserError("This model's vocabulary can't grow: begin from a model that has <|im_start|> and <|im_end|>.")
    return grown


def tables_of_vocabulary(model: nn.Module) -> list[str]:
    """Return the names of the parameters with a row for each entry of the vocabulary."""
    inside = {id(module) for block in model.layers for module in block.modules()}
    return [
        f"{place}.{name}"
        for place, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.Linear)
        and place.rpartition(".")[2] in (*EMBEDDINGS, *HEADS)
        and len(module.weight) == models.vocab_size(model)
        and id(module) not in inside
        for name in ("weight", "bias")
        if name in module
    ]


def _entries(model: nn.Module) -> int:
    """Return the number of logits for each token, without computing them."""
    entries: int = models.head(model, models.hidden(model, mx.array([[0]]))).shape[-1]
    return entries


def _grown(rows: mx.array, size: int, added: Sequence[int], key: mx.array) -> mx.array:
    """Return (size, ...) rows: the old rows, but with fresh ones for the tokens `added`."""
    old = rows[: min(added)].astype(mx.float32)
    mean, deviation = old.mean(axis=0), mx.sqrt(old.var(axis=0))
    fresh = mean + NOISE * deviation * mx.random.normal((len(added), *rows.shape[1:]), key=key)
    grown = mx.concatenate([rows, mx.zeros((size - len(rows), *rows.shape[1:]), rows.dtype)])
    grown[mx.array(list(added))] = fresh.astype(rows.dtype)
    mx.eval(grown)
    return grown
