"""The loss of a head, and its CPU twin, agree with PyTorch in float64."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_gpt.cpu import kernels
from mlx_gpt.models import cross_entropy
from mlx_gpt.models.cross_entropy import LinearCrossEntropy, chunks


def values(array):
    """An array in numpy, bfloat16 too."""
    return np.array(array.astype(mx.float32))


def rows(count: int) -> Any:
    """Hidden states (count, 8), a head (30, 8), targets (count,) and weights (count,), a third of which are 0."""
    draw = np.random.default_rng(3)
    weights = np.where(np.arange(count) % 3, draw.uniform(0.5, 2, count), 0)
    return draw.normal(size=(count, 8)), draw.normal(size=(30, 8)), draw.integers(0, 30, count), weights


def torch_loss(case):
    """PyTorch's weighted mean loss and its gradients."""
    x, head, targets, weights = case
    tensors: Any = [torch.tensor(array, requires_grad=True) for array in (x, head)]
    x, head = tensors
    losses = torch.nn.functional.cross_entropy(x @ head.T, torch.tensor(targets), reduction="none")
    loss = (losses * torch.tensor(weights)).sum() / weights.sum()
    loss.backward()
    return loss.item(), x.grad.numpy(), head.grad.numpy()


def our_loss(layer, case, dtypes=(mx.float32, mx.float32), factor=1):
    """`factor` times the weighted mean loss of a `LinearCrossEntropy`, and its gradients for states and head."""
    x, head, targets, weights = case
    head_loss = layer(LinearCrossEntropy)

    def loss(x, head):
        total = head_loss(x, head, mx.array(targets), mx.array(weights, mx.float32))
        return factor * total / float(weights.sum())

    function = mx.value_and_grad(loss, argnums=(0, 1))
    return function(mx.array(x, dtypes[0]), mx.array(head, dtypes[1]))


@pytest.fixture
def small_chunks(monkeypatch):
    """Take 128 rows of logits at a time, the fewest."""
    monkeypatch.setattr(cross_entropy, "CHUNK", 1)
    monkeypatch.setattr(kernels, "LOGITS", 1)


@pytest.mark.parametrize("count", [10, 256, 257], ids=["one chunk", "even chunks", "a shorter last chunk"])
def test_the_loss_in_chunks_has_the_gradients_of_the_whole(layer, small_chunks, count):
    """The factor of the loss must reach the gradients."""
    case = rows(count)
    loss, (dx, dhead) = our_loss(layer, case, factor=2)
    expected_loss, expected_dx, expected_dhead = torch_loss(case)
    assert loss.item() == pytest.approx(2 * expected_loss, rel=1e-6)
    np.testing.assert_allclose(dx, 2 * expected_dx, atol=1e-6)
    np.testing.assert_allclose(dhead, 2 * expected_dhead, atol=1e-6)
    assert not np.array(dx)[::3].any()  # a weight of 0


@pytest.mark.parametrize("count", [10, 257])
def test_the_loss_without_gradients_is_the_same(layer, small_chunks, count):
    """A model in use computes it another way."""
    case = x, head, targets, weights = rows(count)
    head_loss = layer(LinearCrossEntropy).eval()
    arrays = mx.array(x, mx.float32), mx.array(head, mx.float32), mx.array(targets), mx.array(weights, mx.float32)
    expected = torch_loss(case)[0] * weights.sum()
    assert head_loss(*arrays).item() == pytest.approx(expected, rel=1e-6)


def test_the_loss_of_bfloat16_is_float32_and_its_gradients_bfloat16(layer):
    case = rows(10)
    loss, (dx, dhead) = our_loss(layer, case, dtypes=(mx.bfloat16, mx.bfloat16))
    assert (loss.dtype, dx.dtype, dhead.dtype) == (mx.float32, mx.bfloat16, mx.bfloat16)
    assert loss.item() == pytest.approx(torch_loss(case)[0], rel=0.02)


@pytest.mark.parametrize("dtypes", [(mx.bfloat16, mx.float32), (mx.float32, mx.bfloat16)], ids=str)
def test_hidden_states_and_head_may_differ_in_precision(layer, dtypes):
    """Each gradient has the dtype of its array."""
    case = rows(10)
    loss, found = our_loss(layer, case, dtypes=dtypes)
    expected_loss, *expected = torch_loss(case)
    assert loss.item() == pytest.approx(expected_loss, rel=0.02)
    for gradient, whole, dtype in zip(found, expected, dtypes, strict=True):
        assert gradient.dtype == dtype
        assert np.linalg.norm(values(gradient) - whole) < 0.02 * np.linalg.norm(whole)


def test_the_gradient_is_right_where_nearly_all_is_learnt(layer):
    """Most rows have one target, of which the network is sure: their gradient is a small difference of large sums."""
    draw = np.random.default_rng(4)
    head, targets = draw.normal(size=(30, 8)), np.where(np.arange(512) % 8, 3, draw.integers(0, 30, 512))
    x = 4 * head[targets] + 0.1 * draw.normal(size=(512, 8))
    case: Any = (x, head, targets, np.ones(512))
    loss, found = our_loss(layer, case)
    expected_loss, *expected = torch_loss(case)
    assert expected_loss < 0.1
    assert loss.item() == pytest.approx(expected_loss, rel=1e-4)
    for gradient, whole in zip(found, expected, strict=True):
        assert np.linalg.norm(gradient - whole) < 1e-4 * np.linalg.norm(whole)


def test_the_gradient_of_the_head_is_summed_in_float32(layer, small_chunks):
    """Summed in bfloat16 over 128 chunks it would be more than 1 % off."""
    case = rows(128 * 128)
    _, (_, dhead) = our_loss(layer, case, dtypes=(mx.bfloat16, mx.bfloat16))
    whole = torch_loss(case)[2]
    assert np.linalg.norm(values(dhead) - whole) < 0.006 * np.linalg.norm(whole)


def test_the_logits_are_never_all_in_memory(layer, small_chunks):
    """They alone would take 128 MiB here, and their gradient as much again."""
    x, head = mx.random.normal((8192, 8), key=mx.random.key(0)), mx.random.normal((4096, 8), key=mx.random.key(1))
    targets, weights, head_loss = mx.arange(8192) % 4096, mx.ones(8192), layer(LinearCrossEntropy)
    mx.eval(x, head, targets, weights)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.grad(lambda x, head: head_loss(x, head, targets, weights), argnums=(0, 1))(x, head))
    assert mx.get_peak_memory() - before < 64 * 2**20


@pytest.mark.parametrize("divide", [chunks, None], ids=["plain", "cpu"])
def test_chunks_are_even_and_not_too_small(divide, monkeypatch):
    """A large vocabulary still gets 128 rows, or its products would be slow."""

    def sizes(rows, vocab_size, logits):
        if divide:
            parts = divide(rows, vocab_size, logits)
        else:
            monkeypatch.setattr(kernels, "LOGITS", logits)
            parts = kernels._chunks(rows, vocab_size)
        return [len(range(rows)[part]) for part in parts]

    assert sizes(5, 20, 1000) == [5]
    assert sizes(1200, 20, 10_000) == [400] * 3
    assert sizes(1200, 10**6, 10_000) == [120] * 10
    assert sizes(257, 10**6, 10_000) == [86, 86, 85]
