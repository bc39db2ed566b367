"""The networks, by the `model_type` of their `config.json`, and the functions by which other modules use them.

A network has the interface of mlx-lm: `Model(args)`, which turns ids and caches into logits, and has `layers`, `args`
and `sanitize`. Ours have more: `hidden` and `head` apart, `head_weight`, `residual_projections` and `flops_per_token`,
and `to_file` if a file has other names or orientations. The CPU's decoder also needs `with_layers`, and `stages` of a
block. The functions here also work with a network of mlx-lm, which lacks all of these.
"""

import dataclasses
import importlib
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType, ModuleType
from typing import Any

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place

# isort: split

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_gpt.config import ModelConfig
from mlx_gpt.errors import UserError, shown
from mlx_gpt.models import quantized
from mlx_gpt.models.initial import init_weights as init_weights
from mlx_gpt.packages import install

OURS = {"gpt2": "mlx_gpt.models.gpt2", "qwen3": "mlx_gpt.models.qwen3"}


def create(config: ModelConfig) -> nn.Module:
    """Make the network that the settings describe. Its weights are not drawn yet (`init_weights` draws them)."""
    module = importlib.import_module(OURS[config.model_type])
    model: nn.Module = module.Model(module.ModelArgs.from_settings(config))
    return model


def architecture(config: Mapping[str, Any]) -> ModuleType:
    """Return the module with `Model` and `ModelArgs` for a `config.json`: ours, or mlx-lm's if that is installed.

    No code from a model's own directory is ever run.

    Raises:
        UserError: there is no such module.
    """
    model_type = config["model_type"]
    if model_type in OURS:
        module = importlib.import_module(OURS[model_type])
        if model_type == "gpt2" or module.computes(config):
            return module
    if importlib.util.find_spec("mlx_lm") is None:
        kind = f"A model of type {shown(model_type)}" + (" with these settings" if model_type in OURS else "")
        raise UserError(f"{kind} needs mlx-lm: {install('models')}. Without it mlx-gpt reads {', '.join(OURS)}.")
    from mlx_lm.utils import MODEL_REMAPPING

    name = MODEL_REMAPPING.get(model_type, model_type)
    if not re.fullmatch(r"[\w-]+", name) or importlib.util.find_spec(f"mlx_lm.models.{name}") is None:
        raise UserError(f"Neither mlx-gpt nor mlx-lm has a model of type {shown(model_type)}.")
    module = importlib.import_module(f"mlx_lm.models.{name}")
    if not (hasattr(module, "Model") and hasattr(module, "ModelArgs")):
        raise UserError(f"Neither mlx-gpt nor mlx-lm has a language model of type {shown(model_type)}.")
    return module


def n_params(model: nn.Module) -> int:
    """Return the number of parameters; a tied head counts once, and a packed weight as if it were not packed."""
    packed = {id(layer.weight): layer for layer in model.modules() if isinstance(layer, quantized.LAYERS)}
    extra = sum(layer.scales.size + layer.biases.size for layer in packed.values())
    sizes = (
        weight.size * 32 // packed[id(weight)].bits if id(weight) in packed else weight.size
        for _, weight in tree_flatten(model.parameters())
    )
    return sum(sizes) - extra


def n_trained(model: nn.Module) -> int:
    """Return the number of parameters that are trained."""
    return sum(weight.size for _, weight in tree_flatten(model.trainable_parameters()))


def flops_per_token(model: nn.Module, seq_len: int) -> int:
    """Return the floating-point operations to train on one token: the model's own count, or 6 per parameter."""
    own: Callable[[int], int] | None = getattr(model, "flops_per_token", None)
    return own(seq_len) if own else 6 * n_params(model)


def block_matrices(model: nn.Module) -> set[str]:
    """Return the names of the parameters of the blocks that are matrices."""
    blocks = [(name, module) for name, module in model.named_modules() if any(module is b for b in model.layers)]
    return {
        f"{block}.{name}" for block, module in blocks for name, w in tree_flatten(module.parameters()) if w.ndim == 2
    }


def context_length(model: nn.Module) -> int:
    """Return the longest sequence that a model can see, in tokens."""
    args: Any = model.args
    for name in ("n_positions", "max_position_embeddings"):
        if length := getattr(args, name, None):
            return int(length)
    return 4096  # mlx-lm's networks without a limit


def vocab_size(model: nn.Module) -> int:
    """Return the number of entries of the head."""
    return int(model.args.vocab_size)


def set_vocab_size(model: nn.Module, size: int) -> None:
    """Record the new size of a model's head in the model and in the `config.json` to be written for it."""
    model.args = dataclasses.replace(model.args, vocab_size=size)
    if getattr(model, "config", None) is not None:
        model.config = MappingProxyType({**model.config, "vocab_size": size})


def describe(model: nn.Module) -> str:
    """The sizes of a model in words."""
    args: Any = model.args
    sizes = [
        (len(model.layers), "layers"),
        (getattr(args, "n_head", None) or getattr(args, "num_attention_heads", None), "heads"),
        (getattr(args, "n_embd", None) or getattr(args, "hidden_size", None), "wide"),
    ]
    return ", ".join(f"{size} {name}" for size, name in sizes if size)


def trains_head(model: nn.Module) -> bool:
    """Return whether the head of a network of ours is trained."""
    return any(weight is model.head_weight for _, weight in tree_flatten(model.trainable_parameters()))


def hidden(model: nn.Module, inputs_bt: mx.array, cache: Sequence[Any] | None = None) -> mx.array:
    """Return the input of `head`: hidden states (B, T, C), or the logits themselves if a model gives only those."""
    inner: mx.array = (model.hidden if hasattr(model, "hidden") else model)(inputs_bt, cache)
    return inner


def head(model: nn.Module, x: mx.array) -> mx.array:
    """Return logits (..., V) from the result of `hidden`."""
    logits: mx.array = model.head(x) if hasattr(model, "head") else x
    return logits
