"""The operations of training, written with operations that MLX's CPU back end does well.

On the CPU MLX calls the C library's `exp` once per element, in the forward pass and again in the backward pass; that
was more than a third of a training step. Here everything is built on an exponential that compiles to vector
instructions, sums are written as products (the BLAS is faster at these), and the values that the backward pass needs
are kept.

All arrays are float32. Shapes as in `models/base.py`.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence

import mlx.core as mx

# exp(r) on [-ln 2 / 2, ln 2 / 2] to float32 rounding: the polynomial of least relative error, lowest power first.
EXP = (1.0, 1.0, 0.4999999106, 0.166664198, 0.04166822508, 0.008374815807, 0.001383684576)
# ln 2 in two parts: multiplied by a small whole number, the first is exact in float32.
LN2_HIGH, LN2_LOW = 0.693359375, -2.12194440e-4
# exp of anything below this counts as 0. It is negligible beside exp(0), and its products with gradients would be
# subnormal numbers, which take Intel's processors a hundred times as long.
LOWEST = -64.0
ROUND = 1.5 * 2**23  # a float32 plus this has no digits after the point; its last bits are the whole number

# tanh(u) / 2 is u P(u^2) / Q(u^2) on [-9, 9] to float32 rounding; beyond it is 1/2 to float32 rounding.
TANH_P = (0.5, 0.066905140877, 0.0017477957299, 1.030456588e-05, 6.677362219e-09)
TANH_Q = (1.0, 0.4671434462, 0.025876995177, 0.00032856399776, 7.776585562e-07)
TANH_END = 9.0

LOGITS = 2**20  # at a time in `linear_cross_entropy`: 4 MB stay in the cache
QUERIES = 256  # at a time in `causal_attention`

GELU_SLOPE, GELU_CUBE = math.sqrt(2 / math.pi), 0.044715


def exp_nonpositive(x: mx.array) -> mx.array:
    """exp(x) for x <= 0, within 2e-7 of its value; 0 for anything below -64. It has no gradient.

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
    return _gelu(x)[0]


def linear(x: mx.array, weight: mx.array, bias: mx.array | None) -> mx.array:
    """`x @ weight.T + bias` for x (..., C), weight (D, C) and bias (D,) or None."""
    return _linear(x, weight) if bias is None else _linear_bias(x, weight, bias)


def quantized_linear(
    x: mx.array, packed: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int
) -> mx.array:
    """`x @ weight.T` for x (..., C) and a weight (D, C) that `mx.quantize` has packed; only `x` has a gradient.

    MLX's CPU back end unpacks the weights again for each row. This unpacks them once for all rows. It unpacks them
    again in the backward pass, so that no layer's plain weight stays in memory.
    """

    def unpacked(after: mx.array) -> mx.array:
        (now,) = mx.depends([packed], [after])  # `depends` keeps this from being unpacked earlier than it is needed
        return mx.dequantize(now, scales, biases, group_size=group_size, bits=bits)

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return x @ unpacked(x).T

    @product.vjp
    def backward(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        return cotangent @ unpacked(cotangent)

    return product(x)


def layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: float) -> mx.array:
    """Mean 0 and variance 1 over the last axis, then a gain and a bias (Ba et al. 2016, arXiv:1607.06450)."""
    return _layer_norm(x, weight, bias, mx.array(eps))[0]


