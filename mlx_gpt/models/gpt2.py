"""GPT-2 (Radford et al. 2019), from leaf to root.

Shapes: B sequences of T tokens, C = n_embd, H heads of width D = C / H, V = vocab_size. Parameter names are those of
GPT-2's published weights.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gpt.models.base import (
    GELU,
    Cache,
    Dropout,
    Mask,
    ScaledDotProductAttention,
    create_attention_mask,
)

# GPT-2's files store these as (in, out), the transpose of nn.Linear's.
CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


@dataclass(frozen=True)
class ModelArgs:
    """The keys of `config.json` that decide what the network computes."""

    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    n_positions: int
    dropout: float = 0.0
    layer_norm_epsilon: float = 1e-5
    model_type: str = "gpt2"

    def to_config(self) -> dict[str, Any]:
        """Return `config.json` as transformers and mlx-lm read it."""
        return {
            "architectures": ["GPT2LMHeadModel"],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "n_layer": self.n_layer,
            "n_head": self.n_head,
            "n_embd": self.n_embd,
            "n_positions": self.n_positions,
            "n_ctx": self.n_positions,
            "layer_norm_epsilon": self.layer_norm_epsilon,
            "activation_function": "gelu_new",
            "embd_pdrop": self.dropout,
            "attn_pdrop": 0.0,
            "resid_pdrop": self.dropout,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
        }


class Attention(nn.Module):
    """Causal self-attention with H heads."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.n_head = args.n_head
        self.c_attn = nn.Linear(args.n_embd, 3 * args.n_embd)
        self.attend = ScaledDotProductAttention(args.n_embd // args.n_head)
        self.c_proj = nn.Linear(args.n_embd, args.n_embd)
        self.resid_dropout = Dropout(args.dropout)

    def __call__(self, x_btc: mx.array, mask: Mask = None, cache: Cache | None = None) -> mx.array:
        B, T, C = x_btc.shape
        qkv_3bhtd = self.c_attn(x_btc).reshape(B, T, 3, self.n_head, -1).transpose(2, 0, 3, 1, 4)
        q_bhtd, k_bhtd, v_bhtd = qkv_3bhtd
        if cache is not None:
            k_bhtd, v_bhtd = cache.update_and_fetch(k_bhtd, v_bhtd)
        y_bhtd = self.attend(q_bhtd, k_bhtd, v_bhtd, mask)
        return self.resid_dropout(self.c_proj(y_bhtd.transpose(0, 2, 1, 3).reshape(B, T, C)))


class MLP(nn.Module):
    """The feed-forward half of a block, four times as wide inside."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.c_fc = nn.Linear(args.n_embd, 4 * args.n_embd)
        self.gelu = GELU()
        self.c_proj = nn.Linear(4 * args.n_embd, args.n_embd)
        self.resid_dropout = Dropout(args.dropout)

    def __call__(self, x_btc: mx.array) -> mx.array:
        return self.resid_dropout(self.c_proj(self.gelu(self.c_fc(x_btc))))


class TransformerBlock(nn.Module):
    """Attention, then MLP. Each gets normalised input, and its output is added to the input."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(args.n_embd, eps=args.layer_norm_epsilon)
        self.attn = Attention(args)
        self.ln_2 = nn.LayerNorm(args.n_embd, eps=args.layer_norm_epsilon)
        self.mlp = MLP(args)

    def __call__(self, x_btc: mx.array, mask: Mask = None, cache: Cache | None = None) -> mx.array:
        x_btc = x_btc + self.attn(self.ln_1(x_btc), mask, cache)
        return x_btc + self.mlp(self.ln_2(x_btc))


class Model(nn.Module):
    """GPT-2 with its head tied to the token embedding."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.wte = nn.Embedding(args.vocab_size, args.n_embd)
        self.wpe = nn.Embedding(args.n_positions, args.n_embd)
        self.embd_dropout = Dropout(args.dropout)
        self.h = [TransformerBlock(args) for _ in range(args.n_layer)]
        self.ln_f = nn.LayerNorm(args.n_embd, eps=args.layer_norm_epsilon)

    def __call__(self, inputs_bt: mx.array, cache: Sequence[Cache] | None = None) -> mx.array:
        """Return logits (B, T, V) of the token after each of `inputs_bt`.

        Args:
            inputs_bt: ids in [0, V); MLX does not notice others.
            cache: one cache per block; the tokens are added to it.
        """
        return self.head(self.hidden(inputs_bt, cache))

    def hidden(self, inputs_bt: mx.array, cache: Sequence[Cache] | None = None) -> mx.array:
        """Return the normalised output of the last block, (B, T, C)."""
        offset = mx.array(cache[0].offset if cache else 0)
        positions = offset[..., None] + mx.arange(inputs_bt.shape[1])  # (T,), or (B, T) if sequences differ
        x_btc = self.embd_dropout(self.wte(inputs_bt) + self.wpe(positions))
        mask = create_attention_mask(x_btc, cache[0] if cache else None)
        for i, block in enumerate(self.h):
            x_btc = block(x_btc, mask, cache[i] if cache else None)
        return self.ln_f(x_btc)

    def head(self, x: mx.array) -> mx.array:
        """Return logits (..., V) from hidden states (..., C)."""
        return self.wte.as_linear(x)

    @property
    def head_weight(self) -> mx.array:
        """The matrix (V, C) of the head."""
        return self.wte.weight

    @property
    def layers(self) -> list[TransformerBlock]:
        """The blocks."""
        return self.h

    def sanitize(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Turn the tensors of a GPT-2 file into the parameters here: plain names, nn.Linear's (out, in), no masks."""
        plain = {name.removeprefix("transformer."): weight for name, weight in weights.items()}
        return {
            name: _turn(name, weight)
            for name, weight in plain.items()
            if name != "lm_head.weight" and not name.endswith((".attn.bias", ".attn.masked_bias"))
        }

    def to_file(self) -> dict[str, mx.array]:
        """Return the parameters as a GPT-2 file has them; the inverse of `sanitize`."""
        return {name: _turn(name, weight) for name, weight in tree_flatten(self.parameters())}

    def init_weights(self, seed: int) -> "Model":
        """Draw fresh weights as GPT-2 does: normal with deviation 0.02, biases 0, norms 1.

        The two projections of each block that feed the residual stream get 0.02 / sqrt(2 n_layer), so that the stream
        does not grow with depth (Radford et al. 2019, section 2.3).
        """
        key = mx.random.key(seed)
        fresh = []
        for name, weight in tree_flatten(self.parameters()):
            if weight.ndim == 2:
                scale = 0.02 / math.sqrt(2 * self.args.n_layer) if name.endswith("c_proj.weight") else 0.02
                key, subkey = mx.random.split(key)
                fresh.append((name, scale * mx.random.normal(weight.shape, key=subkey)))
            else:
                is_gain = name.split(".")[-2].startswith("ln_") and name.endswith("weight")
                fresh.append((name, mx.ones_like(weight) if is_gain else mx.zeros_like(weight)))
        self.update(tree_unflatten(fresh))
        return self

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations to train on one token in a window of `seq_len`, forward and backward.

        6 per parameter that multiplies something (all but the positions) and 12 C `seq_len` per block for attention
        (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B).
        """
        parameters = sum(weight.size for _, weight in tree_flatten(self.parameters()))
        products = parameters - self.wpe.weight.size
        return 6 * products + 12 * self.args.n_layer * self.args.n_embd * seq_len


def _turn(name: str, weight: mx.array) -> mx.array:
    """Transpose between nn.Linear's order and the file's, where they differ; its own inverse."""
    return weight.T if name.endswith(CONV1D) else weight
