"""Reads the JSON and the tensors of a model directory without trusting them, and writes tensors."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place

# isort: split

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, safe_open

from mlx_gpt.errors import UserError, shown
from mlx_gpt.files import check_free_space, write_text_whole

# Causal masks that old files store as if they were weights.
MASKS = (".attn.bias", ".attn.masked_bias")
FLOATS = ("F32", "F16", "BF16")
PACKED = "U32"
DTYPES = {
    mx.float32: "F32", mx.float16: "F16", mx.bfloat16: "BF16", mx.uint32: "U32", mx.uint64: "U64", mx.int32: "I32",
}  # fmt: skip
# GPT-2's config.json has 1 KB, and 100 layers make a header of 150 KB. In memory, both take many times as much.
MAX_JSON, MAX_HEADER = 10**6, 10**6


def read_json(path: Path, most: int = MAX_JSON) -> dict[str, Any]:
    """Return the object in a JSON file.

    Args:
        most: the highest size of the file in bytes.

    Raises:
        UserError: the file is missing, or holds no such object.
    """
    try:
        if path.stat().st_size > most or not path.is_file():
            raise ValueError
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path.parent} is not a model directory: it has no {path.name}.") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}.") from None
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON: fetch the directory again.") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} is not a JSON object: fetch the directory again.")
    return config


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object to a JSON file, whole or not at all."""
    write_text_whole(path, json.dumps(content, indent=2) + "\n")


def read_header(path: Path, prefix: str = "", packed: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor in a safetensors file by name; the library checks sizes and overlaps.

    Args:
        prefix: a prefix to remove from the names.
        packed: allow weights that are packed into whole numbers, if they have scales.

    Raises:
        UserError: the file is missing, damaged or too large to be a model's, or a tensor has another dtype.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    try:
        with path.open("rb") as start:
            size = int.from_bytes(start.read(8), "little")
        if MAX_HEADER < size < path.stat().st_size:
            raise UserError(f"{path} has a header of {size:,} bytes, more than any model needs: do not use it.")
        with safe_open(path, framework="np") as file:
            names = set(file.keys())
            for name in file.keys():  # noqa: SIM118 - not a dict
                if name.endswith(MASKS):
                    continue
                tensor = file.get_slice(name)
                is_packed = packed and tensor.get_dtype() == PACKED and f"{name.removesuffix('weight')}scales" in names
                if tensor.get_dtype() not in FLOATS and not is_packed:
                    kind = f"{shown(name)} has the type {tensor.get_dtype()}"
                    raise UserError(f"{path}: the tensor {kind}, but mlx-gpt reads only {FLOATS}: use another model.")
                if name.removeprefix(prefix) in shapes:
                    both = f"{shown(name.removeprefix(prefix))} twice, with and without `{prefix}` before its name"
                    raise UserError(f"{path} has the tensor {both}: fetch it again.")
                shapes[name.removeprefix(prefix)] = tuple(tensor.get_shape())
    except FileNotFoundError:
        raise UserError(f"{path.parent} has no {path.name}: mlx-gpt reads weights from safetensors only.") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror or error}.") from None
    except SafetensorError as error:
        raise UserError(f"{path} is damaged or cut short ({shown(error, 200)}): fetch it again.") from None
    return shapes


def read_arrays(path: Path, prefix: str = "") -> dict[str, mx.array]:
    """Return the tensors of a safetensors file by name, without the prefix. They are read when they are used."""
    try:
        return {name.removeprefix(prefix): array for name, array in mx.load(str(path)).items()}
    except RuntimeError as error:  # caused by a mask, since only masks may have any dtype
        raise UserError(f"{path} can't be read ({shown(error, 200)}): fetch it again.") from None


def checksum(paths: Sequence[Path]) -> str:
    """Return the SHA-256 of the contents of these files, joined in order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def save_arrays(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str] | None = None) -> None:
    """Write arrays to a safetensors file one after the other, and remove each from `arrays`.

    In this way, arrays that are not computed yet take memory only one at a time.

    Raises:
        OSError: the file could not be written in full.
    """
    check_free_space(path.parent, sum(array.nbytes for array in arrays.values()))
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, array in arrays.items():
        start, end = end, end + array.nbytes
        entries[name] = {"dtype": DTYPES[array.dtype], "shape": array.shape, "data_offsets": [start, end]}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        while arrays:
            array = arrays.pop(next(iter(arrays)))
            file.write(np.array(mx.contiguous(array).flatten().view(mx.uint8), copy=False).data)


def cast_floats(array: mx.array, dtype: mx.Dtype | None) -> mx.array:
    """Return an array in a dtype; packed weights stay as they are."""
    return array.astype(dtype) if dtype and mx.issubdtype(array.dtype, mx.floating) else array
