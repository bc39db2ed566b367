"""Reads, writes and checks model directories.

transformers and mlx-lm read the same directories: `config.json`, `model.safetensors` with the names and the
orientation that transformers uses, and the tokenizer's files.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_gpt import models
from mlx_gpt.device import name_of
from mlx_gpt.errors import UserError, shown
from mlx_gpt.files import write_whole
from mlx_gpt.models import adapters, lora, quantized
from mlx_gpt.models.checks import check_memory, check_shapes, check_sizes
from mlx_gpt.models.gpt2_files import load_gpt2
from mlx_gpt.models.tensors import cast_floats, read_arrays, read_header, read_json, save_arrays, save_json
from mlx_gpt.models.tokenizer_files import TRAINED_WITH, ends_of_texts, save_tokenizer
from mlx_gpt.tokenizer import Tokenizer


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
    model = load_gpt2(folder, config, dtype) if config["model_type"] == "gpt2" else _load_other(folder, config, dtype)
    mx.eval(model.parameters())  # the reader is lazy: read everything while the file exists
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
    check_sizes(folder / "config.json", config, plain)
    check_memory(folder, paths, stored, dtype)
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
        check_shapes(folder, {name: tuple(array.shape) for name, array in weights.items()}, expected)
        if surplus := sorted(weights.keys() - expected.keys()):
            raise UserError(f"{folder} has a tensor {shown(surplus[0])}, which config.json has no place for.")
        model.load_weights([(name, cast_floats(array, dtype)) for name, array in weights.items()])
        models.context_length(model), models.hidden(model, mx.array([[0]]))  # computes nothing yet, but checks shapes
    except UserError:
        raise
    except Exception as error:  # the architecture's code met values that it did not expect
        why = shown(" ".join(str(error).split()) or type(error).__name__, 200).rstrip(".")
        raise UserError(f"{folder} can't be read as {shown(config['model_type'])}: {why}.") from None
    model.config = MappingProxyType(config)
    return model


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
