"""Dropout, GELU, softmax and cross-entropy.

GPUs have fast exponentials and fused kernels, and there these are MLX's own. On the CPU MLX calls the C library's
`exp` once per element, forward and backward again, which is more than a third of a training step. There they are built
on an exponential that compiles to vector instructions, and keep what the backward pass would compute again.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gpt import backend

# exp(r) on [-ln 2 / 2, ln 2 / 2] to float32 rounding: the polynomial of least relative error, lowest power first.
EXP = (1.0, 1.0, 0.4999999106, 0.166664198, 0.04166822508, 0.008374815807, 0.001383684576)
# ln 2 in two parts: times a small whole number the first is exact in float32.
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
# exp of less is taken for 0. Beside exp(0) it is nothing, and gradients times it would be subnormal numbers, with which
# Intel's processors take a hundred times as long.
LOWEST = -64.0
ROUND = 1.5 * 2**23  # a float32 plus this has no digits after the point, and its last bits are the whole number

# tanh(u) / 2 is u P(u^2) / Q(u^2) on [-9, 9] to float32 rounding; beyond it is 1/2 to float32 rounding.
TANH_P = (0.5, 0.066905140877, 0.0017477957299, 1.030456588e-05, 6.677362219e-09)
TANH_Q = (1.0, 0.4671434462, 0.025876995177, 0.00032856399776, 7.776585562e-07)
TANH_END = 9.0

# Logits at a time in `linear_cross_entropy`. On the CPU 4 MB of them stay in its cache; a GPU wants large products.
CHUNK_CPU, CHUNK_GPU, MIN_ROWS = 2**20, 2**25, 128

ATTENTION_ROWS = 256  # queries at a time, on the CPU

GELU_SLOPE, GELU_CUBE = math.sqrt(2 / math.pi), 0.044715


def exp_nonpositive(x: mx.array) -> mx.array:
    """exp(x) for x <= 0 in float32, within 2e-7 of its value; 0 for anything below -64. It has no gradient.

    exp(n ln 2 + r) is exp(r) with n added to the exponent's bits.
    """
    x = mx.where(x < LOWEST, LOWEST, x)
    rounded = x * (1 / math.log(2)) + ROUND
    n = rounded - ROUND
    r = _end_of_kernel((x - n * LN2_HIGH) - n * LN2_LOW)
    power = _polynomial(EXP, r, r * r)
    exp = (power.view(mx.int32) + (rounded.view(mx.int32) << 23)).view(mx.float32)
    return mx.where(x == LOWEST, 0, exp)


def gelu(x: mx.array) -> mx.array:
    """GELU in GPT-2's tanh form (Hendrycks & Gimpel 2016, arXiv:1606.08415)."""
    return _gelu(x)[0] if _slow_exp(x) else nn.gelu_approx(x)


