"""AdamW does what PyTorch's does, and the learning rate turns where it should."""

import dataclasses
import math

import mlx.core as mx
import numpy as np
import pytest
import torch
from mlx.utils import tree_map
from mlx_gpt.training.optimizer import AdamW, learning_rate

from mlx_gpt.config import TrainingConfig

SETTINGS = TrainingConfig(beta1=0.8, beta2=0.9, weight_decay=0.3)
RATES = [0.1, 0.05, 0.2, 0.01, 0.1]


def update(optimizer, parameters, gradients, state, rate, scale=1.0, sound=True):
    """One update, as a step of training makes it."""
    rates, updates = optimizer.rates(state["updates"], mx.array(rate), mx.array(scale), mx.array(sound))
    parameters, m, v = optimizer.update(parameters, gradients, state["m"], state["v"], rates)
    return parameters, {"m": m, "v": v, "updates": updates}


def numbers(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def parameters():
    return {"matrix": mx.array(numbers((6, 5), 0)), "norm": {"bias": mx.array(numbers(5, 1))}}


def gradients(step):
    return {"matrix": mx.array(numbers((6, 5), 100 + step)), "norm": {"bias": mx.array(numbers(5, 200 + step))}}


def test_updates_are_those_of_torchs_adamw(parameters):
    matrix = torch.nn.Parameter(torch.tensor(numbers((6, 5), 0)))
    bias = torch.nn.Parameter(torch.tensor(numbers(5, 1)))
    groups = [{"params": [matrix], "weight_decay": 0.3}, {"params": [bias], "weight_decay": 0.0}]
    reference = torch.optim.AdamW(groups, betas=(0.8, 0.9))
    optimizer = AdamW(SETTINGS)
    state = optimizer.init(parameters)
    for step, rate in enumerate(RATES):
        doubled = tree_map(lambda g: 2 * g, gradients(step))
        parameters, state = update(optimizer, parameters, doubled, state, rate, scale=0.5)
        matrix.grad, bias.grad = torch.tensor(numbers((6, 5), 100 + step)), torch.tensor(numbers(5, 200 + step))
        for group in reference.param_groups:
            group["lr"] = rate
        reference.step()
        np.testing.assert_allclose(np.array(parameters["matrix"]), matrix.detach().numpy(), rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.array(parameters["norm"]["bias"]), bias.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_without_gradients_only_matrices_shrink(parameters):
    optimizer = AdamW(SETTINGS)
    nothing = {"matrix": mx.zeros((6, 5)), "norm": {"bias": mx.zeros(5)}}
    after, _ = update(optimizer, parameters, nothing, optimizer.init(parameters), 0.1)
    np.testing.assert_allclose(np.array(after["matrix"]), 0.97 * numbers((6, 5), 0), rtol=1e-6)
    assert np.array_equal(np.array(after["norm"]["bias"]), numbers(5, 1))


def test_an_unsound_update_changes_nothing_not_even_the_count(parameters):
    optimizer = AdamW(SETTINGS)
    first = update(optimizer, parameters, gradients(0), optimizer.init(parameters), 0.1)
    poison = {"matrix": mx.full((6, 5), mx.nan), "norm": {"bias": mx.full(5, mx.inf)}}
    skipped = update(optimizer, first[0], poison, first[1], 0.1, scale=math.nan, sound=False)
    straight = update(optimizer, first[0], gradients(1), first[1], 0.1)
    resumed = update(optimizer, skipped[0], gradients(1), skipped[1], 0.1)
    assert np.array_equal(np.array(resumed[0]["matrix"]), np.array(straight[0]["matrix"]))
    assert int(resumed[1]["updates"]) == int(straight[1]["updates"]) == 2


# ---- learning rate --------------------------------------------------------------------------------------------------

HIGHEST, LOWEST = 1e-3, 1e-4


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        # Step 4 is the first after the warm-up, 14 the last of 15, 9 half way between them.
        ("cosine", {0: HIGHEST / 5, 3: HIGHEST * 4 / 5, 4: HIGHEST, 9: (HIGHEST + LOWEST) / 2, 14: LOWEST}),
        ("linear", {0: HIGHEST / 5, 3: HIGHEST * 4 / 5, 4: HIGHEST, 9: (HIGHEST + LOWEST) / 2, 14: LOWEST}),
        ("constant", {0: HIGHEST / 5, 3: HIGHEST * 4 / 5, 4: HIGHEST, 9: HIGHEST, 14: HIGHEST}),
        # The cosine is flat at its ends: after a quarter of the way it has fallen by (1 - cos 45 degrees) / 2.
        ("cosine", {6.5: HIGHEST - (HIGHEST - LOWEST) * 0.146447}),
        ("linear", {6.5: HIGHEST - (HIGHEST - LOWEST) / 4}),
    ],
)
def test_the_rate_turns_where_it_should(schedule, rates):
    training = TrainingConfig(learning_rate=HIGHEST, min_lr=LOWEST, warmup_steps=4, schedule=schedule)
    for step, rate in rates.items():
        assert learning_rate(step, 15, training) == pytest.approx(rate, rel=1e-4), step


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_without_warm_up_the_first_step_has_the_highest_rate(schedule):
    training = TrainingConfig(learning_rate=HIGHEST, min_lr=LOWEST, warmup_steps=0, schedule=schedule)
    assert learning_rate(0, 10, training) == HIGHEST
    assert learning_rate(0, 1, training) == HIGHEST


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_past_the_last_step_the_rate_stays_lowest(schedule):
    training = TrainingConfig(learning_rate=HIGHEST, min_lr=LOWEST, warmup_steps=4, schedule=schedule)
    assert learning_rate(99, 15, training) == pytest.approx(LOWEST)


def test_a_run_shorter_than_the_warm_up_only_warms_up():
    training = TrainingConfig(learning_rate=HIGHEST, min_lr=LOWEST, warmup_steps=100)
    assert [learning_rate(step, 3, training) for step in range(3)] == pytest.approx(
        [HIGHEST * (step + 1) / 101 for step in range(3)]
    )


def test_without_a_lowest_rate_it_falls_to_a_tenth():
    training = TrainingConfig(learning_rate=0.5, warmup_steps=0)
    assert learning_rate(9, 10, training) == pytest.approx(0.05)
    assert learning_rate(9, 10, dataclasses.replace(training, min_lr=0.0)) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize(("total", "warmup"), [(50, 5), (5000, 100), (5, 0)])
def test_without_a_warm_up_given_it_is_a_tenth_and_no_more_than_100(total, warmup):
    training = TrainingConfig(schedule="constant")
    rising = [step for step in range(total) if learning_rate(step, total, training) < training.learning_rate]
    assert len(rising) == warmup
