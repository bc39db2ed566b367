"""Reads GPT-2s: their keys in `config.json` and their tensors, as transformers or mlx-lm have written them."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gpt.errors import UserError, shown
from mlx_gpt.models import gpt2, quantized
from mlx_gpt.models.checks import check_memory, check_shapes
from mlx_gpt.models.tensors import cast_floats, read_arrays, read_header

# Decoding on a CPU reads some of the outputs of these weights at a time, so those should be contiguous.
SPLIT_BY_OUTPUT = ("attn.c_attn.weight", "mlp.c_fc.weight")
PREFIX = "transformer."  # which transformers writes before the names of a GPT-2's tensors
MLX_LM = gpt2.Model.mlx_lm_prefix  # which mlx-lm writes there, with the matrices as nn.Linear has them


def load_gpt2(folder: Path, config: dict[str, Any], dtype: mx.Dtype | None) -> nn.Module:
    """Read a GPT-2, in the names of transformers or of mlx-lm.

    Raises:
        UserError: as in `directory.load_model`.
    """
    args, path = gpt2_args(folder / "config.json", config), folder / "model.safetensors"
    packed = quantized.is_described(folder, config)
    stored = read_header(path, PREFIX, packed)
    written_by_mlx_lm = all(name.startswith(MLX_LM) for name in stored)
    if written_by_mlx_lm:
        stored = {name.removeprefix(MLX_LM): shape for name, shape in stored.items()}
    check_memory(path, [path], stored, dtype)
    schemes = quantized.schemes(path, config, stored, MLX_LM) if packed else {}
    plain = quantized.unpacked(path, stored, schemes)
    _check_dimensions(path, args, plain)
    expected = _shapes(args, in_file=not written_by_mlx_lm)
    check_shapes(path, plain, expected)
    if surplus := sorted(plain.keys() - expected.keys() - {"lm_head.weight"}):
        raise UserError(
            f"{path} has a tensor {shown(surplus[0])}, which no GPT-2 has: it belongs to another architecture."
        )
    arrays, model = read_arrays(path, MLX_LM if written_by_mlx_lm else PREFIX), gpt2.Model(args)
    if "lm_head.weight" in arrays and not mx.array_equal(arrays["lm_head.weight"], arrays["wte.weight"]):
        raise UserError(f"{path}: lm_head.weight differs from wte.weight, but GPT-2's head is its embedding.")
    weights = arrays if written_by_mlx_lm else model.sanitize(arrays)
    quantized.quantize(model, schemes)
    names = dict(tree_flatten(model.parameters()))
    model.update(tree_unflatten([(name, cast_floats(_laid_out(name, weights[name]), dtype)) for name in names]))
    return model


def gpt2_args(path: Path, config: Mapping[str, Any]) -> gpt2.ModelArgs:
    """Return the sizes of a GPT-2 from its `config.json` at `path`.

    Raises:
        UserError: it describes something that this GPT-2 is not.
    """
    asked = {
        "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
        "n_inner": (None, 4 * config["n_embd"] if isinstance(config.get("n_embd"), int) else None),
        "tie_word_embeddings": (True,),
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "add_cross_attention": (False,),
    }
    for key, fine in asked.items():
        if key in config and config[key] not in fine:
            found = shown(repr(config[key]))
            only = f"mlx-gpt supports only GPT-2's {fine[0]!r}"
            raise UserError(f"{path}: `{key}` is {found}, but {only}: use another model.")
    names = ("vocab_size", "n_layer", "n_head", "n_embd", "n_positions")
    for name in names:
        if name not in config:
            raise UserError(f"{path} lacks `{name}`: fetch the directory again.")
        if not isinstance(config[name], int) or isinstance(config[name], bool) or config[name] < 1:
            raise UserError(f"{path}: `{name}` must be a whole number of at least 1, not {shown(repr(config[name]))}.")
    if config["n_embd"] % config["n_head"]:
        sizes = f"`n_embd` {shown(config['n_embd'])} can't be shared by `n_head` {shown(config['n_head'])}"
        raise UserError(f"{path}: {sizes}.")
    fractions = {"layer_norm_epsilon": 1e-5, "resid_pdrop": 0.0}
    for name, default in fractions.items():
        value = config.get(name, default)
        lowest_is_fine = name == "resid_pdrop" and value == 0
        if not isinstance(value, int | float) or isinstance(value, bool) or not (0 < value < 1 or lowest_is_fine):
            raise UserError(f"{path}: `{name}` must be between 0 and 1, not {shown(repr(value))}.")
        fractions[name] = value
    return gpt2.ModelArgs(
        **{name: config[name] for name in names},
        dropout=fractions["resid_pdrop"],
        layer_norm_epsilon=fractions["layer_norm_epsilon"],
    )


def _shapes(args: gpt2.ModelArgs, in_file: bool) -> dict[str, tuple[int, ...]]:
    """Return the shape of each parameter of such a GPT-2 by name, or of each tensor of its file.

    It makes one block, because `n_layer` may be absurd.
    """
    one = gpt2.Model(dataclasses.replace(args, n_layer=1))
    weights = one.to_file() if in_file else dict(tree_flatten(one.parameters()))
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    blocks = {
        name.replace(".0.", f".{i}.", 1): shape
        for i in range(args.n_layer)
        for name, shape in shapes.items()
        if name.startswith("h.0.")
    }
    return {name: shape for name, shape in shapes.items() if name not in blocks} | blocks


def _check_dimensions(path: Path, args: gpt2.ModelArgs, stored: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a config whose sizes are not the file's, before any array of those sizes is made."""
    asked = {"wte.weight": (args.vocab_size, args.n_embd), "wpe.weight": (args.n_positions, args.n_embd)}
    check_shapes(path, stored, asked)
    if args.n_layer > len(stored):
        layers = shown(args.n_layer)
        raise UserError(f"{path} holds {len(stored)} tensors, too few for the {layers} layers of config.json.")


def _laid_out(name: str, weight: mx.array) -> mx.array:
    """Return the weight; those of `SPLIT_BY_OUTPUT` with their rows one after the other in memory."""
    return mx.contiguous(weight) if name.endswith(SPLIT_BY_OUTPUT) else weight
