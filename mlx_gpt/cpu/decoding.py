"""Decoding on a CPU, for networks whose blocks are GPT-2's.

A product with few rows takes as long as reading its weight, and OpenBLAS shares it among cores only if there is a
single row. The operations between the products are so small that starting one costs more than computing it. So each
block is divided as in Megatron-LM (Shoeybi et al. 2019, arXiv:1909.08053): each part has its share of the heads and of
the MLP's inner width, and its own stream. Each weight is read once, by one core, and everything that need not wait for
the cache is compiled.
"""

import copy
import functools
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_gpt.cpu import streams

WORTH_IT = 2**19  # weights of a block: with fewer, parts wait for each other longer than they compute
BLOCK = {  # the modules of GPT-2's block, some of whose names other networks use, too
    *("", "ln_1", "attn", "attn.c_attn", "attn.attend", "attn.c_proj", "attn.resid_dropout"),
    *("ln_2", "mlp", "mlp.c_fc", "mlp.gelu", "mlp.c_proj", "mlp.resid_dropout"),
}


def decoder(model: nn.Module, sequences: int) -> nn.Module:
    """Return a copy of `model`, with other blocks, that decodes this many sequences at a time as `model` does.

    It shares the model's weights if their layout in memory is the one that a part needs, as it is after loading a
    directory. The copy is kept as long as the model has the same weights.
    """
    weights = [weight for _, weight in tree_flatten(model.parameters())]
    in_parts = all({name for name, _ in layer.named_modules()} == BLOCK for layer in model.layers)
    count = part_count(model, sequences) if in_parts else 1
    kept: tuple[nn.Module, int, list[mx.array]] | None = vars(model).get("_decoder")
    if kept and kept[1] == count and all(one is other for one, other in zip(kept[2], weights, strict=True)):
        return kept[0]
    kept = vars(model)["_decoder"] = None  # otherwise the copy would keep the earlier decoder alive
    made, original = copy.copy(model), cast(Any, type(model))
    made.__class__ = _subclass(_InParts if in_parts else _OnAllCores, original)
    if in_parts:
        made.parts, made.h = count, [_Block(block, count) for block in model.layers]
    vars(model)["_decoder"] = (made, count, weights)
    return made


def part_count(model: nn.Module, sequences: int) -> int:
    """Return into how many parts to divide a block.

    For one sequence, a product has a single row, and the BLAS itself shares it among the cores.
    """
    block = model.layers[0]
    large = block.attn.c_attn.weight.size + 2 * block.mlp.c_fc.weight.size + block.attn.c_proj.weight.size >= WORTH_IT
    return 2 if sequences > 1 and streams.cores() > 1 and block.attn.n_head % 2 == 0 and large else 1


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
        weight_vc = self.head_weight
        share = -(-len(weight_vc) // self.parts)
        weights = [weight_vc[i * share : (i + 1) * share] for i in range(self.parts)]
        return mx.concatenate([x @ weight.T for weight in streams.side_by_side(weights)], axis=-1)


class _Block(nn.Module):
    """A block whose parts add up to it."""

    def __init__(self, block: nn.Module, count: int) -> None:
        super().__init__()
        self._attn, mlp = _heads(block.attn, count), _inner(block.mlp, count)
        # Otherwise the compiled functions would compute these weights again each time.
        mx.eval([part.parameters() for part in self._attn], [part.parameters() for part in mlp])
        self._before = mx.compile(functools.partial(_before, block.ln_1, self._attn))
        self._after = mx.compile(functools.partial(_after, self._attn, block.ln_2, mlp))

    def __call__(self, x_btc: mx.array, mask: Any, cache: Any) -> mx.array:
        q, k, v = (list(parts) for parts in zip(*self._before(x_btc), strict=True))
        heads = k[0].shape[1]
        k_bhsd, v_bhsd = cache.update_and_fetch(_joined(k), _joined(v))
        attended = []
        for i, (attn, q_bhtd) in enumerate(streams.side_by_side(list(zip(self._attn, q, strict=True)))):
            own = slice(i * heads, (i + 1) * heads)
            attended.append(attn.attend(q_bhtd, k_bhsd[:, own], v_bhsd[:, own], mask).transpose(0, 2, 1, 3).flatten(2))
        return self._after(x_btc, attended)


def _joined(parts: list[mx.array]) -> mx.array:
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=1)


