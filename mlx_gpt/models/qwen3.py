"""Qwen3 (Yang et al. 2025, arXiv:2505.09388), the dense variant, from leaf to root.

Shapes: B sequences of T tokens, C = hidden_size, H query heads and K heads of keys and values, each of width D =
head_dim, V = vocab_size. Parameter names are those of Qwen3's published weights.
"""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_gpt.config import ModelConfig
from mlx_gpt.models.base import (
    Cache,
    Dropout,
    Mask,
    ScaledDotProductAttention,
    SwiGLU,
    create_attention_mask,
)


@dataclass(frozen=True)
class ModelArgs:
    """The keys of `config.json` that decide what the network computes. `dropout` acts only in training."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    tie_word_embeddings: bool
    rope_theta: float
    rms_norm_eps: float
    dropout: float = 0.0
    model_type: str = "qwen3"

    @classmethod
    def from_settings(cls, config: ModelConfig) -> "ModelArgs":
        """Return the sizes that the settings ask for, with about as many parameters as a GPT-2 of these settings.

        The gated MLP has three matrices instead of two, so it is 8/3 instead of 4 times as wide as the network. That is
        rounded up to a multiple of 64, as quantised weights need it.
        """
        return cls(
            vocab_size=config.vocab_size,
            hidden_size=config.n_embd,
            num_hidden_layers=config.n_layer,
            intermediate_size=64 * math.ceil(8 * config.n_embd / 3 / 64),
            num_attention_heads=config.n_head,
            num_key_value_heads=config.n_kv_head or config.n_head,
            head_dim=config.n_embd // config.n_head,
            max_position_embeddings=config.n_positions,
            tie_word_embeddings=config.tie_embeddings,
            rope_theta=10_000.0,
            rms_norm_eps=1e-6,
            dropout=config.dropout,
        )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ModelArgs":
        """Return the sizes in a `config.json`.

        Raises:
            KeyError: a value is missing.
            ValueError: a value is of another kind, or out of its range.
        """
        found = {field.name: config[field.name] for field in fields(cls) if field.default is MISSING}
        for name in ("rope_theta", "rms_norm_eps"):
            if type(found[name]) not in (int, float) or not 0 < found[name] < math.inf:
                raise ValueError(f"`{name}` must be a number above 0, not {found[name]!r}")
            found[name] = float(found[name])
        if not isinstance(found["tie_word_embeddings"], bool):
            raise ValueError(f"`tie_word_embeddings` must be true or false, not {found['tie_word_embeddings']!r}")
        for name in found.keys() - {"rope_theta", "rms_norm_eps", "tie_word_embeddings"}:
            if type(found[name]) is not int or found[name] < 1:
                raise ValueError(f"`{name}` must be a whole number of at least 1, not {found[name]!r}")
        args = cls(**found)
        if args.num_attention_heads % args.num_key_value_heads or args.head_dim % 2:
            raise ValueError("`num_key_value_heads` must divide `num_attention_heads`, and `head_dim` must be even")
        return args

    def to_config(self) -> dict[str, Any]:
        """Return `config.json` as transformers and mlx-lm read it."""
        return {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "num_hidden_layers": self.num_hidden_layers,
            "intermediate_size": self.intermediate_size,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "tie_word_embeddings": self.tie_word_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            # transformers 5 reads the second, everything older the first.
            "rope_theta": self.rope_theta,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
            "hidden_act": "silu",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "use_sliding_window": False,
            "initializer_range": 0.02,
        }


def computes(config: Mapping[str, Any]) -> bool:
    """Return whether this module computes what a `config.json` describes: no other rotation, window or bias."""
    ropes = [rope for name in ("rope_parameters", "rope_scaling") if (rope := config.get(name))]
    return (
        all(isinstance(rope, Mapping) and _is_plain(rope) for rope in ropes)
        and config.get("hidden_act", "silu") == "silu"
        and not config.get("attention_bias")
        and not config.get("use_sliding_window")
    )


def _is_plain(rope: Mapping[str, Any]) -> bool:
    """Return whether these are the parameters of a rotation without scaling, the same in all layers."""
    kinds = [rope[name] for name in ("rope_type", "type") if name in rope]
    return rope.keys() <= {"rope_type", "type", "rope_theta"} and all(kind == "default" for kind in kinds)


class Attention(nn.Module):
    """Causal self-attention with H heads, groups of which share one of K heads of keys and values."""

    # For cpu/decoding.py: the matrices that are divided by outputs, with how many each joins, and those by inputs.
    split_by_output, split_by_input = {"q_proj": 1, "k_proj": 1, "v_proj": 1}, ("o_proj",)

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        C, D = args.hidden_size, args.head_dim
        self.head_dim = D
        self.q_proj = nn.Linear(C, args.num_attention_heads * D, bias=False)
        self.k_proj = nn.Linear(C, args.num_key_value_heads * D, bias=False)
        self.v_proj = nn.Linear(C, args.num_key_value_heads * D, bias=False)
        self.o_proj = nn.Linear(args.num_attention_heads * D, C, bias=False)
        self.q_norm = nn.RMSNorm(D, eps=args.rms_norm_eps)
        self.k_norm = nn.RMSNorm(D, eps=args.rms_norm_eps)
        self.rope = nn.RoPE(D, base=args.rope_theta)
        self.attend = ScaledDotProductAttention(D)
        self.resid_dropout = Dropout(args.dropout)

    def __call__(self, x_btc: mx.array, mask: Mask = None, cache: Cache | None = None) -> mx.array:
        q_bhtd, k_bktd, v_bktd = self.qkv(x_btc, cache.offset if cache is not None else 0)
        if cache is not None:
            k_bktd, v_bktd = cache.update_and_fetch(k_bktd, v_bktd)
        return self.project(self.attend(q_bhtd, k_bktd, v_bktd, mask))

    def qkv(self, x_btc: mx.array, offset: int | mx.array = 0) -> tuple[mx.array, mx.array, mx.array]:
        """Return queries (B, H, T, D), and keys and values (B, K, T, D), of tokens after `offset` others."""
        B, T, _ = x_btc.shape
        q_bhtd = self.q_norm(self.q_proj(x_btc).reshape(B, T, -1, self.head_dim)).transpose(0, 2, 1, 3)
        k_bktd = self.k_norm(self.k_proj(x_btc).reshape(B, T, -1, self.head_dim)).transpose(0, 2, 1, 3)
        v_bktd = self.v_proj(x_btc).reshape(B, T, -1, self.head_dim).transpose(0, 2, 1, 3)
        return self.rope(q_bhtd, offset=offset), self.rope(k_bktd, offset=offset), v_bktd

    def project(self, y_bhtd: mx.array) -> mx.array:
        """Return the output (B, T, C) from what the heads have gathered."""
        return self.resid_dropout(self.o_proj(y_bhtd.transpose(0, 2, 1, 3).flatten(2)))


class MLP(nn.Module):
    """The feed-forward half of a block, with a gate (Shazeer 2020, arXiv:2002.05202)."""

    # As in Attention.
    split_by_output, split_by_input = {"gate_proj": 1, "up_proj": 1}, ("down_proj",)

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.up_proj = nn.Linear(args.hidden_size, args.intermediate_size, bias=False)
        self.swiglu = SwiGLU()
        self.down_proj = nn.Linear(args.intermediate_size, args.hidden_size, bias=False)
        self.resid_dropout = Dropout(args.dropout)

    def __call__(self, x_btc: mx.array) -> mx.array:
        return self.resid_dropout(self.down_proj(self.swiglu(self.gate_proj(x_btc), self.up_proj(x_btc))))


class TransformerBlock(nn.Module):
    """Attention, then MLP. Each gets normalised input, and its output is added to the input."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.self_attn = Attention(args)
        self.post_attention_layernorm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)
        self.mlp = MLP(args)

    def __call__(self, x_btc: mx.array, mask: Mask = None, cache: Cache | None = None) -> mx.array:
        x_btc = x_btc + self.self_attn(self.input_layernorm(x_btc), mask, cache)
        return x_btc + self.mlp(self.post_attention_layernorm(x_btc))

    def stages(self) -> tuple[nn.Module, nn.Module, nn.Module, nn.Module]:
        """Return the modules in the order in which they compute."""
        return self.input_layernorm, self.self_attn, self.post_attention_layernorm, self.mlp


