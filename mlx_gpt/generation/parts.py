"""A network in parts that are computed side by side, which decoding on a CPU gains from.

A product with few rows takes as long as its weight takes to read, and OpenBLAS shares it among cores only if there is a
single row; what lies between the products is so small that starting an operation costs more than the operation. So each
block is divided as Megatron-LM divides it (Shoeybi et al. 2019, arXiv:1909.08053): a part has its share of the heads
and of the MLP's inner width, on a stream of its own, and parts meet twice per block. Each weight is read once, by one
core, and what need not wait for the cache is compiled.
"""

import functools
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_gpt import backend
from mlx_gpt.config import ModelConfig
from mlx_gpt.model import GPT, MLP, Attention, Block, Cache

WORTH_IT = 2**19  # weights of a block: with fewer, parts wait for each other longer than they compute


def in_parts(model: GPT, texts: int) -> "GPT | GPTInParts":
    """The network as its device decodes so many texts fastest: in parts on a CPU, as it is on a GPU.

    The parts stay with the model as long as it has the same weights, and as many parts suit.
    """
    if backend.on_gpu():
        return model
    weights = [weight for _, weight in tree_flatten(model.parameters())]
    count = part_count(model.config, backend.cores(), texts)
    parts: GPTInParts | None = getattr(model, "parts", None)
    if (
        parts is None
        or parts.count != count
        or any(one is not other for one, other in zip(parts.weights, weights, strict=True))
    ):
        parts = GPTInParts(model, count, weights)
        model.parts = parts
    return parts


def part_count(config: ModelConfig, cores: int, texts: int) -> int:
    """Into how many parts to divide a network. More than two have not been tried.

    The BLAS itself shares a product with a single row, that of one text, among the cores.
    """
    return 2 if texts > 1 and cores > 1 and config.n_head % 2 == 0 and 12 * config.n_embd**2 >= WORTH_IT else 1


class GPTInParts:
    """Reads tokens as `GPT` does, with a cache for each part of each block.

    Its weights are those of `model`, shared where they lie in memory as a part wants them: as `load_model` leaves them.
    """

    def __init__(self, model: GPT, count: int, weights: Sequence[mx.array] = ()) -> None:
        self.config = model.config
        self.weights = weights
        self.n_caches = count * len(model.h)
        self.count = count
        self._model = model
        self._blocks = [BlockInParts(block, count) for block in model.h]
        self._ln_f = mx.compile(model.ln_f)

    def hidden(self, ids_bt: mx.array, cache: Sequence[Cache]) -> mx.array:
        """The last block's normalised output, (B, T, C)."""
        x_btc = self._model.embed(ids_bt, cache[0].offset)
        for i, block in enumerate(self._blocks):
            x_btc = block(x_btc, cache[i * self.count : (i + 1) * self.count])
        return self._ln_f(x_btc)

    def head(self, x_bc: mx.array) -> mx.array:
        """Logits (B, V) from hidden states (B, C)."""
        weight_vc = self._model.wte.weight
        share = -(-len(weight_vc) // self.count)
        weights = [weight_vc[i * share : (i + 1) * share] for i in range(self.count)]
        return mx.concatenate([x_bc @ weight.T for weight in backend.side_by_side(weights)], axis=-1)


class BlockInParts:
    """A block whose parts add up to it."""

    def __init__(self, block: Block, count: int) -> None:
        self._attn, mlp = _heads(block.attn, count), _inner(block.mlp, count)
        # Or the compiled functions would make them anew each time.
        mx.eval([part.parameters() for part in self._attn], [part.parameters() for part in mlp])
        self._before = mx.compile(functools.partial(_before, block.ln_1, self._attn))
        self._after = mx.compile(functools.partial(_after, self._attn, block.ln_2, mlp))

    def __call__(self, x_btc: mx.array, caches: Sequence[Cache]) -> mx.array:
        parts = zip(self._attn, self._before(x_btc), caches, strict=True)
        attended = [attn.attend(q, k, v, cache) for attn, (q, k, v), cache in backend.side_by_side(parts)]
        return self._after(x_btc, attended)


def _before(ln_1: nn.LayerNorm, attns: list[Attention], x_btc: mx.array) -> list[tuple[mx.array, mx.array, mx.array]]:
    """Queries, keys and values of each part."""
    x_btc = ln_1(x_btc)
    return [attn.qkv(x_btc) for attn in backend.side_by_side(attns)]


def _after(
    attns: list[Attention], ln_2: nn.LayerNorm, mlps: list[MLP], x_btc: mx.array, attended: list[mx.array]
) -> mx.array:
    """What the block returns, from what came in and what the heads of each part gathered."""
    parts = zip(attns, attended, strict=True)
    x_btc = sum([attn.c_proj(y_btc) for attn, y_btc in backend.side_by_side(parts)], x_btc)
    y_btc = ln_2(x_btc)
    return sum([mlp(y_btc) for mlp in backend.side_by_side(mlps)], x_btc)


def _heads(attn: Attention, count: int) -> list[Attention]:
    """The heads in parts."""
    if count == 1:
        return [attn]
    # The rows of the weight are those of all queries, then of all keys, then of all values.
    weights = zip(*(_outputs(weight, count) for weight in mx.split(attn.c_attn.weight, 3)), strict=True)
    biases = zip(*(_outputs(bias, count) for bias in mx.split(attn.c_attn.bias, 3)), strict=True)
    parts = []
    for weight, bias, c_proj in zip(weights, biases, _inputs(attn.c_proj, count), strict=True):
        part = Attention.__new__(Attention)
        nn.Module.__init__(part)
        part.n_head, part.dropout = attn.n_head // count, attn.dropout
        part.c_attn, part.c_proj = _linear(mx.concatenate(weight), mx.concatenate(bias)), c_proj
        parts.append(part)
    return parts


def _inner(mlp: MLP, count: int) -> list[MLP]:
    """The inner width in parts."""
    parts = []
    weights, biases = _outputs(mlp.c_fc.weight, count), _outputs(mlp.c_fc.bias, count)
    for weight, bias, c_proj in zip(weights, biases, _inputs(mlp.c_proj, count), strict=True):
        part = MLP.__new__(MLP)
        nn.Module.__init__(part)
        part.dropout, part.c_fc, part.c_proj = mlp.dropout, _linear(weight, bias), c_proj
        parts.append(part)
    return parts


def _outputs(array: mx.array, count: int) -> list[mx.array]:
    """Shares of the outputs of a weight or bias: views, once it is contiguous."""
    return mx.split(mx.contiguous(array), count)


def _inputs(layer: nn.Linear, count: int) -> list[nn.Linear]:
    """A layer in shares of its inputs, the bias in the first: views, if its transpose is contiguous."""
    weights = mx.split(mx.contiguous(layer.weight.T), count)
    return [_linear(weight.T, None if i else layer.bias) for i, weight in enumerate(weights)]


def _linear(weight: mx.array, bias: mx.array | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight = weight
    if bias is not None:
        layer.bias = bias
    return layer