def linear(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    """`x @ weight.T + bias` for x (..., C), weight (D, C) and bias (D,)."""
    return mx.addmm(bias, x, weight.T) if backend.on_gpu() else _linear(x, weight, bias)


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Layer normalisation over the last axis (Ba et al. 2016, arXiv:1607.06450)."""
    if _slow_exp(x):
        return _layer_norm(x, weight, bias, mx.array(eps))[0]
    return mx.fast.layer_norm(x, weight, bias, eps)


def causal_attention(
    q_bhtd: mx.array,
    k_bhsd: mx.array,
    v_bhsd: mx.array,
    rate: float = 0.0,
    key: mx.array | None = None,
    mask: mx.array | None = None,
) -> mx.array:
    """What queries gather from the values of the tokens up to their own, (B, H, T, D) (Vaswani et al. 2017).

    The T queries are the last of S tokens.

    Args:
        rate, key: as in `dropout`, of the attention weights.
        mask: (B, 1, T, S), instead of that: true for the tokens that a query may see. Without dropout.
    """
    T, S, scale = q_bhtd.shape[2], k_bhsd.shape[2], 1 / math.sqrt(q_bhtd.shape[3])
    if mask is not None:
        return mx.fast.scaled_dot_product_attention(q_bhtd, k_bhsd, v_bhsd, scale=scale, mask=mask)
    if key is None and (T == 1 or backend.on_gpu()):
        mask = "causal" if T > 1 else None  # a single query may see all that is there
        return mx.fast.scaled_dot_product_attention(q_bhtd, k_bhsd, v_bhsd, scale=scale, mask=mask)
    # The fused kernels have no dropout.
    kept_bhts = dropout(mx.ones((*q_bhtd.shape[:3], S), q_bhtd.dtype), rate, key) if key is not None else None
    q_bhtd = q_bhtd * scale
    if not _slow_exp(q_bhtd):
        weights_bhts = mx.softmax(q_bhtd @ k_bhsd.swapaxes(-1, -2) + _future(T, S, q_bhtd.dtype), axis=-1, precise=True)
        return (weights_bhts if kept_bhts is None else weights_bhts * kept_bhts) @ v_bhsd
    return _attention(kept_bhts)(q_bhtd, k_bhsd, v_bhsd)[0]


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


def recompute(block: nn.Module, call: Callable[[mx.array], mx.array]) -> Callable[[mx.array], mx.array]:
    """`call`, a use of `block`, that keeps only its input for the backward pass (Chen et al. 2016, arXiv:1604.06174).

    The rest is computed again as soon as the gradient that needs it is there, and all gradients of a block are finished
    before the block before it is computed again. `mx.checkpoint` demands neither, and MLX, which takes what is ready,
    then holds many blocks at once.
    """

    @mx.custom_function
    def forward(parameters: dict, x: mx.array) -> mx.array:
        block.update(parameters)
        return call(x)

    @forward.vjp
    def backward(primals: tuple[dict, mx.array], cotangent: mx.array, output: mx.array) -> tuple[dict, mx.array]:
        parameters, x = primals
        names, arrays = zip(*tree_flatten(parameters), strict=True)

        def again(x: mx.array, *arrays: mx.array) -> mx.array:
            block.update(tree_unflatten(list(zip(names, arrays, strict=True))))
            return call(x)

        _, (dx, *darrays) = mx.vjp(again, [*mx.depends([x], [cotangent]), *arrays], [cotangent])
        (dx,) = mx.depends([dx], darrays)  # or the block before would be computed again while this one still stands
        return tree_unflatten(list(zip(names, darrays, strict=True))), dx

    return lambda x: forward(block.trainable_parameters(), x)


def split(key: mx.array | None, count: int) -> Sequence[mx.array | None]:
    """As many keys from one, or as many times none."""
    return [None] * count if key is None else list(mx.random.split(key, count))


def rows_at_once(rows: int, vocab_size: int, on_gpu: bool) -> int:
    """How many of `rows` rows of logits `linear_cross_entropy` makes at a time."""
    most = max(MIN_ROWS, (CHUNK_GPU if on_gpu else CHUNK_CPU) // vocab_size)
    return math.ceil(rows / math.ceil(rows / most))  # even shares


def attention_weights(tokens: int, on_gpu: bool) -> list[int]:
    """How many weights per head `causal_attention` of `tokens` tokens makes at a time, time after time.

    Those of what a block of queries has not to see are made, too.
    """
    rows = tokens if on_gpu else ATTENTION_ROWS
    ends = [min(tokens, start + rows) for start in range(0, tokens, rows)]
    return [(end - start) * end for start, end in zip([0, *ends], ends, strict=False)]


def _slow_exp(x: mx.array) -> bool:
    return not backend.on_gpu() and x.dtype == mx.float32


def _polynomial(coefficients: Sequence[float], x: mx.array, square: mx.array) -> mx.array:
    """Lowest power first, in pairs (Estrin's scheme), which is half as deep as Horner's."""
    pairs = [low + high * x for low, high in zip(coefficients[::2], coefficients[1::2], strict=False)]
    total = coefficients[-1] if len(coefficients) % 2 else pairs.pop()
    for pair in reversed(pairs):
        total = pair + total * square
    return total


def _end_of_kernel(x: mx.array) -> mx.array:
    """`x`, computed before what follows; it is not copied.

    `mx.compile` fuses at most eleven operations one after the other. Where that cuts off a constant, the constant is
    read from memory for each element and the kernel is not vectorised: better to say where it shall be cut.
    """
    return mx.contiguous(x)


@mx.custom_function
def _gelu(x: mx.array) -> tuple[mx.array, mx.array]:
    # x (1 + tanh(u)) / 2; half the tanh is returned for the gradient.
    u = x * (GELU_SLOPE + (GELU_SLOPE * GELU_CUBE) * (x * x))
    u = mx.where(u > TANH_END, TANH_END, u)
    u = _end_of_kernel(mx.where(u < -TANH_END, -TANH_END, u))
    square = u * u
    fourth = square * square
    half_tanh = u * _polynomial(TANH_P, square, fourth) / _polynomial(TANH_Q, square, fourth)
    return x * (0.5 + half_tanh), half_tanh


@_gelu.vjp
def _gelu_vjp(x: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> mx.array:
    half_tanh = outputs[1]
    slope_of_u = GELU_SLOPE + (3 * GELU_SLOPE * GELU_CUBE) * (x * x)
    return cotangents[0] * (0.5 + half_tanh + x * (0.5 - 2 * (half_tanh * half_tanh)) * slope_of_u)


@mx.custom_function
def _linear(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return mx.addmm(bias, x, weight.T)


@_linear.vjp
def _linear_vjp(
    primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    # MLX's own gradient of the weight is a transposed view, which all later kernels would have to read by strides.
    x, weight, _ = primals
    dy, x_nc = cotangent.reshape(-1, len(weight)), x.reshape(-1, x.shape[-1])
    return (dy @ weight).reshape(x.shape), dy.T @ x_nc, _sum_rows(dy)


def _sum_rows(x: mx.array) -> mx.array:
    """The sum (C,) over the rows of (N, C), as a product: the BLAS is faster at it than MLX's sums."""
    return (mx.ones((1, len(x)), x.dtype) @ x).squeeze(0)


def _sum_columns(x: mx.array) -> mx.array:
    """The sum (..., 1) over the last axis, as a product."""
    return x @ mx.ones((x.shape[-1], 1), x.dtype)


def _mean_columns(x: mx.array) -> mx.array:
    """The mean (..., 1) over the last axis."""
    return _sum_columns(x) * (1 / x.shape[-1])


@mx.custom_function
def _layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    # What is normalised and the factor are returned for the gradient.
    centred = x - _mean_columns(x)
    factor = mx.rsqrt(_mean_columns(centred * centred) + eps)
    normalised = centred * factor
    return normalised * weight + bias, normalised, factor


@_layer_norm.vjp
def _layer_norm_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, mx.array, mx.array, mx.array]:
    _, weight, _, eps = primals
    dy, (_, normalised, factor) = cotangents[0], outputs
    d = dy * weight
    dx = (d - _mean_columns(d) - normalised * _mean_columns(d * normalised)) * factor
    size = len(weight)
    return dx, _sum_rows((dy * normalised).reshape(-1, size)), _sum_rows(dy.reshape(-1, size)), mx.zeros_like(eps)


def _future(queries: int, tokens: int, dtype: mx.Dtype) -> mx.array:
    """-inf where a token comes after the query, (queries, tokens); the queries are the last."""
    return mx.triu(mx.full((queries, tokens), -mx.inf, dtype), k=tokens - queries + 1)


def _attention(kept_bhts: mx.array | None) -> Callable[..., tuple[mx.array, ...]]:
    """Attention of scaled queries, its weights times `kept_bhts`; some at a time, since the first see little."""

    def blocks(T: int, S: int) -> Iterator[tuple[slice, slice, mx.array | None]]:
        for start in range(0, T, ATTENTION_ROWS):
            end = min(T, start + ATTENTION_ROWS)
            queries, seen = slice(start, end), slice(0, S - T + end)
            yield queries, seen, None if kept_bhts is None else kept_bhts[:, :, queries, seen]

    @mx.custom_function
    def attend(q_bhtd: mx.array, k_bhsd: mx.array, v_bhsd: mx.array) -> tuple[mx.array, ...]:
        # Returned for the gradient: for each query 1 / the sum of its exponentials, and those, block by block.
        outputs, inverses, blocks_of_exps = [], [], []
        for queries, seen, kept in blocks(q_bhtd.shape[2], k_bhsd.shape[2]):
            q, k, v = q_bhtd[:, :, queries], k_bhsd[:, :, seen], v_bhsd[:, :, seen]
            scores = mx.addmm(_future(q.shape[2], k.shape[2], q.dtype), q, k.swapaxes(-1, -2))
            _, exps, sums = _exponentials(scores)
            inverse = 1 / sums
            outputs.append(((exps if kept is None else exps * kept) @ v) * inverse)
            inverses.append(inverse)
            blocks_of_exps.append(exps)
        return mx.concatenate(outputs, axis=2), mx.concatenate(inverses, axis=2), *blocks_of_exps

    @attend.vjp
    def attend_vjp(
        primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
    ) -> tuple[mx.array, mx.array, mx.array]:
        q_bhtd, k_bhsd, v_bhsd = primals
        y_bhtd, inverse_bht1, *blocks_of_exps = outputs
        dy_bhtd = cotangents[0] * inverse_bht1
        # The softmax's own sum over the weights' gradients is this (Dao et al. 2022, arXiv:2205.14135, appendix B).
        through_sum_bht1 = (dy_bhtd * y_bhtd).sum(axis=-1, keepdims=True)
        dq, dk, dv = [], mx.zeros_like(k_bhsd), mx.zeros_like(v_bhsd)
        for (queries, seen, kept), exps in zip(blocks(q_bhtd.shape[2], k_bhsd.shape[2]), blocks_of_exps, strict=True):
            dy = dy_bhtd[:, :, queries]
            dweights = dy @ v_bhsd[:, :, seen].swapaxes(-1, -2)
            if kept is not None:
                dweights = dweights * kept
            dscores = exps * (dweights - through_sum_bht1[:, :, queries])
            dq.append(dscores @ k_bhsd[:, :, seen])
            dk[:, :, seen] += dscores.swapaxes(-1, -2) @ q_bhtd[:, :, queries]
            dv[:, :, seen] += (exps if kept is None else exps * kept).swapaxes(-1, -2) @ dy
        return mx.concatenate(dq, axis=2), dk, dv

    return attend


def _exponentials(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The highest of each row, (..., 1), the exponentials of what is below it, and their sum, (..., 1)."""
    highest = x.max(axis=-1, keepdims=True)
    exps = exp_nonpositive(x - highest)
    return highest, exps, _sum_columns(exps)


@mx.custom_function
def _cross_entropy(logits: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    # The exponentials and their sums are returned for the gradient.
    highest, exps, sums = _exponentials(logits)
    hit = mx.take_along_axis(logits, targets[..., None], axis=-1)
    return (mx.log(sums) + highest - hit).squeeze(-1), exps, sums


@_cross_entropy.vjp
def _cross_entropy_vjp(
    primals: tuple[mx.array, mx.array], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, mx.array]:
    logits, targets = primals
    weight = cotangents[0][..., None]
    _, exps, sums = outputs
    hit = mx.arange(logits.shape[-1]) == targets[..., None]
    return exps * (weight / sums) - mx.where(hit, weight, 0.0), mx.zeros_like(targets)


@mx.custom_function
def _linear_cross_entropy(x: mx.array, weight: mx.array, targets: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    # The mean, and its gradients for x and the weight, which cost little more while the logits are at hand.
    rows = len(x)
    size = rows_at_once(rows, len(weight), backend.on_gpu())
    by_exponentials = _slow_exp(x)  # then the logits are float32, too
    dx: list[mx.array] = []
    total, dweight = mx.array(0.0), mx.array(0.0)
    for start in range(0, rows, size):
        part = slice(start, start + size)
        # Else the logits of all chunks would be made before the first gradient.
        chunk, ids = mx.depends([x[part], targets[part]], [total, dweight, *dx[-1:]])
        logits = chunk @ weight.T
        if by_exponentials:
            # The logits' gradient, softmax less one hot, is never made: the exponentials alone are multiplied. What the
            # softmax divides by and the ones of the targets come in where there are C instead of V numbers.
            losses, exps, sums = _cross_entropy(logits, ids)
            loss, divisor = losses.sum() / rows, rows * sums
            dx.append((exps @ weight) / divisor - weight[ids] / rows)
            dweight = mx.addmm(dweight, exps.T, chunk / divisor)
        else:
            loss, dlogits = mx.value_and_grad(lambda logits, ids=ids: cross_entropy(logits, ids).sum() / rows)(logits)
            dx.append(dlogits @ weight)
            dweight = dweight + dlogits.T @ chunk
        total = total + loss
    if by_exponentials:
        dweight = dweight.at[targets].add(-x / rows)  # once for all chunks, since it may copy (V, C)
    return total, mx.concatenate(dx), dweight.astype(weight.dtype)


@_linear_cross_entropy.vjp
def _linear_cross_entropy_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, mx.array, mx.array]:
    _, dx, dweight = outputs
    scale = cotangents[0]
    return (scale * dx).astype(dx.dtype), (scale * dweight).astype(dweight.dtype), mx.zeros_like(primals[2])
