"""Low-rank adapters beside frozen linear layers (Hu et al. 2021, arXiv:2106.09685).

The frozen layer may be quantised (QLoRA: Dettmers et al. 2023, arXiv:2305.14314). Names and shapes are those of mlx-lm.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place

# isort: split

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gpt.errors import UserError
from mlx_gpt.models import quantized
from mlx_gpt.models.base import Dropout

LINEAR = (nn.Linear, nn.QuantizedLinear)


class LoRALinear(nn.Module):
    """linear(x) + scale * dropout(x) A B, where only A (in, rank) and B (rank, out) are trained.

    B begins as 0, so a fresh adapter changes nothing.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        self.linear = linear
        self.linear.freeze()
        self.dropout = Dropout(dropout)
        self.scale = scale
        self.lora_a = mx.zeros((quantized.input_dims(linear), rank))
        self.lora_b = mx.zeros((rank, len(linear.weight)))

    def __call__(self, x: mx.array) -> mx.array:
        y = self.linear(x)
        return mx.addmm(y, self.dropout(x) @ self.lora_a, (self.scale * self.lora_b).astype(y.dtype))

    def draw(self, key: mx.array) -> None:
        """Draw A uniformly from +-1 / sqrt(in)."""
        bound = 1 / math.sqrt(len(self.lora_a))
        self.lora_a = mx.random.uniform(-bound, bound, self.lora_a.shape, key=key)

    def weight(self) -> mx.array:
        """Return the weight (out, in) of the layer and its adapter together, in the dtype of the layer."""
        a, b = self.lora_a.astype(mx.float32), self.lora_b.astype(mx.float32)
        return (quantized.dequantized(self.linear) + self.scale * (a @ b).T).astype(quantized.dtype(self.linear))


def adapted_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """Return the adapted layers of a model by name; {} if it has none."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def adapt_blocks(model: nn.Module, rank: int, scale: float, dropout: float, blocks: int | None, seed: int) -> None:
    """Freeze a model, and give all linear layers of its last `blocks` blocks fresh adapters; None means all blocks.

    Raises:
        UserError: a layer is narrower than the rank, or the model has fewer blocks or no linear layers.
    """
    if blocks is not None and blocks > len(model.layers):
        raise UserError(f"`lora_layers` {blocks} is more than the model has: use {len(model.layers)} or less.")
    names = {id(module): name for name, module in model.named_modules()}
    chosen = {
        names[id(layer)]: layer
        for block in model.layers[-(blocks or 0) :]
        for _, layer in sorted(block.named_modules())
        if isinstance(layer, LINEAR)
    }
    if not chosen:
        raise UserError("This model has no linear layers that `lora_rank` could adapt: train all weights instead.")
    width = min(quantized.input_dims(layer) for layer in chosen.values())
    if rank > width:
        raise UserError(f"`lora_rank` {rank} is more than the model is wide: use at most {width}, such as 8.")
    adapt(model, chosen, rank, scale, dropout)
    made = adapted_layers(model)
    for layer, key in zip(made.values(), mx.random.split(mx.random.key(seed), len(made)), strict=True):
        layer.draw(key)


def adapt(model: nn.Module, layers: Mapping[str, nn.Module], rank: int, scale: float, dropout: float) -> None:
    """Freeze a model, and put adapters of zeros beside these of its layers."""
    model.freeze()
    model.update_modules(
        tree_unflatten([(name, LoRALinear(layer, rank, scale, dropout)) for name, layer in layers.items()])
    )


def keep_training(model: nn.Module, names: Collection[str]) -> None:
    """Unfreeze further parameters, by name, such as an embedding that has grown."""
    modules = dict(model.named_modules())
    for name in names:
        layer, _, leaf = name.rpartition(".")
        modules[layer].unfreeze(recurse=False, keys=leaf)


def fully_trained(model: nn.Module) -> dict[str, mx.array]:
    """Return the trained parameters that are not part of an adapter, by name."""
    return {
        name: weight
        for name, weight in tree_flatten(model.trainable_parameters())
        if not name.endswith((".lora_a", ".lora_b"))
    }


def frozen(model: nn.Module) -> dict[str, Any]:
    """Return the parameters that are not trained, as a tree."""
    trained = {name for name, _ in tree_flatten(model.trainable_parameters())}
    return tree_unflatten([(name, w) for name, w in tree_flatten(model.parameters()) if name not in trained])


def set_dtypes(model: nn.Module, dtype: mx.Dtype) -> None:
    """Convert the frozen parameters to the dtype to compute in, if that is exact, and the trained ones to float32."""
    if dtype == mx.float32:
        model.set_dtype(mx.float32)
    trained = tree_flatten(model.trainable_parameters())
    model.update(tree_unflatten([(name, weight.astype(mx.float32)) for name, weight in trained]))


def fuse(model: nn.Module) -> nn.Module:
    """Add each adapter to its layer in place, unless the layer is quantised, and return `model`."""
    plain = {}
    for name, layer in adapted_layers(model).items():
        if isinstance(layer.linear, nn.Linear):
            layer.linear.weight = layer.weight()
            plain[name] = layer.linear
    model.update_modules(tree_unflatten(list(plain.items())))
    return model


def without_adapters(model: nn.Module) -> nn.Module:
    """Return a network that has the adapters added to its weights, and none of them quantised.

    Every weight keeps its dtype, and packed ones get that of their scales. No array is computed before it is used.
    """
    made: nn.Module = type(model)(model.args)
    if hasattr(model, "config"):
        made.config = model.config
    modules, adapted = dict(model.named_modules()), adapted_layers(model)
    weights = []
    for name, weight in tree_flatten(model.parameters()):
        path, _, leaf = name.rpartition(".")
        module, around = modules[path], adapted.get(path.removesuffix(".linear"))
        if isinstance(module, LoRALinear) or (isinstance(module, quantized.LAYERS) and leaf in ("scales", "biases")):
            continue
        if leaf == "weight" and (around or isinstance(module, quantized.LAYERS)):
            weight = around.weight() if around else quantized.dequantized(module).astype(quantized.dtype(module))
        weights.append((f"{path.removesuffix('.linear') if around else path}.{leaf}", weight))
    made.load_weights(weights)
    return made.eval()
