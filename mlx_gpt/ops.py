"""Dropout, GELU, softmax and cross-entropy.

GPUs have fast exponentials and fused kernels, and there these are MLX's own. On the CPU MLX calls the C library's
`exp` once per element, forward and backward again, which is more than a third of a training step. There they are built
on an exponential that compiles to vector instructions, and keep what the backward pass would compute again.
"""

import math
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt import backend

# exp(r) on [-ln 2 / 2, ln 2 / 2] to float32 rounding: the polynomial through its Chebyshev nodes, lowest power first.
EXP = (1.0, 1.0, 0.5, 0.16666415, 0.04166635, 0.0083751325, 0.0013941117)
# ln 2 in two parts: times a small whole number the first is exact in float32.
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
LOWEST = -87.0  # exp of less is no normal float32: it is taken for this

# Logits at a time in `linear_cross_entropy`. On the CPU 4 MB of them stay in its cache; a GPU wants large products.
CHUNK_CPU, CHUNK_GPU, MIN_ROWS = 2**20, 2**25, 128

GELU_SLOPE, GELU_CUBE = math.sqrt(8 / math.pi), 0.044715


def exp_nonpositive(x: mx.array) -> mx.array:
    """exp(x) for x <= 0 in float32, within 2e-7 of its value; exp(-87) for anything lower. It has no gradient.

    exp(n ln 2 + r) is exp(r) with n added to the exponent's bits.
    """
    x = mx.maximum(x, LOWEST)
    n = (x * (1 / math.log(2)) - 0.5).astype(mx.int32)  # rounds to the nearest, since x is not positive
    whole = n.astype(mx.float32)
    r = (x - whole * LN2_HIGH) - whole * LN2_LOW
    power = EXP[-1] * r + EXP[-2]
    for coefficient in EXP[-3::-1]:
        power = power * r + coefficient
    return (power.view(mx.int32) + n * 2**23).view(mx.float32)


def gelu(x: mx.array) -> mx.array:
    """GELU in GPT-2's tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    return _gelu(x)[0] if _slow_exp(x) else nn.gelu_approx(x)


def softmax(scores: mx.array) -> mx.array:
    """Softmax over the last axis."""
    return _softmax(scores) if _slow_exp(scores) else mx.softmax(scores, axis=-1, precise=True)


def cross_entropy(logits: mx.array, targets: mx.array) -> mx.array:
    """Cross-entropy (...) in nats and float32 of logits (..., V) against ids (...)."""
    logits = logits.astype(mx.float32)
    return _cross_entropy(logits, targets)[0] if _slow_exp(logits) else mx.fast.cross_entropy(logits, targets)


def linear_cross_entropy(x: mx.array, weight: mx.array, targets: mx.array) -> mx.array:
    """Mean cross-entropy, a scalar in nats and float32, of the logits `x @ weight.T` against `targets`.

    The logits are made, and their gradient with them, for some rows at a time, so that all of them never stand at once:
    with a vocabulary of 50,000 they would be most of what training holds.

    Args:
        x: (N, C) hidden states.
        weight: (V, C).
        targets: (N,) ids.
    """
    return _linear_cross_entropy(x, weight, targets)[0]


def dropout(x: mx.array, rate: float, key: mx.array | None) -> mx.array:
    """Drop a share `rate` of `x` and scale up the rest (Srivastava et al. 2014); without a key, return `x`.

    The key is given, not drawn, so that a block that is computed again drops the same.
    """
    if key is None or rate == 0:
        return x
    return mx.where(mx.random.bernoulli(1 - rate, x.shape, key=key), x * (1 / (1 - rate)), 0)


def split(key: mx.array | None, count: int) -> Sequence[mx.array | None]:
    """As many keys from one, or as many times none."""
    return [None] * count if key is None else list(mx.random.split(key, count))


def rows_at_once(rows: int, vocab_size: int, on_gpu: bool) -> int:
    """How many of `rows` rows of logits `linear_cross_entropy` makes at a time."""
    most = max(MIN_ROWS, (CHUNK_GPU if on_gpu else CHUNK_CPU) // vocab_size)
    return math.ceil(rows / math.ceil(rows / most))  # even shares


def _slow_exp(x: mx.array) -> bool:
    return not backend.on_gpu() and x.dtype == mx.float32


@mx.custom_function
def _gelu(x: mx.array) -> tuple[mx.array, mx.array]:
    # x (1 + tanh(u / 2)) / 2 is x sigmoid(u); the sigmoid is returned for the gradient.
    u = GELU_SLOPE * (x + GELU_CUBE * (x * x * x))
    small = exp_nonpositive(-mx.abs(u))
    sigmoid = mx.where(u >= 0, 1.0, small) / (1 + small)
    return x * sigmoid, sigmoid


@_gelu.vjp
def _gelu_vjp(x: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> mx.array:
    sigmoid = outputs[1]
    slope_of_u = GELU_SLOPE * (1 + 3 * GELU_CUBE * (x * x))
    return cotangents[0] * (sigmoid + x * sigmoid * (1 - sigmoid) * slope_of_u)


@mx.custom_function
def _softmax(scores: mx.array) -> mx.array:
    weights = exp_nonpositive(scores - scores.max(axis=-1, keepdims=True))
    return weights * (1 / weights.sum(axis=-1, keepdims=True))


@_softmax.vjp
def _softmax_vjp(scores: mx.array, cotangent: mx.array, weights: mx.array) -> mx.array:
    product = weights * cotangent
    return product - weights * product.sum(axis=-1, keepdims=True)


@mx.custom_function
def _cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    # The exponentials and their sum are returned for the gradient.
    highest = logits.max(axis=-1, keepdims=True)
    exps = exp_nonpositive(logits - highest)
    total = exps.sum(axis=-1, keepdims=True)
    hit = mx.take_along_axis(logits, targets[..., None], axis=-1)
    return (mx.log(total) + highest - hit).squeeze(-1), exps, total


@_cross_entropy.vjp
def _cross_entropy_vjp(
    primals: tuple[mx.array, mx.array], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, mx.array]:
    logits, targets = primals
    weight = cotangents[0][..., None]
    _, exps, total = outputs
    hit = mx.arange(logits.shape[-1]) == targets[..., None]
    return exps * (weight / total) - mx.where(hit, weight, 0.0), mx.zeros_like(targets)


@mx.custom_function
def _linear_cross_entropy(x: mx.array, weight: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    # The mean, and its gradients for x and the weight, which cost little more while the logits are at hand.
    rows = len(x)

    def share(x: mx.array, weight: mx.array, targets: mx.array) -> mx.array:
        return cross_entropy(x @ weight.T, targets).sum() / rows

    size = rows_at_once(rows, len(weight), backend.on_gpu())
    dx: list[mx.array] = []
    total, dweight = mx.array(0.0), mx.array(0.0)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        # Else the logits of all chunks would be made before the first gradient.
        chunk = mx.depends(x[part], [total, dweight, *dx[-1:]])
        loss, (dchunk, dshare) = mx.value_and_grad(share, argnums=(0, 1))(chunk, weight, targets[part])
        total, dweight = total + loss, dweight + dshare.astype(mx.float32)
        dx.append(dchunk)
    return total, mx.concatenate(dx), dweight.astype(weight.dtype)


@_linear_cross_entropy.vjp
def _linear_cross_entropy_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, mx.array, mx.array]:
    _, dx, dweight = outputs
    scale = cotangents[0]
    return (scale * dx).astype(dx.dtype), (scale * dweight).astype(dweight.dtype), mx.zeros_like(primals[2])
