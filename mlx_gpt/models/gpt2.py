"""GPT-2 (Radford et al. 2019), from leaf to root.

Shapes: B sequences of T tokens, C = n_embd, H heads of width D = C / H, V = vocab_size. Parameter names are those of
GPT-2's published weights.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_gpt.config import ModelConfig
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

    @classmethod
    def from_settings(cls, config: ModelConfig) -> "ModelArgs":
        """Return the sizes that the settings ask for."""
        names = ("vocab_size", "n_layer", "n_head", "n_embd", "n_positions", "dropout")
        return cls(**{name: getattr(config, name) for name in names})

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

    # For cpu/decoding.py: the matrices that are divided by outputs, with how many each joins, and those by inputs.
    split_by_output, split_by_input = {"c_attn": 3}, ("c_proj",)

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.head_dim = args.n_embd // args.n_head
        self.c_attn = nn.Linear(args.n_embd, 3 * args.n_embd)
        self.attend = ScaledDotProductAttention(self.head_dim)
        self.c_proj = nn.Linear(args.n_embd, args.n_embd)
        self.resid_dropout = Dropout(args.dropout)

    def __call__(self, x_btc: mx.array, mask: Mask = None, cache: Cache | None = None) -> mx.array:
        q_bhtd, k_bhtd, v_bhtd = self.qkv(x_btc)
        if cache is not None:
            k_bhtd, v_bhtd = cache.update_and_fetch(k_bhtd, v_bhtd)
        return self.project(self.attend(q_bhtd, k_bhtd, v_bhtd, mask))

    def qkv(self, x_btc: mx.array, offset: int | mx.array = 0) -> tuple[mx.array, mx.array, mx.array]:
        """Return queries, keys and values, (B, H, T, D) each, of tokens at any `offset`."""
        B, T, _ = x_btc.shape
        q_bhtd, k_bhtd, v_bhtd = self.c_attn(x_btc).reshape(B, T, 3, -1, self.head_dim).transpose(2, 0, 3, 1, 4)
        return q_bhtd, k_bhtd, v_bhtd

    def project(self, y_bhtd: mx.array) -> mx.array:
        """Return the output (B, T, C) from what the heads have gathered."""
        return self.resid_dropout(self.c_proj(y_bhtd.transpose(0, 2, 1, 3).flatten(2)))


class MLP(nn.Module):
    """The feed-forward half of a block, four times as wide inside."""

    # As in Attention.
    split_by_output, split_by_input = {"c_fc": 1}, ("c_proj",)

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

    def stages(self) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """Return the modules in the order in which they compute."""
        return self.ln_1, self.attn, self.ln_2, self.mlp


class Model(nn.Module):
    """GPT-2 with its head tied to the token embedding."""

    residual_projections = ("c_proj.weight",)
    mlx_lm_prefix = "model."  # of the parameters' names in mlx-lm's network

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

    def with_layers(self, layers: Sequence[nn.Module]) -> "Model":
        """Return a copy that has other blocks, and shares everything else."""
        made = copy.copy(self)
        made.h = list(layers)
        return made

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
