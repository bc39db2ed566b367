"""Layers that the networks share, in addition to those of `mlx.nn`.

Shapes: B sequences of T tokens, C the width, H heads of width D, S tokens that can be attended to, V the vocabulary.

`cpu_twin` names a layer's computation, so that `mlx_gpt.cpu` can compute it in another way.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

Mask: TypeAlias = mx.array | str | None
"""(B or 1, 1, T, S), True where a query sees a token; "causal" for all tokens up to the query's own; None for all."""

SHORTEST_FUSED = 9  # queries; on Metal shorter ones take a kernel that cannot be trained with


class Cache(Protocol):
    """The keys and values of one layer for the tokens before, as in mlx-lm."""

    @property
    def offset(self) -> int | mx.array:
        """How many tokens came before: a number, or (B,) if the sequences differ."""
        ...

    def update_and_fetch(self, keys_bhtd: mx.array, values_bhtd: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values, and return those of all tokens so far, (B, H, S, D) both."""
        ...

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """Return the mask for the next `N` queries."""
        ...


def create_attention_mask(x_btc: mx.array, cache: Cache | None = None) -> Mask:
    """Return the mask for the tokens of `x_btc`, which come after those in the cache."""
    if cache is not None:
        return cache.make_mask(x_btc.shape[1])
    return "causal" if x_btc.shape[1] > 1 else None


class ScaledDotProductAttention(nn.Module):
    """softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, arXiv:1706.03762)."""

    cpu_twin = "attention"

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.scale = head_dim**-0.5

    def __call__(self, q_bhtd: mx.array, k_bhsd: mx.array, v_bhsd: mx.array, mask: Mask = None) -> mx.array:
        """Return what each query gathers from the values, (B, H, T, D)."""
        if self.training and q_bhtd.shape[2] < SHORTEST_FUSED:
            return self.unfused(q_bhtd, k_bhsd, v_bhsd, mask)
        return mx.fast.scaled_dot_product_attention(q_bhtd, k_bhsd, v_bhsd, scale=self.scale, mask=mask)

    def unfused(self, q_bhtd: mx.array, k_bhsd: mx.array, v_bhsd: mx.array, mask: Mask = None) -> mx.array:
        """Compute the same from elementary operations."""
        T, S = q_bhtd.shape[2], k_bhsd.shape[2]
        k_bhsd, v_bhsd = for_each_head(q_bhtd, k_bhsd, v_bhsd)
        scores_bhts = (q_bhtd * self.scale) @ k_bhsd.swapaxes(-1, -2)
        if isinstance(mask, str):
            mask = mx.arange(S) <= mx.arange(S - T, S)[:, None]
        if mask is not None:
            scores_bhts = mx.where(mask, scores_bhts, mx.finfo(scores_bhts.dtype).min)
        return mx.softmax(scores_bhts, axis=-1, precise=True) @ v_bhsd


def for_each_head(q_bhtd: mx.array, k_bksd: mx.array, v_bksd: mx.array) -> tuple[mx.array, mx.array]:
    """Repeat the K heads of keys and values for the H heads of queries that share them, (B, H, S, D) both."""
    shared_by = q_bhtd.shape[1] // k_bksd.shape[1]
    return (k_bksd, v_bksd) if shared_by == 1 else (mx.repeat(k_bksd, shared_by, 1), mx.repeat(v_bksd, shared_by, 1))


class GELU(nn.Module):
    """GELU in GPT-2's tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415), computed in float32."""

    cpu_twin = "gelu"

    def __call__(self, x: mx.array) -> mx.array:
        return _gelu(x)


@functools.partial(mx.compile, shapeless=True)
def _gelu(x: mx.array) -> mx.array:
    # A compiled kernel keeps every intermediate in its array's type: bfloat16 would round the argument to 8 bits.
    u = x.astype(mx.float32)
    u = 0.5 * u * (1 + mx.tanh(math.sqrt(2 / math.pi) * (u + 0.044715 * (u * u * u))))  # u**3 would call `pow`
    return u.astype(x.dtype)


class SwiGLU(nn.Module):
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202)."""

    cpu_twin = "swiglu"

    def __call__(self, gate: mx.array, up: mx.array) -> mx.array:
        return _swiglu(gate, up)


@functools.partial(mx.compile, shapeless=True)
def _swiglu(gate: mx.array, up: mx.array) -> mx.array:
    return nn.silu(gate) * up


class Dropout(nn.Module):
    """Zero a fraction `p` of the activations while training, and scale up the rest (Srivastava et al. 2014).

    The key is set from outside (`seed_dropout`) instead of drawn, so that a block drops the same activations when it is
    computed again for its gradient. Without a key nothing is dropped.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self._key: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        if not self.training or self.p == 0 or self._key is None:
            return x
        return mx.where(mx.random.bernoulli(1 - self.p, x.shape, key=self._key), x * (1 / (1 - self.p)), 0)


