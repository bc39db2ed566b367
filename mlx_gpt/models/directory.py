"""Reads, writes and checks model directories.

transformers and mlx-lm read the same directories: `config.json`, `model.safetensors` with the names and the
orientation that transformers uses, and the tokenizer's files.
"""

import dataclasses
import inspect
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gpt import models
from mlx_gpt.device import GIB, device, name_of
from mlx_gpt.errors import UserError, shown
from mlx_gpt.files import write_whole
from mlx_gpt.models import adapters, gpt2, lora, quantized
from mlx_gpt.models.tensors import read_arrays, read_header, read_json, save_arrays, save_json
from mlx_gpt.models.tokenizer_files import TRAINED_WITH, ends_of_texts, save_tokenizer
from mlx_gpt.tokenizer import Tokenizer

# Decoding on a CPU reads some of the outputs of these weights at a time, so those should be contiguous.
SPLIT_BY_OUTPUT = ("attn.c_attn.weight", "mlp.c_fc.weight")
PREFIX = "transformer."  # which transformers writes before the names of a GPT-2's tensors
MLX_LM = gpt2.Model.mlx_lm_prefix  # which mlx-lm writes there, with the matrices as nn.Linear has them


def save_model(folder: Path, model: nn.Module, tokenizer: Tokenizer, facts: Mapping[str, str] | None = None) -> None:
    """Write a model directory, each file whole or not at all, the weights last.

    If the model has adapters, they are added to the weights, and are also written alone to `adapters/`. That folder is
    left out if other parameters were trained as well, because mlx-lm would not read them there.

    Args:
        facts: for the header of the weights.
    """
    save_tokenizer(folder, model, tokenizer)
    if lora.adapted_layers(model):
        if not lora.fully_trained(model):
            save_adapters(folder / "adapters", model, tokenizer)
        model = lora.without_adapters(model)
    weights = _weights_in_file(model)
    dtype = name_of(mx.result_type(*weights.values()))
    save_json(folder / "config.json", {**config_of(model), **ends_of_texts(tokenizer), "dtype": dtype})
    # Without `format` transformers refuses the file.
    metadata = {"format": "pt", TRAINED_WITH: tokenizer.fingerprint, **(facts or {})}
    write_whole(folder / "model.safetensors", lambda part: save_arrays(part, weights, metadata))


def save_adapters(folder: Path, model: nn.Module, tokenizer: Tokenizer) -> None:
    """Write the adapters of a model, the other parameters that were trained, and the tokenizer.

    Each file is written whole or not at all. The folder opens as a model as long as its base is where the adapters say.
    """
    save_tokenizer(folder, model, tokenizer)
    adapters.write(folder, model)


def _weights_in_file(model: nn.Module) -> dict[str, mx.array]:
    return model.to_file() if hasattr(model, "to_file") else dict(tree_flatten(model.parameters()))


def config_of(model: nn.Module) -> dict[str, Any]:
    """Return the `config.json` of a model with plain weights: its directory's, or one made from its `args`."""
    own: Mapping[str, Any] | None = getattr(model, "config", None)
    config = dict(own) if own is not None else model.args.to_config()
    # `auto_map` names files with code for transformers, which a directory of ours does not have.
    return {name: value for name, value in config.items() if name not in (*quantized.KEYS, "auto_map")}


def load_model(folder: str | Path, dtype: mx.Dtype | None = mx.float32) -> nn.Module:
    """Read the network of a model directory: a GPT-2, a Qwen3 or, with mlx-lm installed, one of its architectures.

    Quantised weights stay packed. For a directory of adapters, this returns the base with the adapters.

    Args:
        dtype: of the parameters; None keeps that of each tensor in the file.

    Raises:
        UserError: a file is missing, damaged or of another architecture; the sentence names the tensor and the shapes.
    """
    folder = Path(folder)
    if adapters.are_in(folder):
        found = adapters.read(folder)
        return adapters.apply(load_model(found.base, dtype), found)
    config = read_config(folder)
    model = _load_gpt2(folder, config, dtype) if config["model_type"] == "gpt2" else _load_other(folder, config, dtype)
    mx.eval(model.parameters())  # the reader is lazy: read everything while the file exists
    return model


