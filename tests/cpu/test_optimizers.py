"""The CPU's update equals that of the optimizers, and changes nothing if the gradients are not finite."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_gpt import models
from mlx_gpt.config import ModelConfig, TrainingConfig
from mlx_gpt.cpu import optimizers
from mlx_gpt.optim import make_optimizer

SIZES = ModelConfig(vocab_size=9, n_layer=3, n_head=2, n_embd=8, n_positions=4)


def numbers(seed):
    """Numbers for every parameter of a network."""
    draw = np.random.default_rng(seed)
    shapes = models.create(SIZES).parameters()
    return tree_map(lambda array: mx.array(draw.normal(size=array.shape).astype(np.float32)), shapes)


def flat(*trees):
    return {name: np.array(array) for name, array in tree_flatten(list(trees))}


def make(name):
    settings = TrainingConfig(optimizer=name, weight_decay=0.3, learning_rate=0.1)
    optimizer = make_optimizer(settings, models.create(SIZES))
    optimizer.init(numbers(0))
    return optimizer


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_updates_are_those_of_the_optimizer(name):
    ours, theirs = make(name), make(name)
    expected = parameters = numbers(0)
    for step in range(4):
        rate = mx.array(0.1 / (step + 1))
        ours.learning_rate = theirs.learning_rate = rate
        expected = theirs.apply_gradients(numbers(10 + step), expected)
        parameters, ours.state = optimizers.update(ours, numbers(10 + step), parameters, ours.state, mx.array(True))
    found, wanted = flat(parameters, ours.state), flat(expected, theirs.state)
    assert found.keys() == wanted.keys()
    for key in found:
        np.testing.assert_allclose(found[key], wanted[key], rtol=2e-5, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_an_unsound_update_changes_nothing_not_even_the_count(name):
    optimizer = make(name)
    first = optimizers.update(optimizer, numbers(1), numbers(0), optimizer.state, mx.array(True))
    optimizer.state = tree_map(lambda array: array, first[1])
    optimizer.learning_rate = mx.array(0.7)
    poison = tree_map(lambda array: mx.full(array.shape, mx.nan), numbers(2))
    skipped = optimizers.update(optimizer, poison, first[0], first[1], mx.array(False))
    before, after = flat(*first), flat(*skipped)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
