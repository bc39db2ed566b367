"""Reads and writes adapters in the layout of mlx-lm.

`adapter_config.json` has the rank and the scale, and names the directory of the base in `model`. `adapters.safetensors`
has the matrices. If other parameters were trained as well, such as an embedding that has grown, they are in
`trained.safetensors`, because mlx-lm's files can't hold them.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place

# isort: split

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gpt import models
from mlx_gpt.errors import UserError, shown
from mlx_gpt.files import write_whole
from mlx_gpt.models import lora, quantized
from mlx_gpt.models.tensors import read_arrays, read_header, read_json, save_arrays, save_json

CONFIG, WEIGHTS, EXTRA = "adapter_config.json", "adapters.safetensors", "trained.safetensors"
LEAVES = ("lora_a", "lora_b")


@dataclass(frozen=True)
class Adapters:
    """Adapters as they are stored.

    Attributes:
        base: the model directory that the adapters belong to.
        arrays: the matrices, by their names in mlx-lm.
        extra: other parameters that were trained, by name.
    """

    folder: Path
    base: Path
    rank: int
    scale: float
    dropout: float
    arrays: Mapping[str, mx.array]
    extra: Mapping[str, mx.array]


def are_in(folder: Path) -> bool:
    """Return whether a folder has adapters and no model of its own."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def base_of(folder: Path) -> Path:
    """Return the directory of the model that the adapters in a folder belong to.

    They name the directory, or a model of the Hugging Face Hub that mlx-lm has downloaded.

    Raises:
        UserError: they name no directory, or one that is not there.
    """
    path = folder / CONFIG
    named = read_json(path).get("model")
    if not isinstance(named, str) or not named:
        raise UserError(f"{path} does not name the model of these adapters: add its directory as `model`.")
    for base in (folder / named, Path(named)):
        if (base / "config.json").is_file():
            return base.resolve()
    if downloaded := _in_hub_cache(named):
        return downloaded.resolve()
    raise UserError(
        f"The adapters in {folder} belong to the model in {shown(named, 300)}, which is not there: write its directory "
        f"into {path} as `model`."
    )


