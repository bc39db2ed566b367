"""The layers that networks share, and their CPU twins, agree with PyTorch in float64."""

import math
from typing import Any
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten

from mlx_gpt.models.base import (
    GELU,
    Dropout,
    ScaledDotProductAttention,
    cast_parameters,
    seed_dropout,
    set_precision,
)


def values(array):
    """An array in numpy, bfloat16 too."""
    return np.array(array.astype(mx.float32))


# ---- attention ------------------------------------------------------------------------------------------------------


def heads(queries, tokens, width=8, seed=1):
    """Queries, keys and values (2, 3, ..., width)."""
    draw = np.random.default_rng(seed)
    return [2 * draw.normal(size=(2, 3, length, width)) for length in (queries, tokens, tokens)]


def seen(queries, tokens):
    """What a causal mask lets each query see, the last query being the last token."""
    return np.tril(np.ones((queries, tokens), bool), tokens - queries)


@pytest.mark.parametrize("mask", ["causal", "array", None])
@pytest.mark.parametrize(("queries", "tokens"), [(1, 1), (1, 9), (8, 8), (5, 9), (17, 17)])
def test_unfused_attention_is_the_fused(queries, tokens, mask):
    """Also where queries come after cached tokens, and where each sequence has a mask of its own."""
    attention = ScaledDotProductAttention(8).eval()
    q, k, v = (mx.array(array, mx.float32) for array in heads(queries, tokens))
    given = mask
    if mask == "array":
        visible = np.random.default_rng(2).random((2, 1, queries, tokens)) < 0.5
        visible[..., 0] = True
        given = mx.array(visible)
    fused, unfused = attention(q, k, v, given), attention.unfused(q, k, v, given)
    np.testing.assert_allclose(unfused, fused, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 2, 8, 9, 17])
def test_attention_trains_on_windows_of_any_length(layer, length):
    """8 tokens or fewer have a kernel of their own on Metal, which has no gradient."""
    arrays = heads(length, length)
    tensors: Any = [torch.tensor(array, requires_grad=True) for array in arrays]
    q, k, v = tensors
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    weights = np.random.default_rng(0).normal(size=expected.shape)
    (expected * torch.tensor(weights)).sum().backward()

    attention = layer(ScaledDotProductAttention, 8)
    inputs = [mx.array(array, mx.float32) for array in arrays]
    gradients = mx.grad(lambda inputs: (attention(*inputs, "causal") * mx.array(weights, mx.float32)).sum())(inputs)
    np.testing.assert_allclose(attention(*inputs, "causal"), expected.detach().numpy(), rtol=2e-5, atol=2e-5)
    for gradient, tensor in zip(gradients, tensors, strict=True):
        np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("length", "training", "fused"), [(8, True, False), (9, True, True), (8, False, True)])
def test_only_short_windows_do_without_the_fused_kernel_and_only_in_training(monkeypatch, length, training, fused):
    kernel = mock.Mock(wraps=mx.fast.scaled_dot_product_attention)
    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", kernel)
    attention = ScaledDotProductAttention(8).train(training)
    attention(*(mx.array(array, mx.float32) for array in heads(length, length)), "causal")
    assert kernel.called == fused


# ---- GELU and dropout -----------------------------------------------------------------------------------------------


