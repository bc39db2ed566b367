"""Makes the network that a run trains: a fresh one, or one from weights, with or without adapters."""

import dataclasses
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from mlx_gpt import models
from mlx_gpt.config import Config
from mlx_gpt.device import Device
from mlx_gpt.distributed import Ranks
from mlx_gpt.errors import UserError
from mlx_gpt.models import adapters, lora, quantized
from mlx_gpt.models.base import set_dropout
from mlx_gpt.models.directory import load_model
from mlx_gpt.models.growing import grow_vocabulary, tables_of_vocabulary
from mlx_gpt.models.tokenizer_files import read_chat
from mlx_gpt.tokenizer import Tokenizer


def make_model(
    config: Config, weights: Path | None, tokenizer: Tokenizer, base: Path | None, here: Device, ranks: Ranks
) -> nn.Module:
    """Return the network in the model directory `weights`, or a fresh network by the settings.

    Args:
        base: the model directory whose weights stay frozen beside adapters; None to train all weights.

    Raises:
        UserError: the directory can't be read, does not fit the tokenizer or the length of the windows, or is
            quantised and has no adapters.
    """
    if not weights:
        shape = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
        fresh = models.init_weights(
            models.create(shape), config.training.seed, zero_projections=config.training.optimizer == "muon"
        )
        _follow_rank_0(fresh, ranks)  # rank 0 may have read a checkpoint
        return fresh
    model = load_model(base, dtype=None) if base else load_model(weights)
    if not base and quantized.is_quantized(model):
        raise UserError(f"The weights in {weights} are quantised, so only adapters can be trained: add --lora-rank 8.")
    if layer := quantized.unknown_layer(model):
        raise UserError(
            f"{layer} of the weights in {weights} is quantised in a way that can't be trained here: begin from weights "
            "that are not quantised."
        )
    tables: list[str] = []  # parameters to train in addition to adapters
    if tokenizer.added and min(tokenizer.added) <= models.vocab_size(model):
        tables = grow_vocabulary(model, tokenizer.added, config.training.seed)
    elif base and tokenizer.chat and not read_chat(base):  # the rows of the tokens around turns are untrained
        tables = tables_of_vocabulary(model)
    set_dropout(model, config.model.dropout)
    if base:
        _add_adapters(model, config, weights, base)
        lora.keep_training(model, tables)
    _follow_rank_0(model, ranks)
    # Files hold some matrices transposed. In that memory layout, products may round differently.
    model.update(tree_map(mx.contiguous, model.parameters()))
    if base:
        lora.set_dtypes(model, here.dtype(config.training.precision))
    if tokenizer.vocab_size > models.vocab_size(model):
        raise UserError(
            f"The tokenizer has {tokenizer.vocab_size:,} entries and the weights in {weights} have "
            f"{models.vocab_size(model):,}: they don't belong together."
        )
    if config.training.seq_len > models.context_length(model):
        raise UserError(
            f"`seq_len` {config.training.seq_len} is longer than the context of the model in {weights}: use "
            f"--seq-len {models.context_length(model)} or less."
        )
    return model


def _add_adapters(model: nn.Module, config: Config, weights: Path, base: Path) -> None:
    """Freeze a model, and give it the adapters in `weights`, or fresh ones if there are none."""
    settings = config.lora
    assert settings.lora_rank
    model.base = str(base)
    if adapters.are_in(weights):
        stored = dataclasses.replace(adapters.read_from(weights, base), dropout=settings.lora_dropout)
        adapters.attach(model, stored)
    else:
        lora.adapt_blocks(
            model,
            settings.lora_rank,
            settings.lora_scale,
            settings.lora_dropout,
            settings.lora_layers,
            config.training.seed,
        )


def _follow_rank_0(model: nn.Module, ranks: Ranks) -> None:
    """Give the network the vocabulary size of rank 0 and the names of its trained parameters; their values come later.

    Only rank 0 reads checkpoints, so after a resume the weights of the other ranks have not grown yet.
    """
    names = list(lora.fully_trained(model)) if lora.adapted_layers(model) else []
    size, names = ranks.broadcast((models.vocab_size(model), names))
    if size > models.vocab_size(model):
        grow_vocabulary(model, range(models.vocab_size(model), size), seed=0)
    lora.keep_training(model, names)
