"""AdamW makes the same updates as PyTorch's, Muon those of its definition, and the learning rate rises and falls."""

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_gpt.config import TrainingConfig
from mlx_gpt.optim import Muon, make_optimizer, make_schedule

SETTINGS = TrainingConfig(beta1=0.8, beta2=0.9, weight_decay=0.3)
RATES = [0.1, 0.05, 0.2, 0.01, 0.1]


def numbers(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.fixture
def parameters():
    return {"matrix": mx.array(numbers((6, 5), 0)), "norm": {"bias": mx.array(numbers(5, 1))}}


@pytest.fixture
def optimizer(parameters):
    network = nn.Module()
    network.layers = []
    network.matrix, network.norm = parameters["matrix"], nn.Module()
    network.norm.bias = parameters["norm"]["bias"]
    optimizer = make_optimizer(SETTINGS, network)
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


# ---- Muon -----------------------------------------------------------------------------------------------------------

MUON = dataclasses.replace(SETTINGS, optimizer="muon", learning_rate=0.1, muon_learning_rate=0.2, muon_momentum=0.9)


def newton_schulz(x):
    """Jordan's five steps in float64."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = x.astype(np.float64)
    x = x / (np.linalg.norm(x) + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


class Reference:
    """Muon for one matrix in float64: momentum with Nesterov's look ahead, Newton-Schulz, scale, decoupled decay."""

    def __init__(self, weight):
        self.weight, self.velocity = weight.astype(np.float64), np.zeros(weight.shape)

    def __call__(self, gradient, rate):
        rows, columns = gradient.shape
        self.velocity = 0.9 * self.velocity + 0.1 * gradient
        update = 0.1 * gradient + 0.9 * self.velocity
        update = newton_schulz(update) if rows <= columns else newton_schulz(update.T).T
        self.weight = self.weight * (1 - rate * 0.3) - rate * max(1, rows / columns) ** 0.5 * update


def block(seed):
    """Matrices of several shapes, two of them alike, and a vector."""
    layer = nn.Module()
    shapes = {"wide": (4, 6), "tall": (6, 4), "tall_too": (6, 4), "long": (4, 12), "high": (12, 4), "gain": (6,)}
    for i, (name, shape) in enumerate(shapes.items()):
        setattr(layer, name, mx.array(numbers(shape, seed + i)))
    return layer


@pytest.fixture
def network():
    network = nn.Module()
    network.embedding, network.layers = mx.array(numbers((8, 6), 0)), [block(10), block(20)]
    return network


def test_muon_trains_the_matrices_of_the_blocks_as_it_is_defined_and_adamw_the_rest(network, weights_of):
    muon, adamw = make_optimizer(MUON, network), make_optimizer(SETTINGS, network)
    trees, before = [network.parameters(), network.parameters()], weights_of(network)
    references = {name: Reference(weight) for name, weight in before.items() if weight.ndim == 2 and "layers" in name}
    for optimizer, tree in zip((muon, adamw), trees, strict=True):
        optimizer.init(tree)
    for step, rate in enumerate(RATES):
        gradients = {name: numbers(weight.shape, 100 * step + i) for i, (name, weight) in enumerate(before.items())}
        as_tree = tree_unflatten([(name, mx.array(gradient)) for name, gradient in gradients.items()])
        trees = [update(one, tree, as_tree, rate) for one, tree in zip((muon, adamw), trees, strict=True)]
        for name, reference in references.items():
            reference(gradients[name], 2 * rate)  # Muon's highest rate is twice the other
    found, rest = (dict(tree_flatten(tree)) for tree in trees)
    assert len(references) == 10
    for name in before:
        if name in references:
            np.testing.assert_allclose(np.array(found[name]), references[name].weight, rtol=1e-4, atol=1e-5)
        else:
            assert mx.array_equal(found[name], rest[name]), name


def with_singular_values(values, columns, seed=0):
    rows = len(values)
    left, _ = np.linalg.qr(numbers((rows, rows), seed))
    right, _ = np.linalg.qr(numbers((columns, columns), seed + 1))
    return (left * values) @ right[:rows]


def as_float32(matrix):
    return np.array(Muon(0.1).orthogonalise(mx.array(matrix, mx.float32)[None])[0])


# With twice as many columns as rows, the Gram matrices are multiplied first, which is less exact.
@pytest.mark.parametrize(("columns", "error"), [(24, 2e-5), (48, 5e-4)])
@pytest.mark.parametrize(
    "values",
    [np.logspace(0, -6, 16), np.logspace(3, -3, 16), np.zeros(16), np.eye(16)[0], np.ones(16), np.full(16, 1e-12)],
    ids=["1 to 1e-6", "1000 to 1e-3", "zero", "rank 1", "orthogonal", "tiny"],
)
def test_float32_is_enough_to_orthogonalise(values, columns, error):
    """However ill-conditioned the update is."""
    matrix = with_singular_values(values, columns)
    found = as_float32(matrix)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(found, newton_schulz(matrix), atol=error)
    np.testing.assert_allclose(as_float32(matrix.T).T, found, atol=error)


@pytest.mark.parametrize("columns", [24, 64])
def test_singular_values_from_a_hundredth_of_the_norm_end_near_1(columns):
    spread = np.logspace(0, -2, 16)
    values = np.linalg.svd(as_float32(with_singular_values(spread / np.linalg.norm(spread), columns)), compute_uv=False)
    assert values.min() > 0.65
    assert values.max() < 1.25


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
