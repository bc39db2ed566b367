"""The CPU's update equals the AdamW of `mlx.optimizers`, and changes nothing if the gradients are not finite."""

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_gpt.config import TrainingConfig
from mlx_gpt.cpu import adamw
from mlx_gpt.optim import make_optimizer


def numbers(seed):
    """A tree of arrays as a network has them."""
    draw = np.random.default_rng(seed)
    shape = {"matrix": mx.zeros((6, 5)), "blocks": [{"weight": mx.zeros((4, 4)), "bias": mx.zeros(4)}] * 2}
    return tree_map(lambda array: mx.array(draw.normal(size=array.shape).astype(np.float32)), shape)


def flat(*trees):
    return {name: np.array(array) for name, array in tree_flatten(list(trees))}


@pytest.fixture
def optimizer():
    optimizer = make_optimizer(TrainingConfig(weight_decay=0.3, learning_rate=0.1))
    optimizer.init(numbers(0))
    assert adamw.fits(optimizer)
    return optimizer


def test_updates_are_those_of_mlx_optimizers(optimizer):
    theirs = make_optimizer(TrainingConfig(weight_decay=0.3, learning_rate=0.1))
    expected = parameters = numbers(0)
    for step in range(4):
        expected = theirs.apply_gradients(numbers(10 + step), expected)
        parameters, optimizer.state = adamw.update(
            optimizer, numbers(10 + step), parameters, optimizer.state, mx.array(True)
        )
    found, wanted = flat(parameters, optimizer.state), flat(expected, theirs.state)
    assert found.keys() == wanted.keys()
    for name in found:
        np.testing.assert_allclose(found[name], wanted[name], rtol=2e-5, atol=1e-6, err_msg=name)


def test_an_unsound_update_changes_nothing_not_even_the_count(optimizer):
    first = adamw.update(optimizer, numbers(1), numbers(0), optimizer.state, mx.array(True))
    optimizer.state = tree_map(lambda array: array, first[1])
    optimizer.learning_rate = 0.7
    poison = tree_map(lambda array: mx.full(array.shape, mx.nan), numbers(2))
    skipped = adamw.update(optimizer, poison, first[0], first[1], mx.array(False))
    before, after = flat(*first), flat(*skipped)
    assert before.keys() == after.keys()
    assert all(np.array_equal(before[name], after[name]) for name in before)
