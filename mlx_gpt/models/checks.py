"""Checks that the config and the tensors of a model directory fit each other and the memory."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_gpt.device import GIB, device
from mlx_gpt.errors import UserError, shown


def check_sizes(path: Path, config: Mapping[str, Any], stored: Mapping[str, tuple[int, ...]]) -> None:
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


def check_memory(
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


def check_shapes(path: Path, stored: Mapping[str, tuple[int, ...]], asked: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse a directory whose tensors do not have the shapes `asked`, by name."""
    for name, shape in asked.items():
        if name not in stored:
            raise UserError(f"{path} has no tensor {name}, which config.json asks for: fetch the directory again.")
        if stored[name] != shape:
            both = f"{shown(stored[name])}, config.json asks for {shown(shape)}"
            raise UserError(f"{path}: tensor {name} has shape {both}.")