def exact_gelu(x):
    """GELU's tanh form in float64."""
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def test_gelu_is_pytorchs(layer):
    x = np.linspace(-8, 8, 4001)
    tensor: Any = torch.tensor(x, requires_grad=True)
    expected = torch.nn.functional.gelu(tensor, approximate="tanh")
    expected.sum().backward()
    gelu = layer(GELU)
    np.testing.assert_allclose(gelu(mx.array(x, mx.float32)), expected.detach().numpy(), rtol=1e-5, atol=2e-5)
    gradient = mx.grad(lambda x: gelu(x).sum())(mx.array(x, mx.float32))
    # The gradient multiplies 1 - tanh^2, which is all rounding at the ends, by up to 8 times a slope.
    np.testing.assert_allclose(gradient, tensor.grad.numpy(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("compiled", [False, True], ids=["alone", "in a compiled function"])
def test_gelu_of_bfloat16_is_rounded_only_once(layer, compiled):
    """Every bfloat16 in [-8, 8]. Computed in bfloat16, the result would be many units off in the last place."""
    positive = np.arange(0x4101, dtype=np.uint16)  # the bits of 0 to 8
    x = mx.array(np.concatenate([positive, positive | 0x8000])).view(mx.bfloat16)
    gelu = layer(GELU)
    found = values((mx.compile(gelu) if compiled else gelu)(x)).astype(np.float64)
    exact = exact_gelu(values(x).astype(np.float64))
    unit = 2.0 ** (np.floor(np.log2(np.maximum(np.abs(exact), 1e-38))) - 7)
    # 1 + tanh cancels on the left, where float32 leaves an error of 2^-24 times x / 2.
    assert np.all(np.abs(found - exact) <= unit + 8 * 2.0**-24)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_dropout_zeroes_its_fraction_and_keeps_the_mean_and_the_dtype(dtype):
    dropout = Dropout(0.25)
    seed_dropout(dropout, mx.random.key(1))
    dropped = dropout(mx.ones((400, 400), dtype))
    assert dropped.dtype == dtype
    found = values(dropped)
    np.testing.assert_allclose(np.unique(found), [0, 4 / 3], rtol=4e-3 if dtype == mx.bfloat16 else 1e-6)
    assert (found == 0).mean() == pytest.approx(0.25, abs=0.01)


# ---- precision ------------------------------------------------------------------------------------------------------


def gradients_in(dtype, model, loss):
    """The gradients of `loss()` for float32 parameters, while the model computes in `dtype`, as in training."""
    set_precision(model, dtype)

    def computed(parameters):
        model.update(cast_parameters(model, parameters, dtype))
        return loss()

    return dict(tree_flatten(mx.grad(computed)(model.trainable_parameters())))


@pytest.mark.parametrize("table", ["wte", "wpe"])
def test_the_gradient_of_an_embedding_is_summed_in_float32(make_model, table):
    """2,000 gradients of 1e-3 meet in one row. Were the table cast before the lookup, they would add up to 0.5."""
    model = make_model()
    embedding = getattr(model, table)
    ids = mx.full((2000,), 3)
    gradient = gradients_in(mx.bfloat16, model, lambda: (embedding(ids) * 1e-3).sum())[f"{table}.weight"]
    assert gradient.dtype == mx.float32
    np.testing.assert_allclose(np.array(gradient)[3], 2.0, rtol=0.01)
    assert not np.delete(np.array(gradient), 3, axis=0).any()


def test_a_frequent_token_gets_its_whole_gradient_in_bfloat16(make_model):
    """One token fills 64 windows of 32, so 2,048 gradients meet in its row of the embedding."""
    windows = mx.full((64, 32), 3)

    def gradient(dtype):
        model = make_model()
        return gradients_in(dtype, model, lambda: (model.hidden(windows) * 1e-3).sum())["wte.weight"]

    whole, found = (np.array(gradient(dtype))[3] for dtype in (mx.float32, mx.bfloat16))
    assert np.linalg.norm(found - whole) < 0.05 * np.linalg.norm(whole)


def test_a_network_computes_in_the_precision_that_was_set_last(make_model, ids):
    model = make_model()
    parameters = model.trainable_parameters()
    before = np.array(model(mx.array(ids)))
    for dtype in (mx.bfloat16, mx.float32):
        set_precision(model, dtype)
        model.update(cast_parameters(model, parameters, dtype))
        assert model.hidden(mx.array(ids)).dtype == dtype
        assert model(mx.array(ids)).dtype == dtype
    assert np.array_equal(np.array(model(mx.array(ids))), before)


def test_the_hidden_states_decide_in_which_precision_a_tied_head_computes(make_model):
    """Its table stays float32 with bfloat16, and is cast for the product."""
    model = make_model()
    set_precision(model, mx.bfloat16)
    assert model.head(mx.ones((2, 32), mx.bfloat16)).dtype == mx.bfloat16
    assert isinstance(model.wte, nn.Embedding)
