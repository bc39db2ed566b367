"""GPT-2: its size, its first weights, what a token sees, what dropout drops and what a step costs."""

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_gpt import models
from mlx_gpt.config import ModelConfig
from mlx_gpt.models.base import recompute_in_backward, seed_dropout
from tests.models.pieces import logits_in_pieces

KEY = mx.random.key(5)
SIZES = ModelConfig(vocab_size=512, n_layer=4, n_head=2, n_embd=64, n_positions=32)


@pytest.fixture(scope="module")
def fresh():
    """A network with its first weights."""
    return models.init_weights(models.create(SIZES), seed=7)


def logits(model, ids, key=None):
    """The logits of a network whose dropout layers got keys from `key`."""
    seed_dropout(model, key)
    return np.array(model(mx.array(ids)))


# ---- size -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_layer", "n_embd", "published"),
    [(12, 768, 124_439_808), (24, 1024, 354_823_168), (36, 1280, 774_030_080), (48, 1600, 1_557_611_200)],
)
def test_has_as_many_parameters_as_gpt2(n_layer, n_embd, published):
    assert (
        models.n_params(
            models.create(ModelConfig(vocab_size=50257, n_layer=n_layer, n_head=n_embd // 64, n_embd=n_embd))
        )
        == published
    )


# ---- first weights --------------------------------------------------------------------------------------------------


def test_first_weights_have_gpt2s_spread(fresh, weights_of):
    for name, weight in weights_of(fresh).items():
        if weight.ndim == 2:
            spread = 0.02 / math.sqrt(2 * 4) if name.endswith("c_proj.weight") else 0.02
            assert weight.std() == pytest.approx(spread, rel=0.06), name
            assert abs(weight.mean()) < 5 * spread / math.sqrt(weight.size), name
        else:
            assert np.all(weight == (1 if "ln_" in name and name.endswith("weight") else 0)), name


def test_no_two_matrices_start_equal(fresh, weights_of):
    matrices = [weight.ravel()[:32] for weight in weights_of(fresh).values() if weight.ndim == 2]
    assert len({row.tobytes() for row in matrices}) == len(matrices)


def test_first_weights_are_a_function_of_the_seed(weights_of):
    def drawn(seed, elsewhere):
        mx.random.seed(elsewhere)
        return weights_of(models.init_weights(models.create(SIZES), seed))

    once, again, other = drawn(7, elsewhere=0), drawn(7, elsewhere=1), drawn(8, elsewhere=0)
    assert all(np.array_equal(once[name], again[name]) for name in once)
    assert all(not np.array_equal(once[name], other[name]) for name in once if once[name].ndim == 2)


# ---- what a token sees ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["generating", "training with dropout"])
def test_a_later_token_never_changes_what_came_before(make_model, ids, dropout):
    model = make_model(dropout=dropout).train(dropout > 0)
    key = KEY if dropout else None
    changed = ids.copy()
    changed[:, 9] = (changed[:, 9] + 1) % models.vocab_size(model)
    before, after = logits(model, ids, key), logits(model, changed, key)
    np.testing.assert_allclose(after[:, :9], before[:, :9], atol=1e-6)
    assert np.all(np.abs(after[:, 9:] - before[:, 9:]).max(axis=(0, 2)) > 1e-3)  # and every later token sees it


@pytest.mark.parametrize("pieces", [[17], [1] * 17, [5, 3, 1, 7, 1]], ids=str)
def test_reading_in_pieces_gives_the_logits_of_the_whole(model, ids, pieces):
    np.testing.assert_allclose(logits_in_pieces(model, ids, pieces), np.array(model(mx.array(ids))), atol=1e-5)


# ---- dropout --------------------------------------------------------------------------------------------------------


def test_without_a_key_nothing_is_dropped(make_model, model, ids):
    assert np.array_equal(logits(make_model(dropout=0.5), ids), logits(model, ids))


def test_a_model_in_use_drops_nothing_whatever_its_keys(make_model, model, ids):
    assert np.array_equal(logits(make_model(dropout=0.5).eval(), ids, KEY), logits(model, ids))


def test_what_is_dropped_is_a_function_of_the_key(make_model, ids):
    model = make_model(dropout=0.5)
    once = logits(model, ids, KEY)
    assert np.array_equal(once, logits(model, ids, KEY))
    assert not np.array_equal(once, logits(model, ids, mx.random.key(6)))


@pytest.mark.parametrize("place", ["embeddings", "attention", "feed-forward"])
def test_each_place_drops(make_model, ids, place):
    model = make_model()
    layer = {
        "embeddings": model.embd_dropout,
        "attention": model.h[1].attn.resid_dropout,
        "feed-forward": model.h[1].mlp.resid_dropout,
    }[place]
    layer.p = 0.5
    assert not np.array_equal(logits(model, ids, KEY), logits(model, ids))


def test_no_two_places_drop_alike(make_model):
    """With one key for all, each block would silence the same activations."""
    model = make_model(dropout=0.5)
    seed_dropout(model, KEY)
    layers = [model.embd_dropout, *(part.resid_dropout for block in model.h for part in (block.attn, block.mlp))]
    kept = {np.array(layer(mx.ones((8, 32)))).tobytes() for layer in layers}
    assert len(kept) == len(layers)


def test_attention_drops_outputs_and_no_weights(make_model):
    """An output that is kept is the whole one, scaled up: every token that it sees still counts."""
    attention = make_model(dropout=0.5).h[0].attn
    x_btc = mx.random.normal((1, 12, 32), key=mx.random.key(0))
    whole = np.array(attention(x_btc, "causal"))
    seed_dropout(attention, KEY)
    dropped = np.array(attention(x_btc, "causal"))
    kept = dropped != 0
    assert 0.2 < kept.mean() < 0.8
    np.testing.assert_allclose(dropped[kept], 2 * whole[kept], rtol=1e-6)


def test_dropout_in_attention_leaves_the_mean_as_it_is(make_model):
    attention = make_model(dropout=0.5).h[0].attn
    x_btc = mx.broadcast_to(mx.random.normal((1, 6, 32), key=mx.random.key(0)), (4000, 6, 32))
    whole = np.array(attention(x_btc[:1], "causal"))[0]
    seed_dropout(attention, KEY)
    dropped = np.array(attention(x_btc, "causal"))
    error = dropped.std(axis=0) / math.sqrt(4000)
    assert np.all(np.abs(dropped.mean(axis=0) - whole) < 5 * error + 1e-5)


# ---- cost -----------------------------------------------------------------------------------------------------------


def test_flops_per_token_are_those_of_the_products():
    """Worked out by hand: 6 for each weight that multiplies, 12 for each block, channel and position attended to."""
    model = models.create(ModelConfig(vocab_size=100, n_layer=2, n_head=2, n_embd=8, n_positions=16))
    assert models.flops_per_token(model, 10) == 6 * (models.n_params(model) - 16 * 8) + 12 * 2 * 8 * 10


def loss_and_gradients(model, ids):
    """The loss, and its gradients by name."""
    value, tree = nn.value_and_grad(model, lambda: model(mx.array(ids)).square().mean())()
    mx.eval(value, tree)
    return value.item(), dict(tree_flatten(tree))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_the_blocks_changes_no_gradient(make_model, ids, dropout):
    def gradients(*, recompute):
        model = make_model(dropout=dropout)
        seed_dropout(model, KEY)
        recompute_in_backward(model.layers, recompute)
        return loss_and_gradients(model, ids)

    kept, computed = gradients(recompute=False), gradients(recompute=True)
    assert kept[0] == computed[0]
    assert kept[1].keys() == computed[1].keys()
    for name, gradient in kept[1].items():
        np.testing.assert_allclose(np.array(computed[1][name]), np.array(gradient), rtol=1e-5, atol=1e-7, err_msg=name)


def test_recomputing_the_blocks_takes_less_memory_until_it_is_switched_off():
    model = models.init_weights(
        models.create(ModelConfig(vocab_size=64, n_layer=8, n_head=2, n_embd=32, n_positions=64)), 0
    )
    windows = np.random.default_rng(0).integers(0, 64, (8, 64))
    peaks = []
    for recompute in (False, True, False):
        recompute_in_backward(model.layers, recompute)
        mx.clear_cache()
        mx.reset_peak_memory()
        loss_and_gradients(model, windows)
        peaks.append(mx.get_peak_memory())
    assert peaks[1] < 0.5 * peaks[0]
    assert peaks[2] == pytest.approx(peaks[0], rel=0.1)
