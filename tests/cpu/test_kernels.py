"""The operations that training spends its time in, against PyTorch's in float64."""

import functools

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_gpt import ops


@pytest.fixture
def hidden():
    """Hidden states (10, 8), a head (30, 8) and targets (10,)."""
    draw = np.random.default_rng(3)
    return draw.normal(size=(10, 8)), draw.normal(size=(30, 8)), draw.integers(0, 30, 10)


def reference(x, weight, targets):
    """PyTorch's mean loss and its gradients."""
    x, weight = (torch.tensor(array, requires_grad=True) for array in (x, weight))
    loss = torch.nn.functional.cross_entropy(x @ weight.T, torch.tensor(targets))
    loss.backward()
    return loss.item(), x.grad.numpy(), weight.grad.numpy()


def test_exponentials_are_right_or_nothing():
    """What is too small to be heard beside 1 is 0: gradients times it would be subnormal numbers, which are slow."""
    x = np.linspace(-64, 0, 100_001, dtype=np.float32)[1:]
    for exp in (ops.exp_nonpositive, mx.compile(ops.exp_nonpositive)):
        np.testing.assert_allclose(np.array(exp(mx.array(x))), np.exp(x.astype(np.float64)), rtol=2e-7)
        assert exp(mx.array([-64.1, -87, -1e30, -mx.inf])).tolist() == [0, 0, 0, 0]
        assert mx.isnan(exp(mx.array([mx.nan]))).item()


@pytest.mark.parametrize("rows", [128, 4, 3])
def test_the_loss_in_chunks_has_the_gradients_of_the_whole(hidden, rows, monkeypatch):
    """In one chunk, in even ones, and with a shorter last one."""
    x, weight, targets = hidden
    monkeypatch.setattr(ops, "CHUNK_CPU", 0)
    monkeypatch.setattr(ops, "MIN_ROWS", rows)
    # Twice the loss, to see that its factor reaches the gradients.
    function = mx.value_and_grad(lambda x, w: 2 * ops.linear_cross_entropy(x, w, mx.array(targets)), argnums=(0, 1))
    loss, (dx, dweight) = function(mx.array(x, mx.float32), mx.array(weight, mx.float32))
    expected_loss, expected_dx, expected_dweight = reference(x, weight, targets)
    assert loss.item() == pytest.approx(2 * expected_loss, rel=1e-6)
    np.testing.assert_allclose(dx, 2 * expected_dx, atol=1e-6)
    np.testing.assert_allclose(dweight, 2 * expected_dweight, atol=1e-6)


def test_the_loss_of_bfloat16_is_float32_and_its_gradients_bfloat16(hidden):
    x, weight, targets = hidden
    function = mx.value_and_grad(lambda x, w: ops.linear_cross_entropy(x, w, mx.array(targets)), argnums=(0, 1))
    loss, (dx, dweight) = function(mx.array(x, mx.bfloat16), mx.array(weight, mx.bfloat16))
    assert (loss.dtype, dx.dtype, dweight.dtype) == (mx.float32, mx.bfloat16, mx.bfloat16)
    assert loss.item() == pytest.approx(reference(x, weight, targets)[0], rel=0.02)


@pytest.mark.parametrize("dtypes", [(mx.bfloat16, mx.float32), (mx.float32, mx.bfloat16)], ids=str)
def test_hidden_states_and_head_may_differ_in_precision(hidden, dtypes):
    x, weight, targets = hidden
    function = mx.value_and_grad(lambda x, w: ops.linear_cross_entropy(x, w, mx.array(targets)), argnums=(0, 1))
    loss, found = function(mx.array(x, dtypes[0]), mx.array(weight, dtypes[1]))
    expected_loss, *expected = reference(x, weight, targets)
    assert loss.item() == pytest.approx(expected_loss, rel=0.02)
    for gradient, whole in zip(found, expected, strict=True):
        assert np.linalg.norm(np.array(gradient.astype(mx.float32)) - whole) < 0.02 * np.linalg.norm(whole)


def test_the_gradient_is_right_where_nearly_all_is_learnt():
    """One target in most rows, of which the network is sure: what is left of its gradient is the difference of sums."""
    draw = np.random.default_rng(4)
    weight, targets = draw.normal(size=(30, 8)), np.where(np.arange(512) % 8, 3, draw.integers(0, 30, 512))
    x = 4 * weight[targets] + 0.1 * draw.normal(size=(512, 8))
    function = mx.value_and_grad(lambda x, w: ops.linear_cross_entropy(x, w, mx.array(targets)), argnums=(0, 1))
    loss, found = function(mx.array(x, mx.float32), mx.array(weight, mx.float32))
    expected_loss, *expected = reference(x, weight, targets)
    assert expected_loss < 0.1
    assert loss.item() == pytest.approx(expected_loss, rel=1e-4)
    for gradient, whole in zip(found, expected, strict=True):
        assert np.linalg.norm(gradient - whole) < 1e-4 * np.linalg.norm(whole)