def _load_gpt2(folder: Path, config: dict[str, Any], dtype: mx.Dtype | None) -> nn.Module:
    args, path = gpt2_args(folder / "config.json", config), folder / "model.safetensors"
    packed = quantized.is_described(folder, config)
    stored = read_header(path, PREFIX, packed)
    written_by_mlx_lm = all(name.startswith(MLX_LM) for name in stored)
    if written_by_mlx_lm:
        stored = {name.removeprefix(MLX_LM): shape for name, shape in stored.items()}
    _check_memory(path, [path], stored, dtype)
    schemes = quantized.schemes(path, config, stored, MLX_LM) if packed else {}
    plain = quantized.unpacked(path, stored, schemes)
    _check_dimensions(path, args, plain)
    expected = _shapes(args, in_file=not written_by_mlx_lm)
    _check_shapes(path, plain, expected)
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
    model.update(tree_unflatten([(name, _as(_laid_out(name, weights[name]), dtype)) for name in names]))
    return model


def _load_other(folder: Path, config: dict[str, Any], dtype: mx.Dtype | None) -> nn.Module:
    """Read our Qwen3 or a network of mlx-lm. The directory contributes only numbers, never code."""
    architecture = models.architecture(config)
    paths = sorted(folder.glob("model*.safetensors"))
    if not paths:
        raise UserError(f"{folder} has no model.safetensors: mlx-gpt reads weights from safetensors only.")
    packed = quantized.is_described(folder, config)
    stored: dict[str, tuple[int, ...]] = {}
    for path in paths:
        stored |= read_header(path, packed=packed)
    schemes = quantized.schemes(folder, config, stored) if packed else {}
    plain = quantized.unpacked(folder, stored, schemes)
    _check_sizes(folder / "config.json", config, plain)
    _check_memory(folder, paths, stored, dtype)
    arrays: dict[str, mx.array] = {}
    for path in paths:
        arrays |= read_arrays(path)
    try:
        args = architecture.ModelArgs.from_dict(_known_keys(folder, config, architecture.ModelArgs, stored))
        model: nn.Module = architecture.Model(args)
        weights = model.sanitize(arrays) if hasattr(model, "sanitize") else arrays
        if packed:  # `sanitize` may have renamed the tensors
            shapes = {name: tuple(array.shape) for name, array in weights.items()}
            quantized.quantize(model, quantized.schemes(folder, config, shapes))
        expected = {name: tuple(array.shape) for name, array in tree_flatten(model.parameters())}
        _check_shapes(folder, {name: tuple(array.shape) for name, array in weights.items()}, expected)
        if surplus := sorted(weights.keys() - expected.keys()):
            raise UserError(f"{folder} has a tensor {shown(surplus[0])}, which config.json has no place for.")
        model.load_weights([(name, _as(array, dtype)) for name, array in weights.items()])
        models.context_length(model), models.hidden(model, mx.array([[0]]))  # computes nothing yet, but checks shapes
    except UserError:
        raise
    except Exception as error:  # the architecture's code met values that it did not expect
        why = shown(" ".join(str(error).split()) or type(error).__name__, 200).rstrip(".")
        raise UserError(f"{folder} can't be read as {shown(config['model_type'])}: {why}.") from None
    model.config = MappingProxyType(config)
    return model