class Qwen3Model(nn.Module):
    """Everything below the head."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.embd_dropout = Dropout(args.dropout)
        self.layers = [TransformerBlock(args) for _ in range(args.num_hidden_layers)]
        self.norm = nn.RMSNorm(args.hidden_size, eps=args.rms_norm_eps)

    def __call__(self, inputs_bt: mx.array, cache: Sequence[Cache] | None = None) -> mx.array:
        x_btc = self.embd_dropout(self.embed_tokens(inputs_bt))
        mask = create_attention_mask(x_btc, cache[0] if cache else None)
        for i, block in enumerate(self.layers):
            x_btc = block(x_btc, mask, cache[i] if cache else None)
        return self.norm(x_btc)


class Model(nn.Module):
    """Qwen3, with its head tied to the token embedding or with a head of its own."""

    residual_projections = ("o_proj.weight", "down_proj.weight")

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = Qwen3Model(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    def __call__(self, inputs_bt: mx.array, cache: Sequence[Cache] | None = None) -> mx.array:
        """Return logits (B, T, V) of the token after each of `inputs_bt`.

        Args:
            inputs_bt: ids in [0, V); MLX does not notice others.
            cache: one cache per block; the tokens are added to it.
        """
        return self.head(self.hidden(inputs_bt, cache))

    def hidden(self, inputs_bt: mx.array, cache: Sequence[Cache] | None = None) -> mx.array:
        """Return the normalised output of the last block, (B, T, C)."""
        return self.model(inputs_bt, cache)

    def head(self, x: mx.array) -> mx.array:
        """Return logits (..., V) from hidden states (..., C)."""
        return self.model.embed_tokens.as_linear(x) if self.args.tie_word_embeddings else self.lm_head(x)

    @property
    def head_weight(self) -> mx.array:
        """The matrix (V, C) of the head."""
        return self.model.embed_tokens.weight if self.args.tie_word_embeddings else self.lm_head.weight

    @property
    def layers(self) -> list[TransformerBlock]:
        """The blocks."""
        return self.model.layers

    def with_layers(self, layers: Sequence[nn.Module]) -> "Model":
        """Return a copy that has other blocks, and shares everything else."""
        made = copy.copy(self)
        made.model = copy.copy(self.model)
        made.model.layers = list(layers)
        return made

    def sanitize(self, weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
        """Return the tensors of a Qwen3 file that are parameters here: a tied head is stored once."""
        return {k: w for k, w in weights.items() if not (self.args.tie_word_embeddings and k == "lm_head.weight")}

    def flops_per_token(self, seq_len: int) -> int:
        """Floating-point operations to train on one token in a window of `seq_len`, forward and backward.

        6 per parameter that multiplies something (not an untied embedding) and 12 H D `seq_len` per block for attention
        (Chowdhery et al. 2022, PaLM, arXiv:2204.02311, appendix B).
        """
        args, products = self.args, sum(weight.size for _, weight in tree_flatten(self.parameters()))
        if not args.tie_word_embeddings:
            products -= self.model.embed_tokens.weight.size
        attention = 12 * args.num_hidden_layers * args.num_attention_heads * args.head_dim * seq_len
        return 6 * products + attention