def rms_norm(x: mx.array, weight: mx.array, eps: float) -> mx.array:
    """Mean square 1 over the last axis, then a gain (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    return _rms_norm(x, weight, mx.array(eps))[0]


def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """silu(gate) * up (Shazeer 2020, arXiv:2002.05202)."""
    return _swiglu(gate, up)[0]


def rope(x_bhtd: mx.array, base: float, offset: int | mx.array) -> mx.array:
    """Rotate each token's pairs (x_i, x_i+D/2) by its position times base^(-2i/D) (Su et al. 2021, arXiv:2104.09864).

    The exchange of the halves is a product with a small matrix, since copying by slices is slower.

    Args:
        offset: the position of the first token; (B,) if the sequences differ.
    """
    T, D = x_bhtd.shape[2:]
    frequencies_d, exchange_dd = _frequencies(D, base)
    if isinstance(offset, mx.array):
        angles = (offset[..., None] + mx.arange(T))[..., None] * frequencies_d
        cos, sin = mx.cos(angles), mx.sin(angles)
        if offset.ndim:
            cos, sin = cos[:, None], sin[:, None]
    else:
        cos, sin = _rotation(T, D, base, offset)
    return _rope(x_bhtd, cos, sin, exchange_dd)


def causal_attention(q_bhtd: mx.array, k_bhsd: mx.array, v_bhsd: mx.array) -> mx.array:
    """Return what each of T queries, the last of S tokens, gathers from the values up to its own, (B, H, T, D).

    The queries are scaled already. They are taken in blocks, because the first blocks see few tokens.
    """
    return _attention(mx.contiguous(q_bhtd), mx.contiguous(k_bhsd), mx.contiguous(v_bhsd))[0]


def linear_cross_entropy(x_nc: mx.array, weight_vc: mx.array, targets_n: mx.array, weights_n: mx.array) -> mx.array:
    """Sum of the cross-entropies of the logits `x @ weight.T`, each times its weight: a scalar in nats."""
    return _linear_cross_entropy(x_nc, weight_vc, targets_n, weights_n)[0]


def cross_entropy_sum(x_nc: mx.array, weight_vc: mx.array, targets_n: mx.array, weights_n: mx.array) -> mx.array:
    """Return the same sum as `linear_cross_entropy`, without a gradient."""
    total = mx.array(0.0)
    for part in _chunks(len(x_nc), len(weight_vc)):
        x, targets = mx.depends([x_nc[part], targets_n[part]], [total])
        total = total + (_losses(x @ weight_vc.T, targets)[0] * weights_n[part]).sum()
    return total


def losses(logits_nv: mx.array, targets_n: mx.array) -> mx.array:
    """The cross-entropy of each row, (N,), without a gradient."""
    return _losses(logits_nv, targets_n)[0]


def head_loss(
    head: Callable[[mx.array], mx.array], x_nc: mx.array, targets_n: mx.array, weights_n: mx.array
) -> tuple[mx.array, mx.array]:
    """The same sum for the logits `head(x)`, and its gradient for `x`. The head itself gets no gradient."""
    losses, exps, sums = _losses(head(x_nc), targets_n)
    dlogits = exps * (weights_n[:, None] / sums)
    dlogits = dlogits.at[mx.arange(len(x_nc)), targets_n].add(-weights_n)
    _, (dx,) = mx.vjp(head, [x_nc], [dlogits])
    return (losses * weights_n).sum(), dx


def _polynomial(coefficients: Sequence[float], x: mx.array, square: mx.array) -> mx.array:
    """Evaluate in pairs, lowest power first (Estrin's scheme): half as deep as Horner's."""
    pairs = [low + high * x for low, high in zip(coefficients[::2], coefficients[1::2], strict=False)]
    total = coefficients[-1] if len(coefficients) % 2 else pairs.pop()
    for pair in reversed(pairs):
        total = pair + total * square
    return total


def _end_of_kernel(x: mx.array) -> mx.array:
    """Return `x`, computed before the operations that follow; nothing is copied.

    `mx.compile` fuses at most eleven operations in a row. If it cuts between a constant and its use, the constant is
    read from memory for each element and the kernel is not vectorised. So the cut is made here.
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
def _linear(x: mx.array, weight: mx.array) -> mx.array:
    return x @ weight.T


@_linear.vjp
def _linear_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
    # MLX's own gradient of the weight is a transposed view, which all later kernels would have to read by strides.
    x, weight = primals
    dy = cotangent.reshape(-1, len(weight))
    return (dy @ weight).reshape(x.shape), dy.T @ x.reshape(-1, x.shape[-1])


@mx.custom_function
def _linear_bias(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return mx.addmm(bias, x, weight.T)


@_linear_bias.vjp
def _linear_bias_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
    x, weight, _ = primals
    dy = cotangent.reshape(-1, len(weight))
    return (dy @ weight).reshape(x.shape), dy.T @ x.reshape(-1, x.shape[-1]), _sum_rows(dy)


def _sum_rows(x: mx.array) -> mx.array:
    """Sum (C,) over the rows of (N, C)."""
    return (mx.ones((1, len(x)), x.dtype) @ x).squeeze(0)


def _sum_columns(x: mx.array) -> mx.array:
    """Sum (..., 1) over the last axis."""
    return x @ mx.ones((x.shape[-1], 1), x.dtype)


def _mean_columns(x: mx.array) -> mx.array:
    """Mean (..., 1) over the last axis."""
    return _sum_columns(x) * (1 / x.shape[-1])


@mx.custom_function
def _layer_norm(x: mx.array, weight: mx.array, bias: mx.array, eps: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    # The normalised values and the factor are returned for the gradient.
    centred = x - _mean_columns(x)
    factor = mx.rsqrt(_mean_columns(centred * centred) + eps)
    normalised = centred * factor
    return normalised * weight + bias, normalised, factor


@_layer_norm.vjp
def _layer_norm_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    _, weight, _, eps = primals
    dy, (_, normalised, factor) = cotangents[0], outputs
    d = dy * weight
    dx = (d - _mean_columns(d) - normalised * _mean_columns(d * normalised)) * factor
    size = len(weight)
    return dx, _sum_rows((dy * normalised).reshape(-1, size)), _sum_rows(dy.reshape(-1, size)), mx.zeros_like(eps)


@mx.custom_function
def _rms_norm(x: mx.array, weight: mx.array, eps: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    # The normalised values and the factor are returned for the gradient.
    factor = mx.rsqrt(_mean_columns(x * x) + eps)
    normalised = x * factor
    return normalised * weight, normalised, factor


@_rms_norm.vjp
def _rms_norm_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    _, weight, eps = primals
    dy, (_, normalised, factor) = cotangents[0], outputs
    d = dy * weight
    dx = (d - normalised * _mean_columns(d * normalised)) * factor
    return dx, _sum_rows((dy * normalised).reshape(-1, len(weight))), mx.zeros_like(eps)


@mx.custom_function
def _swiglu(gate: mx.array, up: mx.array) -> tuple[mx.array, mx.array]:
    # The sigmoid is returned for the gradient.
    exp = exp_nonpositive(mx.where(gate > 0, -gate, gate))
    sigmoid = mx.where(gate > 0, 1.0, exp) / (1 + exp)
    return gate * sigmoid * up, sigmoid


@_swiglu.vjp
def _swiglu_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, mx.array]:
    gate, up = primals
    dy, sigmoid = cotangents[0], outputs[1]
    return dy * up * (sigmoid * (1 + gate * (1 - sigmoid))), dy * (gate * sigmoid)


@functools.lru_cache(maxsize=8)
def _frequencies(D: int, base: float) -> tuple[mx.array, mx.array]:
    """The angle between two tokens in each dimension, (D,), and the matrix (D, D) that turns (a, b) into (-b, a)."""
    with mx.stream(mx.cpu):
        frequencies = base ** (-mx.arange(0, D, 2) / D)
        arrays = mx.concatenate([frequencies, frequencies]), mx.eye(D, k=D // 2) - mx.eye(D, k=-(D // 2))
        mx.eval(arrays)
    return arrays


@functools.lru_cache(maxsize=8)
def _rotation(T: int, D: int, base: float, offset: int) -> tuple[mx.array, mx.array]:
    """The cosines and sines of T tokens, (T, D) both."""
    with mx.stream(mx.cpu):
        angles = mx.arange(offset, offset + T)[:, None] * _frequencies(D, base)[0]
        arrays = mx.cos(angles), mx.sin(angles)
        mx.eval(arrays)
    return arrays


@mx.custom_function
def _rope(x_bhtd: mx.array, cos_td: mx.array, sin_td: mx.array, exchange_dd: mx.array) -> mx.array:
    return x_bhtd * cos_td + (x_bhtd @ exchange_dd) * sin_td


@_rope.vjp
def _rope_vjp(primals: tuple[mx.array, ...], cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
    _, cos_td, sin_td, exchange_dd = primals
    # The inverse rotation, whose matrix is the transpose.
    dx = cotangent * cos_td - (cotangent @ exchange_dd) * sin_td
    return dx, mx.zeros_like(cos_td), mx.zeros_like(sin_td), mx.zeros_like(exchange_dd)


def _blocks(T: int, S: int) -> Iterator[tuple[slice, slice]]:
    """Blocks of queries, and the tokens that the last query of each may see."""
    for start in range(0, T, QUERIES):
        end = min(T, start + QUERIES)
        yield slice(start, end), slice(0, S - T + end)


@mx.custom_function
def _attention(q_bhtd: mx.array, k_bhsd: mx.array, v_bhsd: mx.array) -> tuple[mx.array, ...]:
    # Returned for the gradient: 1 / the sum of each query's exponentials, and the exponentials block by block.
    outputs, inverses, blocks_of_exps = [], [], []
    for queries, seen in _blocks(q_bhtd.shape[2], k_bhsd.shape[2]):
        q, k, v = q_bhtd[:, :, queries], k_bhsd[:, :, seen], v_bhsd[:, :, seen]
        future = mx.triu(mx.full((q.shape[2], k.shape[2]), -mx.inf), k=k.shape[2] - q.shape[2] + 1)
        _, exps, sums = _exponentials(mx.addmm(future, q, k.swapaxes(-1, -2)))
        inverse = 1 / sums
        outputs.append((exps @ v) * inverse)
        inverses.append(inverse)
        blocks_of_exps.append(exps)
    return mx.concatenate(outputs, axis=2), mx.concatenate(inverses, axis=2), *blocks_of_exps


@_attention.vjp
def _attention_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, mx.array, mx.array]:
    q_bhtd, k_bhsd, v_bhsd = primals
    y_bhtd, inverse_bht1, *blocks_of_exps = outputs
    dy_bhtd = cotangents[0] * inverse_bht1
    # The softmax's own sum over the weights' gradients is this (Dao et al. 2022, arXiv:2205.14135, appendix B).
    through_sum_bht1 = (dy_bhtd * y_bhtd).sum(axis=-1, keepdims=True)
    dq, dk, dv = [], mx.zeros_like(k_bhsd), mx.zeros_like(v_bhsd)
    for (queries, seen), exps in zip(_blocks(q_bhtd.shape[2], k_bhsd.shape[2]), blocks_of_exps, strict=True):
        dy = dy_bhtd[:, :, queries]
        dscores = exps * (dy @ v_bhsd[:, :, seen].swapaxes(-1, -2) - through_sum_bht1[:, :, queries])
        dq.append(dscores @ k_bhsd[:, :, seen])
        dk[:, :, seen] += dscores.swapaxes(-1, -2) @ q_bhtd[:, :, queries]
        dv[:, :, seen] += exps.swapaxes(-1, -2) @ dy
    return mx.concatenate(dq, axis=2), dk, dv


def _exponentials(x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The highest of each row, (..., 1), the exponentials of the differences from it, and their sum, (..., 1)."""
    highest = x.max(axis=-1, keepdims=True)
    exps = exp_nonpositive(x - highest)
    return highest, exps, _sum_columns(exps)


def _losses(logits_nv: mx.array, targets_n: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Cross-entropies (N,), the exponentials (N, V) that they come from and their sums (N, 1)."""
    highest, exps, sums = _exponentials(logits_nv)
    hit = mx.take_along_axis(logits_nv, targets_n[:, None], axis=-1)
    return (mx.log(sums) + highest - hit).squeeze(-1), exps, sums


def _chunks(rows: int, vocab_size: int) -> list[slice]:
    """Even slices of the rows, 128 or more, with about `LOGITS` logits each."""
    size = math.ceil(rows / math.ceil(rows / max(128, LOGITS // vocab_size)))
    return [slice(start, start + size) for start in range(0, rows, size)]


@mx.custom_function
def _linear_cross_entropy(
    x_nc: mx.array, weight_vc: mx.array, targets_n: mx.array, weights_n: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    # The sum, and its gradients for x and the weight, which cost little more while the logits are there. The gradient
    # of the logits, softmax minus one-hot, is never computed: only the exponentials are multiplied. The divisor of the
    # softmax and the ones of the targets are applied later, to C instead of V numbers.
    dx: list[mx.array] = []
    total, dweight = mx.array(0.0), mx.array(0.0)
    for part in _chunks(len(x_nc), len(weight_vc)):
        # Each chunk waits for the one before, because otherwise the logits of all chunks would be computed first.
        x, targets = mx.depends([x_nc[part], targets_n[part]], [total, dweight, *dx[-1:]])
        weights = weights_n[part]
        losses, exps, sums = _losses(x @ weight_vc.T, targets)
        share = weights[:, None] / sums
        dx.append((exps @ weight_vc) * share - weight_vc[targets] * weights[:, None])
        dweight = mx.addmm(dweight, exps.T, x * share)
        total = total + (losses * weights).sum()
    dweight = dweight.at[targets_n].add(-x_nc * weights_n[:, None])  # once for all chunks, since it may copy (V, C)
    return total, mx.concatenate(dx), dweight


@_linear_cross_entropy.vjp
def _linear_cross_entropy_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    _, _, targets_n, weights_n = primals
    _, dx, dweight = outputs
    return cotangents[0] * dx, cotangents[0] * dweight, mx.zeros_like(targets_n), mx.zeros_like(weights_n)