def set_dropout(model: nn.Module, p: float) -> None:
    """Have training drop a fraction `p` wherever the model has a `Dropout`."""
    for module in model.modules():
        if isinstance(module, Dropout):
            module.p = p


def has_dropout(model: nn.Module) -> bool:
    """Return whether training drops anything."""
    return any(isinstance(module, Dropout) and module.p > 0 for module in model.modules())


def seed_dropout(model: nn.Module, key: mx.array | None) -> None:
    """Give each `Dropout` of a model a key of its own, split from `key`; None switches them off."""
    layers = [module for module in model.modules() if isinstance(module, Dropout)]
    keys: Sequence[mx.array | None] = [None] * len(layers) if key is None else list(mx.random.split(key, len(layers)))
    for layer, layer_key in zip(layers, keys, strict=True):
        layer._key = layer_key


class Float32Embedding(nn.Embedding):
    """An embedding whose table stays float32 while the network computes in another dtype.

    The gradient of a lookup is a sum over all places where a token stands, added up in the table's own dtype. In
    bfloat16 the sum of 2,000 gradients of 1e-3 is 0.5 instead of 2. So the rows are looked up first and cast after.
    """

    dtype: mx.Dtype

    def __call__(self, ids: mx.array) -> mx.array:
        return self.weight[ids].astype(self.dtype)

    def as_linear(self, x: mx.array) -> mx.array:
        """Use the table as a head: logits (..., V) from (..., C)."""
        return x @ self.weight.astype(x.dtype).T


def set_precision(model: nn.Module, dtype: mx.Dtype) -> None:
    """Prepare a model of float32 parameters to compute in `dtype`, with `cast_parameters`."""
    for module in model.modules():
        if dtype != mx.float32 and type(module) is nn.Embedding:
            module.__class__ = Float32Embedding
        if isinstance(module, Float32Embedding):
            module.dtype = dtype


def cast_parameters(model: nn.Module, parameters: dict, dtype: mx.Dtype) -> dict:
    """Cast all parameters to the dtype to compute in, except the tables of `Float32Embedding`s and packed weights."""
    kept = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, Float32Embedding)}

    def cast(name: str, p: mx.array) -> mx.array:
        return p if name in kept or not mx.issubdtype(p.dtype, mx.floating) else p.astype(dtype)

    return tree_map_with_path(cast, parameters)


def recompute_in_backward(layers: Sequence[nn.Module], on: bool = True) -> None:
    """Make each layer keep only its input for the backward pass (Chen et al. 2016, arXiv:1604.06174), or undo that.

    Everything else is computed again once the gradient that needs it has arrived, and all gradients of a layer are
    finished before the layer below is computed again. `mx.checkpoint` guarantees neither. MLX runs whatever is ready,
    and would then hold the activations of many layers at once.
    """
    for layer in layers:
        plain: Any = getattr(type(layer), "plain", type(layer))
        layer.__class__ = _recomputing(plain) if on else plain


@functools.cache
def _recomputing(layer_class: Any) -> Any:
    """Return a subclass whose calls are recomputed in the backward pass."""

    def call(self: nn.Module, x: mx.array, *args: Any, **kwargs: Any) -> mx.array:
        return _recomputed(self, lambda x: layer_class.__call__(self, x, *args, **kwargs))(x)

    return type(layer_class.__name__, (layer_class,), {"__call__": call, "plain": layer_class})


def _recomputed(layer: nn.Module, call: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    @mx.custom_function
    def forward(parameters: dict, x: mx.array) -> mx.array:
        layer.update(parameters)
        return call(x)

    @forward.vjp
    def backward(primals: tuple[dict, mx.array], cotangent: mx.array, output: mx.array) -> tuple[dict, mx.array]:
        parameters, x = primals
        flat = dict(tree_flatten(parameters))  # empty if the layer is frozen
        names, arrays = list(flat), list(flat.values())

        def again(x: mx.array, *arrays: mx.array) -> mx.array:
            layer.update(tree_unflatten(list(zip(names, arrays, strict=True))))
            return call(x)

        _, (dx, *darrays) = mx.vjp(again, [*mx.depends([x], [cotangent]), *arrays], [cotangent])
        (dx,) = mx.depends([dx], darrays)
        return tree_unflatten(list(zip(names, darrays, strict=True))), dx

    return lambda x: forward(layer.trainable_parameters(), x)
