"""Replacing the layers of a network by their CPU twins changes how it computes, and nothing else."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_gpt import models
from mlx_gpt.config import ModelConfig
from mlx_gpt.cpu import accelerate
from mlx_gpt.cpu.accelerate import MLX_LAYERS
from mlx_gpt.models.base import ScaledDotProductAttention
from mlx_gpt.models.gpt2 import TransformerBlock

QWEN3 = ModelConfig(model_type="qwen3", vocab_size=300, n_layer=2, n_head=4, n_kv_head=2, n_embd=32, n_positions=32)
SIZES = ModelConfig(vocab_size=300, n_layer=2, n_head=2, n_embd=32, n_positions=32)


def two(make):
    """A layer or network twice, the second with twins."""
    plain, twin = make(), make()
    twin.update(plain.parameters())
    accelerate.accelerate(twin)
    return plain, twin


@pytest.mark.parametrize("sizes", [SIZES, QWEN3], ids=["gpt2", "qwen3"])
def test_each_layer_with_a_twin_is_replaced_and_every_parameter_stays(sizes):
    plain, twin = two(lambda: models.init_weights(models.create(sizes), 0))
    for (name, before), (_, after) in zip(plain.named_modules(), twin.named_modules(), strict=True):
        has_twin = type(before) in MLX_LAYERS or hasattr(before, "cpu_twin")
        assert (type(before) is not type(after)) == has_twin, name
        assert isinstance(after, type(before)), name
    ours, theirs = (dict(tree_flatten(model.parameters())) for model in (plain, twin))
    assert ours.keys() == theirs.keys()
    assert all(mx.array_equal(ours[name], theirs[name]) for name in ours)


def test_twins_of_twins_are_the_same():
    _, twin = two(lambda: TransformerBlock(models.create(SIZES).args))
    before = [type(module) for module in twin.modules()]
    accelerate.accelerate(twin)
    assert [type(module) for module in twin.modules()] == before


@pytest.mark.parametrize("training", [True, False], ids=["training", "in use"])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: nn.Linear(32, 48), id="linear"),
        pytest.param(lambda: nn.Linear(32, 48, bias=False), id="linear without bias"),
        pytest.param(lambda: nn.LayerNorm(32), id="norm"),
        pytest.param(lambda: nn.LayerNorm(32, bias=False), id="norm without bias"),
        pytest.param(lambda: nn.LayerNorm(32, affine=False), id="norm without parameters"),
        pytest.param(lambda: nn.RMSNorm(32), id="root mean square norm of few rows"),
        pytest.param(lambda: models.create(SIZES).h[0].mlp, id="feed-forward"),
        pytest.param(lambda: models.create(QWEN3).layers[0].mlp, id="gated feed-forward"),
    ],
)
def test_a_twin_computes_the_same(make, training):
    """Also what the networks of mlx-lm have and GPT-2 has not."""
    plain, twin = (layer.train(training) for layer in two(make))
    x_btc = mx.random.normal((2, 5, 32), key=mx.random.key(0))
    np.testing.assert_allclose(twin(x_btc), plain(x_btc), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [1, 3, 8, 40])
@pytest.mark.parametrize("bias", [True, False], ids=["with bias", "without"])
def test_products_with_packed_weights_and_their_gradients_are_the_same(rows, bias):
    def make():
        mx.random.seed(0)
        return nn.QuantizedLinear.from_linear(nn.Linear(64, 48, bias=bias), 32, 4)

    x, cotangent = mx.random.normal((rows, 64), key=mx.random.key(0)), mx.random.normal((rows, 48))
    (plain, dx), (twin, dx_too) = (mx.vjp(layer, [x], [cotangent]) for layer in two(make))
    np.testing.assert_allclose(twin[0], plain[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx_too[0], dx[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 40])
def test_a_packed_embedding_is_the_same_head(rows):
    table = nn.Embedding(48, 64)
    plain, twin = two(lambda: nn.QuantizedEmbedding.from_embedding(table, 32, 4))
    x = mx.random.normal((rows, 64), key=mx.random.key(0))
    np.testing.assert_allclose(twin.as_linear(x), plain.as_linear(x), rtol=1e-5, atol=1e-5)
    assert mx.array_equal(twin(mx.arange(9)), plain(mx.arange(9)))


def test_training_keeps_no_unpacked_weight():
    """Otherwise a stack of layers would have all its unpacked weights in memory at once."""
    layers = [nn.QuantizedLinear.from_linear(nn.Linear(256, 256, bias=False), 64, 4) for _ in range(12)]
    network = nn.Sequential(*layers)
    accelerate.accelerate(network)
    x = mx.random.normal((8, 256))
    mx.eval(network.parameters(), x)
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.grad(lambda x: network(x).square().sum())(x))
    assert mx.get_peak_memory() - before < 5 * 256 * 256 * 4


def test_the_norm_of_many_rows_is_the_same():
    norm, twin = two(lambda: nn.RMSNorm(32))
    x_btc = mx.random.normal((4, 100, 32), key=mx.random.key(0))
    assert x_btc.size >= accelerate.FEW
    np.testing.assert_allclose(twin(x_btc), norm(x_btc), rtol=1e-5, atol=1e-6)


def test_other_precisions_and_masks_are_computed_as_before():
    """The kernels are for float32 and causal masks alone."""
    plain, twin = two(lambda: TransformerBlock(models.create(SIZES).args))
    x_btc = mx.random.normal((2, 12, 32), key=mx.random.key(0))
    for model in (plain, twin):
        model.apply(lambda weight: weight.astype(mx.bfloat16))
    half = x_btc.astype(mx.bfloat16)
    assert mx.array_equal(twin(half, "causal"), plain(half, "causal"))

    for make in (lambda: nn.QuantizedLinear(32, 48, True, 32, 4), lambda: nn.QuantizedEmbedding(48, 32, 32, 4)):
        plain, twin = two(make)
        for layer in (plain, twin):
            layer.set_dtype(mx.bfloat16)
        compute, compute_twin = (getattr(layer, "as_linear", layer) for layer in (plain, twin))
        assert mx.array_equal(compute_twin(half), compute(half))

    attention, attention_twin = two(lambda: ScaledDotProductAttention(8))
    q, k, v = mx.random.normal((3, 2, 4, 12, 8), key=mx.random.key(1))
    mask = mx.random.bernoulli(0.5, (2, 1, 12, 12), key=mx.random.key(2)) | (mx.arange(12) == 0)
    assert mx.array_equal(attention_twin(q, k, v, mask), attention(q, k, v, mask))


def test_queries_that_share_heads_gather_the_same():
    attention, attention_twin = two(lambda: ScaledDotProductAttention(8))
    q, k, v = mx.random.normal((3, 2, 4, 12, 8), key=mx.random.key(1))
    few = k[:, :2], v[:, :2]
    np.testing.assert_allclose(attention_twin(q, *few, "causal"), attention(q, *few, "causal"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "offset", [0, 5, mx.array(5), mx.array([3, 7])], ids=["start", "later", "later, as an array", "each elsewhere"]
)
def test_rotations_are_the_same(offset):
    rope, twin = two(lambda: nn.RoPE(8, base=500.0))
    x_bhtd = mx.random.normal((2, 4, 12, 8), key=mx.random.key(1))
    np.testing.assert_allclose(twin(x_bhtd, offset=offset), rope(x_bhtd, offset=offset), rtol=1e-5, atol=2e-6)
