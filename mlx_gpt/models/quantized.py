"""Quantised weights as mlx-lm stores them: packed into whole numbers, with a scale and a bias for each group.

A weight is scale * number + bias (`mx.quantize`, mode affine). `quantization` in `config.json` has the bits of a number
and the size of a group, and the exceptions by the names of their layers.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place

# isort: split

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt.errors import UserError, shown

KEYS = ("quantization", "quantization_config")
BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)
LAYERS = (nn.QuantizedLinear, nn.QuantizedEmbedding)

Shapes = Mapping[str, tuple[int, ...]]
Scheme = dict[str, int]
"""`group_size` and `bits`."""


def is_described(folder: Path, config: Mapping[str, Any]) -> bool:
    """Return whether a `config.json` describes quantised weights.

    Raises:
        UserError: they are of a kind that mlx-gpt does not read.
    """
    asked = next((config[key] for key in KEYS if key in config), None)
    if asked is None:
        return False
    if not isinstance(asked, Mapping) or "quant_method" in asked or asked.get("mode", "affine") != "affine":
        raise UserError(
            f"{folder}/config.json describes weights quantised in a way that mlx-gpt does not read: use those of "
            "mlx-lm in its mode affine, or unquantised ones."
        )
    return True


def schemes(path: Path, config: Mapping[str, Any], stored: Shapes, prefix: str = "") -> dict[str, Scheme]:
    """Return the bits and the group size of each quantised layer, by name.

    Args:
        path: the path to show in messages.
        stored: shapes of the tensors by name.
        prefix: the text before each name in `config`.

    Raises:
        UserError: the bits or the size of a group make no sense, or there is no quantised layer.
    """
    asked = next(config[key] for key in KEYS if key in config)
    layers = [name.removesuffix(".scales") for name in stored if name.endswith(".scales")]
    if not layers:
        raise UserError(f"{path} has no quantised weights, which config.json describes: fetch the directory again.")
    found = {}
    for layer in layers:
        own = next((asked[name] for name in (prefix + layer, layer) if isinstance(asked.get(name), Mapping)), asked)
        group_size, bits = own.get("group_size"), own.get("bits")
        if bits not in BITS or group_size not in GROUPS or own.get("mode", "affine") != "affine":
            raise UserError(
                f"{path}: {shown(layer)} is quantised with {shown(repr(bits))} bits in groups of "
                f"{shown(repr(group_size))}; mlx-gpt reads {BITS} bits in groups of {GROUPS}."
            )
        found[layer] = {"group_size": int(group_size), "bits": int(bits)}
    return found


def unpacked(path: Path, stored: Shapes, schemes: Mapping[str, Scheme]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors as if they were not quantised.

    Raises:
        UserError: the tensors of a layer do not belong together.
    """
    plain = dict(stored)
    for layer, scheme in schemes.items():
        weight, scales, biases = (plain.pop(f"{layer}.{leaf}", ()) for leaf in ("weight", "scales", "biases"))
        shape = (*weight[:-1], weight[-1] * 32 // scheme["bits"]) if weight else ()
        if not shape or scales != biases or scales != (*shape[:-1], shape[-1] // scheme["group_size"]):
            raise UserError(
                f"{path}: the tensors {shown(layer)}.weight {weight}, scales {scales} and biases {biases} are not "
                f"those of a layer with {scheme['bits']} bits in groups of {scheme['group_size']}."
            )
        plain[f"{layer}.weight"] = shape
    return plain


def quantize(model: nn.Module, schemes: Mapping[str, Scheme]) -> None:
    """Replace the layers in `schemes` of a fresh model by quantised layers, whose weights are loaded later."""
    if schemes:
        nn.quantize(model, class_predicate=lambda name, layer: schemes.get(name, False))


def is_quantized(model: nn.Module) -> bool:
    """Return whether any layer has quantised weights."""
    return any(isinstance(module, LAYERS) for module in model.modules())


def unknown_layer(model: nn.Module) -> str | None:
    """Return the name of a packed layer of another class than `LAYERS`, such as the experts of mlx-lm's mixtures."""
    packed = ((name, module) for name, module in model.named_modules() if "scales" in module)
    return next((name for name, module in packed if not isinstance(module, LAYERS)), None)


def input_dims(layer: nn.Module) -> int:
    """Return the number of inputs of a linear layer, or the width of an embedding."""
    columns: int = layer.weight.shape[-1]
    return columns * 32 // layer.bits if isinstance(layer, LAYERS) else columns


def dtype(layer: nn.Module) -> mx.Dtype:
    """Return the dtype of a layer's weight, once it is unpacked."""
    found: mx.Dtype = (layer.scales if isinstance(layer, LAYERS) else layer.weight).dtype
    return found


def dequantized(layer: nn.Module) -> mx.array:
    """Return a layer's weight in float32, exactly as the layer uses it."""
    if not isinstance(layer, LAYERS):
        return layer.weight.astype(mx.float32)
    scales, biases = layer.scales.astype(mx.float32), layer.biases.astype(mx.float32)
    return mx.dequantize(layer.weight, scales, biases, group_size=layer.group_size, bits=layer.bits)
