"""Decoding on a CPU, for our own networks.

A product with few rows takes as long as reading its weight, and OpenBLAS shares it among cores only if there is a
single row. The operations between the products are so small that starting one costs more than computing it. So each
block is divided as in Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053): each part has its share of the heads and of
the MLP's inner width, and its own stream. Each weight is read once, by one core, and everything that need not wait for
the cache is compiled.

A network that can be divided has `with_layers`, and its blocks have `stages`: norm, attention, norm and MLP. Attention
and MLP name the linear layers to divide. `split_by_output` has those to divide by their outputs, each with the number
of matrices stacked in its weight (3 for GPT-2's `c_attn`). `split_by_input` has those to divide by their inputs.
"""

import copy
import functools
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_gpt.cpu import streams

WORTH_IT = 2**19  # weights of a block: with fewer, parts wait for each other longer than they compute


def decoder(model: nn.Module, sequences: int) -> nn.Module:
    """Return a copy of `model`, with other blocks, that decodes this many sequences at a time as `model` does.

    It shares the model's weights if their layout in memory is the one that a part needs, as it is after loading a
    directory. The copy is kept as long as the model has the same weights.
    """
    weights = [weight for _, weight in tree_flatten(model.parameters())]
    in_parts = hasattr(model, "with_layers")
    count = part_count(model, sequences) if in_parts else 1
    kept: tuple[nn.Module, int, list[mx.array]] | None = vars(model).get("_decoder")
    if kept and kept[1] == count and all(one is other for one, other in zip(kept[2], weights, strict=True)):
        return kept[0]
    kept = vars(model)["_decoder"] = None  # otherwise the copy would keep the earlier decoder alive
    made = model.with_layers([_Block(block, count) for block in model.layers]) if in_parts else copy.copy(model)
    made.parts, original = count, cast(Any, type(model))
    made.__class__ = _subclass(_InParts if in_parts else _OnAllCores, original)
    vars(model)["_decoder"] = (made, count, weights)
    return made


def part_count(model: nn.Module, sequences: int) -> int:
    """Return into how many parts to divide a block.

    For one sequence, a product has a single row, and the BLAS itself shares it among the cores.
    """
    _, attention, _, mlp = model.layers[0].stages()
    if not all(isinstance(module[name], nn.Linear) for module in (attention, mlp) for name in module.split_by_output):
        return 1  # quantised
    large = sum(weight.size for _, weight in tree_flatten([attention, mlp]) if weight.ndim == 2) >= WORTH_IT
    units = [
        len(module[name].weight) // joined // unit
        for module, unit in ((attention, attention.head_dim), (mlp, 1))
        for name, joined in module.split_by_output.items()
    ]
    divisible = all(count % 2 == 0 for count in units)
    return 2 if sequences > 1 and streams.cores() > 1 and divisible and large else 1


@functools.cache
def _subclass(way: Any, original: Any) -> Any:
    return type(original.__name__, (way, original), {})


class _OnAllCores(nn.Module):
    """A network whose blocks are not divided."""

    def __call__(self, *args: Any) -> mx.array:
        streams.divide_cores()  # each time, since another network may divide the cores differently
        return super().__call__(*args)


class _InParts(nn.Module):
    """A network whose blocks and head are computed in parts."""

    parts: int

    def hidden(self, *args: Any) -> mx.array:
        """Return the last block's normalised output, (B, T, C)."""
        streams.divide_cores(self.parts)
        return super().hidden(*args)

    def head(self, x: mx.array) -> mx.array:
        """Logits (..., V) from hidden states (..., C)."""
        if self.parts == 1:
            return super().head(x)
        weight_vc = self.head_weight
        share = -(-len(weight_vc) // self.parts)
        weights = [weight_vc[i * share : (i + 1) * share] for i in range(self.parts)]
        return mx.concatenate([x @ weight.T for weight in streams.side_by_side(weights)], axis=-1)


class _Block(nn.Module):
    """A block whose parts add up to it."""

    def __init__(self, block: nn.Module, count: int) -> None:
        super().__init__()
        norm_1, attention, norm_2, mlp = block.stages()
        self._attentions, mlps = _parts(attention, count), _parts(mlp, count)
        # Otherwise the compiled functions would compute these weights again each time.
        mx.eval([part.parameters() for part in (*self._attentions, *mlps)])
        self._before = mx.compile(functools.partial(_before, norm_1, self._attentions))
        self._after = mx.compile(functools.partial(_after, self._attentions, norm_2, mlps))

    def __call__(self, x_btc: mx.array, mask: Any, cache: Any) -> mx.array:
        # The offset is an array, because a function is compiled for each number.
        q, k, v = (list(parts) for parts in zip(*self._before(x_btc, mx.array(cache.offset)), strict=True))
        heads = k[0].shape[1]
        k_bksd, v_bksd = cache.update_and_fetch(_joined(k), _joined(v))
        gathered = []
        for i, (part, q_bhtd) in enumerate(streams.side_by_side(list(zip(self._attentions, q, strict=True)))):
            own = slice(i * heads, (i + 1) * heads)
            gathered.append(part.attend(q_bhtd, k_bksd[:, own], v_bksd[:, own], mask))
        return self._after(x_btc, gathered)


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


def _before(
    norm: nn.Module, attentions: list[Any], x_btc: mx.array, offset: mx.array
) -> list[tuple[mx.array, mx.array, mx.array]]:
    """Return the queries, keys and values of each part."""
    x_btc = norm(x_btc)
    return [attention.qkv(x_btc, offset) for attention in streams.side_by_side(attentions)]


def _after(
    attentions: list[Any], norm: nn.Module, mlps: list[Any], x_btc: mx.array, gathered: list[mx.array]
) -> mx.array:
    """Return the output of the block, from its input and from what the heads of each part gathered."""
    parts = zip(attentions, gathered, strict=True)
    x_btc = sum([attention.project(y_bhtd) for attention, y_bhtd in streams.side_by_side(parts)], x_btc)
    y_btc = norm(x_btc)
    return sum([mlp(y_btc) for mlp in streams.side_by_side(mlps)], x_btc)


def _parts(module: Any, count: int) -> list[Any]:
    """Return copies of an attention layer or an MLP, each with a part of the heads or of the inner width."""
    if count == 1:
        return [module]
    parts = [copy.copy(module) for _ in range(count)]
    divided = {name: _outputs(module[name], joined, count) for name, joined in module.split_by_output.items()}
    divided |= {name: _inputs(module[name], count) for name in module.split_by_input}
    for name, layers in divided.items():
        for part, layer in zip(parts, layers, strict=True):
            part[name] = layer
    return parts


def _outputs(layer: nn.Linear, joined: int, count: int) -> list[nn.Linear]:
    """Return a layer divided by the outputs of each of its `joined` matrices: views of one, if it is contiguous."""

    def divide(array: mx.array) -> list[mx.array]:
        shares = zip(*(mx.split(mx.contiguous(one), count) for one in mx.split(array, joined)), strict=True)
        return [share[0] if joined == 1 else mx.concatenate(share) for share in shares]

    biases = divide(layer.bias) if "bias" in layer else [None] * count
    return [_linear(weight, bias) for weight, bias in zip(divide(layer.weight), biases, strict=True)]


def _inputs(layer: nn.Linear, count: int) -> list[nn.Linear]:
    """Return a layer divided by its inputs, the bias in the first part: views, if its transpose is contiguous."""
    weights = mx.split(mx.contiguous(layer.weight.T), count)
    return [_linear(weight.T, None if i else layer.get("bias")) for i, weight in enumerate(weights)]


def _linear(weight: mx.array, bias: mx.array | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer
