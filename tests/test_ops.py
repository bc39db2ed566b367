"""The operations that training spends its time in, against PyTorch's in float64."""

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
