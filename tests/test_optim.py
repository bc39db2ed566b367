"""AdamW makes the same updates as PyTorch's, and the learning rate rises and falls where it should."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_map

from mlx_gpt.config import TrainingConfig
from mlx_gpt.optim import make_optimizer, make_schedule

SETTINGS = TrainingConfig(beta1=0.8, beta2=0.9, weight_decay=0.3)
RATES = [0.1, 0.05, 0.2, 0.01, 0.1]


def numbers(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def parameters():
    return {"matrix": mx.array(numbers((6, 5), 0)), "norm": {"bias": mx.array(numbers(5, 1))}}


@pytest.fixture
def optimizer(parameters):
    optimizer = make_optimizer(SETTINGS)
    optimizer.init(parameters)
    return optimizer


def update(optimizer, parameters, gradients, rate):
    optimizer.learning_rate = mx.array(rate)
    return optimizer.apply_gradients(gradients, parameters)


def test_updates_are_those_of_torchs_adamw(optimizer, parameters):
    matrix = torch.nn.Parameter(torch.tensor(numbers((6, 5), 0)))
    bias = torch.nn.Parameter(torch.tensor(numbers(5, 1)))
    groups = [{"params": [matrix], "weight_decay": 0.3}, {"params": [bias], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.9))
    for step, rate in enumerate(RATES):
        for_matrix, for_bias = numbers((6, 5), 100 + step), numbers(5, 200 + step)
        gradients = {"matrix": mx.array(for_matrix), "norm": {"bias": mx.array(for_bias)}}
        parameters = update(optimizer, parameters, gradients, rate)
        matrix.grad, bias.grad = torch.tensor(for_matrix), torch.tensor(for_bias)
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        np.testing.assert_allclose(np.array(parameters["matrix"]), matrix.detach().numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.array(parameters["norm"]["bias"]), bias.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_without_gradients_only_matrices_shrink(optimizer, parameters):
    after = update(optimizer, parameters, tree_map(mx.zeros_like, parameters), 0.1)
    np.testing.assert_allclose(np.array(after["matrix"]), 0.97 * numbers((6, 5), 0), rtol=1e-6)
    assert np.array_equal(np.array(after["norm"]["bias"]), numbers(5, 1))


# ---- learning rate --------------------------------------------------------------------------------------------------

# The warm-up is steps 0 to 3. Step 4 has the highest rate, and step 24, the last of 25, the lowest.
HIGHEST, LOWEST, STEPS = 1e-3, 1e-4, 25
TRAINING = TrainingConfig(learning_rate=HIGHEST, min_lr=LOWEST, warmup_steps=4)
HALF = (HIGHEST + LOWEST) / 2


def rates(training, steps):
    rate = make_schedule(training, steps)
    return [rate(step) for step in range(steps)]


@pytest.mark.parametrize(
    ("schedule", "turns"),
    [
        # The cosine is flat at its ends: after a quarter of the way it has fallen by (1 - cos 45 degrees) / 2.
        ("cosine", {9: HIGHEST - (HIGHEST - LOWEST) * 0.146447, 14: HALF, 24: LOWEST}),
        ("linear", {9: HIGHEST - (HIGHEST - LOWEST) / 4, 14: HALF, 24: LOWEST}),
        ("constant", {9: HIGHEST, 14: HIGHEST, 24: HIGHEST}),
        ("wsd", {9: HIGHEST, 14: HIGHEST, 20: HIGHEST, 21: HIGHEST - (HIGHEST - LOWEST) / 4, 22: HALF, 24: LOWEST}),
    ],
)
def test_the_rate_turns_where_it_should(schedule, turns):
    found = rates(dataclasses.replace(TRAINING, schedule=schedule), STEPS)
    warm_up = {0: HIGHEST / 5, 1: HIGHEST * 2 / 5, 3: HIGHEST * 4 / 5, 4: HIGHEST}
    for step, rate in (warm_up | turns).items():
        assert found[step] == pytest.approx(rate, rel=1e-4), step


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant", "wsd"])
@pytest.mark.parametrize("steps", [10, 1])
def test_without_warm_up_the_first_step_has_the_highest_rate(schedule, steps):
    training = dataclasses.replace(TRAINING, warmup_steps=0, schedule=schedule)
    assert rates(training, steps)[0] == pytest.approx(HIGHEST, rel=1e-6)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("steps", [6, 7, 15, 25])
def test_the_last_step_and_any_after_it_have_the_lowest_rate(schedule, steps):
    rate = make_schedule(dataclasses.replace(TRAINING, schedule=schedule), steps)
    assert [rate(steps - 1), rate(99)] == pytest.approx([LOWEST, LOWEST], rel=1e-4)


def test_a_run_shorter_than_the_warm_up_only_warms_up():
    found = rates(dataclasses.replace(TRAINING, warmup_steps=100), 3)
    assert found == pytest.approx([HIGHEST * (step + 1) / 101 for step in range(3)])


def test_without_a_lowest_rate_it_falls_to_a_tenth():
    training = TrainingConfig(learning_rate=0.5, warmup_steps=0)
    assert rates(training, 10)[-1] == pytest.approx(0.05)
    assert rates(dataclasses.replace(training, min_lr=0.0), 10)[-1] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("steps", "warmup"), [(50, 5), (1500, 100), (5, 0)])
def test_the_warm_up_is_a_tenth_of_the_steps_and_100_at_most(steps, warmup):
    training = TrainingConfig(schedule="constant")
    assert sum(rate < 0.999 * training.learning_rate for rate in rates(training, steps)) == warmup
