"""GPT-2: the network, from leaf to root.

Shapes: B sequences of T tokens, C = n_embd, H heads of width D = C / H, V = vocab_size. Parameter names are those of
GPT-2's published weights.
"""

import functools
import math
from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gpt import ops
from mlx_gpt.config import ModelConfig


class Cache(Protocol):
    """What a layer remembers of the tokens before: their keys and values."""

    @property
    def offset(self) -> int | mx.array:
        """How many there were, (B, 1) where texts differ in it."""
        ...

    @property
    def mask(self) -> mx.array | None:
        """Which tokens each query may see, (B, 1, T, S) for S tokens so far; None for all up to its own."""
        ...

    def update(self, keys_bhtd: mx.array, values_bhtd: mx.array) -> tuple[mx.array, mx.array]:
        """Append, and return the keys and values of all tokens so far."""
        ...


class Linear(nn.Linear):
    """A matrix and a bias."""

    def __call__(self, x: mx.array) -> mx.array:
        return ops.linear(x, self.weight, self.bias)


class LayerNorm(nn.LayerNorm):
    """Mean 0 and variance 1 over C, then a gain and a bias."""

    def __call__(self, x: mx.array) -> mx.array:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Causal self-attention with H heads (Vaswani et al. 2017, arXiv:1706.03762)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def __call__(self, x_btc: mx.array, cache: Cache | None = None, key: mx.array | None = None) -> mx.array:
        weights_key, output_key = ops.split(key, 2)
        q_bhtd, k_bhtd, v_bhtd = self.qkv(x_btc)
        y_btc = self.attend(q_bhtd, k_bhtd, v_bhtd, cache, weights_key)
        return ops.dropout(self.c_proj(y_btc), self.dropout, output_key)

    def qkv(self, x_btc: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Queries, keys and values, each (B, H, T, D)."""
        B, T, _ = x_btc.shape
        qkv_3bhtd = self.c_attn(x_btc).reshape(B, T, 3, self.n_head, -1).transpose(2, 0, 3, 1, 4)
        q_bhtd, k_bhtd, v_bhtd = mx.contiguous(qkv_3bhtd)  # copied once, not by every product
        return q_bhtd, k_bhtd, v_bhtd

    def attend(
        self,
        q_bhtd: mx.array,
        k_bhtd: mx.array,
        v_bhtd: mx.array,
        cache: Cache | None = None,
        key: mx.array | None = None,
    ) -> mx.array:
        """What each query gathers from the values up to its token, all heads side by side, (B, T, H D)."""
        mask = None
        if cache is not None:
            k_bhtd, v_bhtd = cache.update(k_bhtd, v_bhtd)
            mask = cache.mask
        y_bhtd = ops.causal_attention(q_bhtd, k_bhtd, v_bhtd, self.dropout, key, mask)
        return y_bhtd.transpose(0, 2, 1, 3).flatten(2)


class MLP(nn.Module):
    """The feed-forward half of a block, four times as wide inside."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)
        self.dropout = config.dropout

    def __call__(self, x_btc: mx.array, key: mx.array | None = None) -> mx.array:
        return ops.dropout(self.c_proj(ops.gelu(self.c_fc(x_btc))), self.dropout, key)


class Block(nn.Module):
    """Attention, then MLP, each normalised before and added to what came in."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = Attention(config)
        self.ln_2 = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = MLP(config)

    def __call__(self, x_btc: mx.array, cache: Cache | None = None, key: mx.array | None = None) -> mx.array:
        attn_key, mlp_key = ops.split(key, 2)
        x_btc = x_btc + self.attn(self.ln_1(x_btc), cache, attn_key)
        return x_btc + self.mlp(self.ln_2(x_btc), mlp_key)


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019) with its head tied to the token embedding."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.recompute = False  # the activations inside each block, in the backward pass, instead of keeping them
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.h = [Block(config) for _ in range(config.n_layer)]
        self.ln_f = LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)

    def __call__(self, ids_bt: mx.array, cache: Sequence[Cache] | None = None, key: mx.array | None = None) -> mx.array:
        """Logits (B, T, V) of the token after each of `ids_bt`, integers in [0, V): others index garbage.

        Args:
            cache: one per block, of the tokens before; they are added to it.
            key: of the random numbers for dropout; without one nothing is dropped.
        """
        return self.head(self.hidden(ids_bt, cache, key))

    def hidden(self, ids_bt: mx.array, cache: Sequence[Cache] | None = None, key: mx.array | None = None) -> mx.array:
        """The last block's normalised output, (B, T, C)."""
        embedding_key, *block_keys = ops.split(key, 1 + len(self.h))
        embedded_btc = self.embed(ids_bt, cache[0].offset if cache else 0)
        x_btc = ops.dropout(embedded_btc, self.config.dropout, embedding_key)
        for i, block in enumerate(self.h):
            # Bound here, the key is a constant of the block, not an input that would want a gradient.
            call = functools.partial(block, cache=cache[i] if cache else None, key=block_keys[i])
            x_btc = ops.recompute(block, call)(x_btc) if self.recompute else call(x_btc)
        return self.ln_f(x_btc)

    def embed(self, ids_bt: mx.array, start: int | mx.array = 0) -> mx.array:
        """What enters the first block, (B, T, C), for tokens of which the first is at position `start`, or (B, 1)."""
        return self.wte(ids_bt) + self.wpe(start + mx.arange(ids_bt.shape[1]))

    def head(self, x_btc: mx.array) -> mx.array:
        """Logits (B, T, V) from hidden states (B, T, C)."""
        return self.wte.as_linear(x_btc)

    def loss(self, ids_bt: mx.array, targets_bt: mx.array, key: mx.array | None = None) -> mx.array:
        """Mean cross-entropy, a scalar in nats and float32, of the token after each of `ids_bt`; `key` as above."""
        x_btc = self.hidden(ids_bt, key=key)
        return ops.linear_cross_entropy(x_btc.flatten(0, 1), self.wte.weight, targets_bt.flatten())

    def init_weights(self, seed: int) -> "GPT":
        """Draw fresh weights as GPT-2 does: normal with deviation 0.02, biases 0, norms 1.

        The two projections of each block that feed the residual stream get 0.02 / sqrt(2 n_layer), so that the stream
        does not grow with depth (Radford et al. 2019, section 2.3).
        """
        key = mx.random.key(seed)
        fresh = []
        for name, weight in tree_flatten(self.parameters()):
            if weight.ndim == 2:
                scale = 0.02 / math.sqrt(2 * self.config.n_layer) if name.endswith("c_proj.weight") else 0.02
                key, subkey = mx.random.split(key)
                fresh.append((name, scale * mx.random.normal(weight.shape, key=subkey)))
            else:
                fresh.append((name, mx.ones_like(weight) if _is_norm_gain(name) else mx.zeros_like(weight)))
        self.update(tree_unflatten(fresh))
        return self

    def n_params(self) -> int:
        """Number of parameters, the tied head counted once."""
        return sum(weight.size for _, weight in tree_flatten(self.parameters()))

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations to train on one token in a window of `seq_len`, forward and backward.

        6 per parameter that multiplies something (all but the positions) and 12 C `seq_len` per block for attention
        (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B).
        """
        products = self.n_params() - self.wpe.weight.size
        return 6 * products + 12 * self.config.n_layer * self.config.n_embd * seq_len


def _is_norm_gain(name: str) -> bool:
    return name.split(".")[-2].startswith("ln_") and name.endswith("weight")