def _before(ln_1: nn.Module, attns: list[Any], x_btc: mx.array) -> list[tuple[mx.array, mx.array, mx.array]]:
    """Return the queries, keys and values of each part."""
    x_btc = ln_1(x_btc)
    return [attn.qkv(x_btc) for attn in streams.side_by_side(attns)]


def _after(attns: list[Any], ln_2: nn.Module, mlps: list[Any], x_btc: mx.array, attended: list[mx.array]) -> mx.array:
    """Return the output of the block, from its input and from what the heads of each part gathered."""
    parts = zip(attns, attended, strict=True)
    x_btc = sum([attn.c_proj(y_btc) for attn, y_btc in streams.side_by_side(parts)], x_btc)
    y_btc = ln_2(x_btc)
    return sum([mlp(y_btc) for mlp in streams.side_by_side(mlps)], x_btc)


class _Attention(nn.Module):
    """An attention layer with some of the heads."""

    def __init__(self, n_head: int, c_attn: nn.Linear, c_proj: nn.Linear, attend: nn.Module) -> None:
        super().__init__()
        self.n_head, self.c_attn, self.c_proj, self.attend = n_head, c_attn, c_proj, attend

    def qkv(self, x_btc: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Return queries, keys and values, each (B, H, T, D)."""
        B, T, _ = x_btc.shape
        qkv_3bhtd = self.c_attn(x_btc).reshape(B, T, 3, self.n_head, -1).transpose(2, 0, 3, 1, 4)
        q_bhtd, k_bhtd, v_bhtd = mx.contiguous(qkv_3bhtd)
        return q_bhtd, k_bhtd, v_bhtd


class _MLP(nn.Module):
    """An MLP with part of the inner width."""

    def __init__(self, c_fc: nn.Linear, gelu: nn.Module, c_proj: nn.Linear) -> None:
        super().__init__()
        self.c_fc, self.gelu, self.c_proj = c_fc, gelu, c_proj

    def __call__(self, x_btc: mx.array) -> mx.array:
        return self.c_proj(self.gelu(self.c_fc(x_btc)))


def _heads(attn: Any, count: int) -> list[_Attention]:
    """Return the attention divided into parts by heads."""
    if count == 1:
        return [_Attention(attn.n_head, attn.c_attn, attn.c_proj, attn.attend)]
    # The rows of the weight are those of all queries, then of all keys, then of all values.
    weights = zip(*(_outputs(weight, count) for weight in mx.split(attn.c_attn.weight, 3)), strict=True)
    biases = zip(*(_outputs(bias, count) for bias in mx.split(attn.c_attn.bias, 3)), strict=True)
    return [
        _Attention(attn.n_head // count, _linear(mx.concatenate(weight), mx.concatenate(bias)), c_proj, attn.attend)
        for weight, bias, c_proj in zip(weights, biases, _inputs(attn.c_proj, count), strict=True)
    ]


def _inner(mlp: Any, count: int) -> list[_MLP]:
    """Return the MLP divided into parts by its inner width."""
    weights, biases = _outputs(mlp.c_fc.weight, count), _outputs(mlp.c_fc.bias, count)
    return [
        _MLP(_linear(weight, bias), mlp.gelu, c_proj)
        for weight, bias, c_proj in zip(weights, biases, _inputs(mlp.c_proj, count), strict=True)
    ]


def _outputs(array: mx.array, count: int) -> list[mx.array]:
    """Return a weight or bias divided by its outputs, as views of a contiguous array."""
    return mx.split(mx.contiguous(array), count)


def _inputs(layer: nn.Linear, count: int) -> list[nn.Linear]:
    """Return a layer divided by its inputs, the bias in the first part: views, if its transpose is contiguous."""
    weights = mx.split(mx.contiguous(layer.weight.T), count)
    return [_linear(weight.T, None if i else layer.bias) for i, weight in enumerate(weights)]


def _linear(weight: mx.array, bias: mx.array | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer
