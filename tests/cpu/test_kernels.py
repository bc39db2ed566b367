"""The operations that take most of the time of training on a CPU agree with PyTorch's in float64.

The tests of the loss are in tests/models/test_base.py, with the layer that a GPU computes.
"""

import functools

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_gpt.cpu import kernels


def test_exponentials_are_right_or_nothing():
    """Beside 1, very small ones count as 0: gradients times them would be subnormal numbers, which are slow."""
    x = np.linspace(-64, 0, 100_001, dtype=np.float32)[1:]
    for exp in (kernels.exp_nonpositive, mx.compile(kernels.exp_nonpositive)):
        np.testing.assert_allclose(np.array(exp(mx.array(x))), np.exp(x.astype(np.float64)), rtol=2e-7)
        assert exp(mx.array([-64.1, -87, -1e30, -mx.inf])).tolist() == [0, 0, 0, 0]
        assert mx.isnan(exp(mx.array([mx.nan]))).item()


def gradients(function, reference, arrays):
    """Yield a function's value and each gradient beside PyTorch's in float64, all weighted with the same numbers."""
    tensors = [torch.tensor(array, requires_grad=True) for array in arrays]
    expected = reference(*tensors)
    weight = np.random.default_rng(0).normal(size=expected.shape)
    (expected * torch.tensor(weight)).sum().backward()
    weighted = mx.compile(mx.value_and_grad(lambda arrays: (function(*arrays) * mx.array(weight, mx.float32)).sum()))
    inputs = [mx.array(array, mx.float32) for array in arrays]
    yield np.array(function(*inputs)), expected.detach().numpy()
    found = weighted(inputs)[1]
    for gradient, tensor in zip(found, tensors, strict=True):
        assert tensor.grad is not None
        yield np.array(gradient), tensor.grad.numpy()


@pytest.mark.parametrize(("queries", "tokens"), [(1, 1), (1, 9), (7, 7), (5, 9), (11, 11)])
def test_attention_block_by_block_is_pytorchs(queries, tokens, monkeypatch):
    """Fewer queries than a block, several blocks, and queries behind tokens that are cached."""
    monkeypatch.setattr(kernels, "QUERIES", 4)
    draw = np.random.default_rng(1)
    arrays = [3 * draw.normal(size=(2, 3, length, 8)) for length in (queries, tokens, tokens)]
    seen = torch.ones(queries, tokens).tril(tokens - queries).bool()

    def attention(q, k, v):
        return kernels.causal_attention(q * 8**-0.5, k, v)

    def reference(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    for found, expected in gradients(attention, reference, arrays):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def rotated(x, base, offset):
    """Each token's pairs (x_i, x_i+D/2) as complex numbers, turned by its position times base^(-2i/D)."""
    half = x.shape[-1] // 2
    angles = torch.arange(offset, offset + x.shape[-2])[:, None] * base ** (-torch.arange(half, dtype=x.dtype) / half)
    turned = torch.complex(x[..., :half], x[..., half:]) * torch.exp(1j * angles)
    return torch.cat([turned.real, turned.imag], dim=-1)


def test_linear_layers_norms_activations_and_rotations_are_pytorchs():
    draw = np.random.default_rng(3)
    x, gain = 4 * draw.normal(size=(2, 5, 8)) + 1, draw.normal(size=8)
    linear_without_bias = functools.partial(kernels.linear, bias=None)
    cases = [
        (kernels.linear, torch.nn.functional.linear, [x, draw.normal(size=(3, 8)), draw.normal(size=3)]),
        (linear_without_bias, torch.nn.functional.linear, [x, draw.normal(size=(3, 8))]),
        (
            lambda x, weight, bias: kernels.layer_norm(x, weight, bias, 1e-5),
            lambda x, weight, bias: torch.nn.functional.layer_norm(x, (8,), weight, bias),
            [x, gain, draw.normal(size=8)],
        ),
        (kernels.gelu, lambda x: torch.nn.functional.gelu(x, approximate="tanh"), [np.linspace(-8, 8, 4001)]),
        (
            lambda x, weight: kernels.rms_norm(x, weight, 1e-6),
            lambda x, weight: torch.nn.functional.rms_norm(x, (8,), weight, 1e-6),
            [x, gain],
        ),
        (
            kernels.swiglu,
            lambda gate, up: torch.nn.functional.silu(gate) * up,
            [np.linspace(-70, 70, 4001), draw.normal(size=4001)],
        ),
        (
            lambda x: kernels.rope(x, 500.0, 3),
            lambda x: rotated(x, 500.0, 3),
            [draw.normal(size=(2, 2, 5, 8))],
        ),
    ]
    for function, reference, arrays in cases:
        for found, expected in gradients(function, reference, arrays):
            # The gradient of GELU multiplies 1 - tanh^2, which is all rounding at the ends, by up to 8 times a slope.
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_not_hidden(bad):
    """Training skips a step whose loss or gradients are not finite, if it gets to see them."""
    x = mx.array([[0.5, bad, 1.0]])
    assert not mx.isfinite(kernels.gelu(x)).all()
    assert not mx.isfinite(kernels.layer_norm(x, mx.ones(3), mx.zeros(3), 1e-5)).all()
    assert not mx.isfinite(kernels.rms_norm(x, mx.ones(3), 1e-6)).all()
    assert not mx.isfinite(kernels.swiglu(x, mx.ones((1, 3)))).all()
    assert not mx.isfinite(kernels.swiglu(mx.ones((1, 3)), x)).all()
    assert not mx.isfinite(kernels.rope(x[None, None, :, :2], 500.0, 1)).all()
    for loss in (kernels.linear_cross_entropy, kernels.cross_entropy_sum):
        assert not mx.isfinite(loss(x, mx.eye(3), mx.array([0]), mx.ones(1)))
    q = x.reshape(1, 1, 3, 1)
    assert not mx.isfinite(kernels.causal_attention(q, q, q)).all()