def _as(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """Return an array in a dtype; packed weights stay as they are."""
    return array.astype(dtype) if dtype and mx.issubdtype(array.dtype, mx.floating) else array


def _known_keys(
    folder: Path, config: Mapping[str, Any], args: type, stored: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Return the keys of `config.json` as `args` reads them.

    transformers 5 writes the base and the scaling of rotary positions into `rope_parameters`, and what it leaves out
    has defaults that differ from mlx-lm's. mlx-lm ignores keys that it does not know, so without this the logits would
    differ.
    """
    known = inspect.signature(args).parameters
    found = {"tie_word_embeddings": "lm_head.weight" not in stored, **config}
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_parameters" not in known:
        if "rope_theta" not in rope and "rope_theta" not in config:
            raise UserError(f"{folder}/config.json: mlx-gpt does not read `rope_parameters` for each kind of layer.")
        found = {**{name: value for name, value in rope.items() if name in known}, **found}
        if rope.get("rope_type", "default") != "default":
            found.setdefault("rope_scaling", rope)
    needed = [name for name, parameter in known.items() if parameter.default is parameter.empty]
    if missing := [f"`{name}`" for name in needed if name not in found]:
        raise UserError(f"{folder}/config.json lacks {shown(', '.join(missing), 200)}: fetch the directory again.")
    return found


def read_config(folder: Path) -> dict[str, Any]:
    """Return a directory's `config.json`, with a `model_type`.

    Raises:
        UserError: it is missing, is not JSON, or asks for its own code to be run.
    """
    path = folder / "config.json"
    config = read_json(path)
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{path} describes {shown(config.get('model_type', 'no model'))}: it needs a `model_type`.")
    if "model_file" in config:  # mlx-lm would run this file; `auto_map` is for transformers, and nothing reads it here
        raise UserError(f"{path} brings code of its own, which mlx-gpt never runs: use another model.")
    return config


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
    _check_shapes(path, stored, asked)
    if args.n_layer > len(stored):
        layers = shown(args.n_layer)
        raise UserError(f"{path} holds {len(stored)} tensors, too few for the {layers} layers of config.json.")


def _check_sizes(path: Path, config: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a config with sizes that no tensor has or counts that the tensors can't fill, before using either."""
    dimensions = [size for shape in stored.values() for size in shape]
    for name in ("vocab_size", "hidden_size"):
        if (name == "vocab_size" or name in config) and config.get(name) not in dimensions:
            asked = f"`{name}` as {shown(repr(config.get(name)))}"
            raise UserError(f"{path} gives {asked}, but no tensor has that size: fetch the directory again.")
    for name, value in config.items():
        counts_layers = name in ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
        most = len(stored) if counts_layers else max(len(stored), *dimensions)
        is_count = name.startswith(("num_", "n_")) or any(word in name for word in ("layer", "head", "expert"))
        if is_count and isinstance(value, int) and value > most:
            asked = f"`{shown(name)}` as {shown(value)}"
            raise UserError(
                f"{path} gives {asked}, but the {len(stored)} tensors beside it are too few or too small for that: "
                "fetch the directory again."
            )


def _check_memory(
    path: Path, files: Sequence[Path], stored: Mapping[str, tuple[int, ...]], dtype: mx.Dtype | None
) -> None:
    """Refuse weights that would not fit into memory, in the dtypes of `files` or in `dtype`. Packed weights stay so."""
    here = device()
    if dtype:
        packed = {f"{name.removesuffix('scales')}weight" for name in stored if name.endswith(".scales")}
        needed = sum(math.prod(shape) * (4 if name in packed else dtype.size) for name, shape in stored.items())
    else:
        needed = sum(file.stat().st_size for file in files)
    if needed > here.memory:
        sizes = f"{needed / GIB:,.1f} GiB, and {here} can't hold them"
        raise UserError(f"The weights in {path} take {sizes}: take a smaller model.")


def _check_shapes(path: Path, stored: Mapping[str, tuple[int, ...]], asked: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in asked.items():
        if name not in stored:
            raise UserError(f"{path} has no tensor {name}, which config.json asks for: fetch the directory again.")
        if stored[name] != shape:
            both = f"{shown(stored[name])}, config.json asks for {shown(shape)}"
            raise UserError(f"{path}: tensor {name} has shape {both}.")


def _laid_out(name: str, weight: mx.array) -> mx.array:
    """Return the weight; those of `SPLIT_BY_OUTPUT` with their rows one after the other in memory."""
    return mx.contiguous(weight) if name.endswith(SPLIT_BY_OUTPUT) else weight