def _in_hub_cache(name: str) -> Path | None:
    """Return the directory of a model that mlx-lm has downloaded from the Hugging Face Hub; None if it is not there."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json")
    except HFValidationError:  # a path
        return None
    return Path(found).parent if isinstance(found, str) else None


def read(folder: Path) -> Adapters:
    """Read the adapters in a folder, for the base that they name.

    Raises:
        UserError: as in `read_from`, or the base is not there.
    """
    return read_from(folder, base_of(folder))


def read_from(folder: Path, base: Path) -> Adapters:
    """Read the adapters in a folder, for a base that may be anywhere.

    Raises:
        UserError: a file is missing or damaged, or the adapters are of another kind.
    """
    path = folder / CONFIG
    config = read_json(path)
    kind = config.get("fine_tune_type", "lora")
    if kind != "lora":
        raise UserError(f"{path} describes `fine_tune_type` {shown(repr(kind))}: mlx-gpt reads adapters of type lora.")
    asked = config.get("lora_parameters")
    asked = asked if isinstance(asked, dict) else {}
    rank, scale, dropout = asked.get("rank", 0), asked.get("scale", math.nan), asked.get("dropout", 0.0)
    numbers = all(isinstance(number, int | float) and math.isfinite(number) for number in (scale, dropout))
    if type(rank) is not int or rank < 1 or not numbers or not 0 <= dropout < 1:
        raise UserError(f"{path} lacks a sound `rank`, `scale` or `dropout`: fetch the adapters again.")
    if not read_header(folder / WEIGHTS):
        raise UserError(f"{folder / WEIGHTS} has no tensors: fetch the adapters again.")
    if (folder / EXTRA).exists():
        read_header(folder / EXTRA)
    stored = {name: read_arrays(folder / name) for name in (WEIGHTS, EXTRA) if (folder / name).exists()}
    return Adapters(folder, base, rank, float(scale), float(dropout), stored[WEIGHTS], stored.get(EXTRA, {}))


def attach(model: nn.Module, found: Adapters) -> None:
    """Freeze a model, and put stored adapters beside its layers.

    Raises:
        UserError: the adapters belong to another model; the message names the tensor.
    """
    prefix: str = getattr(model, "mlx_lm_prefix", "")
    modules = dict(model.named_modules())
    arrays = {name.removeprefix(prefix): array for name, array in found.arrays.items()}
    layers: dict[str, nn.Module] = {}
    for name, array in arrays.items():
        layer, _, leaf = name.rpartition(".")
        linear = modules.get(layer)
        if leaf not in LEAVES or not isinstance(linear, lora.LINEAR):
            raise UserError(
                f"The adapters in {found.folder} have a tensor {shown(name)}, for which {found.base} has no layer: "
                "they belong to another model."
            )
        size = quantized.input_dims(linear) if leaf == "lora_a" else len(linear.weight)
        fitting = (size, found.rank) if leaf == "lora_a" else (found.rank, size)
        if array.shape != fitting:
            raise UserError(
                f"The adapters in {found.folder} have a tensor {shown(name)} of shape {array.shape}, and {found.base} "
                f"needs {fitting} there: they belong to another model."
            )
        layers[layer] = linear
    if missing := [f"{layer}.{leaf}" for layer in layers for leaf in LEAVES if f"{layer}.{leaf}" not in arrays]:
        raise UserError(f"The adapters in {found.folder} have no tensor {shown(missing[0])}: fetch them again.")
    lora.adapt(model, layers, found.rank, found.scale, found.dropout)
    model.update(tree_unflatten(list(arrays.items())))
    _restore(model, found)


def _restore(model: nn.Module, found: Adapters) -> None:
    """Copy the other trained parameters to the model. An embedding or a head may have grown by some rows."""
    modules = dict(model.named_modules())
    for name, array in found.extra.items():
        layer, _, leaf = name.rpartition(".")
        there = modules[layer].get(leaf) if layer in modules else None
        if there is None or there.shape[1:] != array.shape[1:] or len(there) > len(array):
            raise UserError(f"{found.folder}/{EXTRA} has a tensor {shown(name)}, which does not fit {found.base}.")
        modules[layer][leaf] = array
        if len(array) > len(there):
            models.set_vocab_size(model, len(array))
    lora.keep_training(model, list(found.extra))


def apply(model: nn.Module, found: Adapters) -> nn.Module:
    """Return a model with stored adapters added to its weights, or beside them where they are quantised.

    The weights keep their dtypes.
    """
    before = dict(tree_flatten(model.parameters()))
    extra = {name: array.astype(before[name].dtype) for name, array in found.extra.items() if name in before}
    attach(model, dataclasses.replace(found, extra={**found.extra, **extra}))
    model = lora.fuse(model)
    for layer in lora.adapted_layers(model).values():
        dtype = layer.linear.scales.dtype
        layer.lora_a, layer.lora_b = layer.lora_a.astype(dtype), layer.lora_b.astype(dtype)
    return model


def write(folder: Path, model: nn.Module) -> None:
    """Write the adapters of a model, and other trained parameters if there are any, each file whole or not at all.

    The adapters name `model.base` as the directory of their base.
    """
    layers = lora.adapted_layers(model)
    one = next(iter(layers.values()))
    names = {id(module): name for name, module in model.named_modules()}
    blocks = [names[id(block)] + "." for block in model.layers]
    adapted = [block for block in blocks if any(name.startswith(block) for name in layers)]
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        "model": model.base,
        "num_layers": len(blocks) - blocks.index(adapted[0]),
        "lora_parameters": {
            "rank": one.lora_a.shape[1],
            "scale": one.scale,
            "dropout": one.dropout.p,
            "keys": sorted(
                {name.removeprefix(block) for block in adapted for name in layers if name.startswith(block)}
            ),
        },
    }
    prefix = getattr(model, "mlx_lm_prefix", "")
    arrays = {f"{prefix}{name}.{leaf}": layer[leaf] for name, layer in layers.items() for leaf in LEAVES}
    extra = lora.fully_trained(model)
    folder.mkdir(parents=True, exist_ok=True)
    save_json(folder / CONFIG, config)
    if extra:
        write_whole(folder / EXTRA, lambda part: save_arrays(part, extra, {"format": "mlx"}))
    write_whole(folder / WEIGHTS, lambda part: save_arrays(part, arrays, {"format": "mlx"}))