def test_the_gradient_of_the_head_is_summed_in_float32(monkeypatch):
    """In bfloat16 the sum of 128 chunks is 1 % off, in float32 0.3 %."""
    monkeypatch.setattr(ops, "CHUNK_CPU", 0)
    monkeypatch.setattr(ops, "MIN_ROWS", 4)
    draw = np.random.default_rng(3)
    x, weight, targets = draw.normal(size=(512, 8)), draw.normal(size=(30, 8)), draw.integers(0, 30, 512)
    function = mx.grad(lambda w, x: ops.linear_cross_entropy(x, w, mx.array(targets)))
    dweight = np.array(function(mx.array(weight, mx.bfloat16), mx.array(x, mx.bfloat16)).astype(mx.float32))
    whole = reference(x, weight, targets)[2]
    assert np.linalg.norm(dweight - whole) < 0.006 * np.linalg.norm(whole)


def test_rows_at_once_are_even_shares(monkeypatch):
    monkeypatch.setattr(ops, "CHUNK_CPU", 1000)
    monkeypatch.setattr(ops, "MIN_ROWS", 10)
    assert ops.rows_at_once(5, 20, on_gpu=False) == 5
    assert ops.rows_at_once(120, 20, on_gpu=False) == 40
    assert ops.rows_at_once(120, 10_000, on_gpu=False) == 10  # a large vocabulary still gets a product worth its name


def gradients(function, reference, arrays):
    """A function's value and gradients, and PyTorch's in float64, all weighted with the same numbers."""
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
    monkeypatch.setattr(ops, "ATTENTION_ROWS", 4)
    draw = np.random.default_rng(1)
    arrays = [3 * draw.normal(size=(2, 3, length, 8)) for length in (queries, tokens, tokens)]
    seen = torch.ones(queries, tokens).tril(tokens - queries).bool()

    def reference(q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    for found, expected in gradients(ops.causal_attention, reference, arrays):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=2e-5)


def test_attention_drops_the_same_weights_forward_and_backward(monkeypatch):
    monkeypatch.setattr(ops, "ATTENTION_ROWS", 4)
    key, rate = mx.random.key(5), 0.4
    arrays = [np.random.default_rng(2).normal(size=(1, 2, 6, 8)) for _ in range(3)]
    kept = torch.tensor(np.array(ops.dropout(mx.ones((1, 2, 6, 6)), rate, key)))
    assert 0 < (kept == 0).sum() < kept.numel()

    def reference(q, k, v):
        scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(torch.ones(6, 6).triu(1).bool(), -torch.inf)
        return (scores.softmax(-1) * kept) @ v

    attention = functools.partial(ops.causal_attention, rate=rate, key=key)
    for found, expected in gradients(attention, reference, arrays):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_linear_layers_norms_and_gelu_are_pytorchs():
    draw = np.random.default_rng(3)
    x, gain = 4 * draw.normal(size=(2, 5, 8)) + 1, draw.normal(size=8)
    cases = [
        (ops.linear, torch.nn.functional.linear, [x, draw.normal(size=(3, 8)), draw.normal(size=3)]),
        (
            lambda x, weight, bias: ops.layer_norm(x, weight, bias, 1e-5),
            lambda x, weight, bias: torch.nn.functional.layer_norm(x, (8,), weight, bias),
            [x, gain, draw.normal(size=8)],
        ),
        (ops.gelu, lambda x: torch.nn.functional.gelu(x, approximate="tanh"), [np.linspace(-8, 8, 4001)]),
    ]
    for function, reference, arrays in cases:
        for found, expected in gradients(function, reference, arrays):
            # The gradient of GELU multiplies what tanh lacks to 1, which is rounding, by up to 8 * slope.
            np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_not_hidden(bad):
    """Training leaves out a step whose loss or gradients are not finite, if it gets to see it."""
    x = mx.array([[0.5, bad, 1.0]])
    assert not mx.isfinite(ops.gelu(x)).all()
    assert not mx.isfinite(ops.layer_norm(x, mx.ones(3), mx.zeros(3), 1e-5)).all()
    assert not mx.isfinite(ops.cross_entropy(x, mx.array([0]))).all()
    q = x.reshape(1, 1, 3, 1)
    assert not mx.isfinite(ops.causal_attention(q, q, q)).all()
