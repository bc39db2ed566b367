"""A step of training: the same numbers as PyTorch's, and nothing but what it was given decides them."""

import dataclasses

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten
from mlx_gpt.training.step import TrainingStep

from mlx_gpt import backend
from mlx_gpt.config import TrainingConfig
from mlx_gpt.distributed import ALONE, Ranks
from mlx_gpt.models.directory import CONV1D, save_model

RATE = 1e-3
# Clips for certain: the gradients of the models here have norms of 1 to 3.
TRAINING = TrainingConfig(max_grad_norm=0.5, seed=1)


@pytest.fixture(scope="module")
def batches(bpe):
    """Five batches of 4 windows of 16 tokens and their successors."""
    draw = np.random.default_rng(5)
    return [draw.integers(0, bpe.vocab_size, (4, 17)).astype(np.int32) for _ in range(5)]


def train(model, batches, training=TRAINING, dtype=mx.float32):
    """Make one step of each batch; the `TrainingStep` and the losses."""
    step = TrainingStep(model, training, dtype)
    losses = [step(i, RATE, [batch]).loss.item() for i, batch in enumerate(batches)]
    return step, losses


def mean_gradients(step):
    return {name: np.array(m) for name, m in tree_flatten(step.optimizer_state["m"])}


def state_of(step):
    return {name: np.array(array) for name, array in tree_flatten(step.optimizer_state)}


def assert_same(once, again):
    assert all(np.array_equal(once[name], again[name], equal_nan=True) for name in once | again)


def assert_close(once, again, atol):
    for name in once | again:
        np.testing.assert_allclose(once[name], again[name], rtol=0, atol=atol, err_msg=name)


def assert_weights_agree(once, again):
    """On average over each tensor, to a hundredth of a step, which is half of what weight decay does.

    Not each number: Adam divides a gradient by its own size, so that one which is 0 but for rounding becomes a step
    of any size up to the rate. That of a key's bias always is: it adds the same to all scores of a query.
    """
    for name in once | again:
        difference = np.abs(once[name] - again[name])
        if name.endswith("c_attn.bias"):
            difference = np.delete(difference, slice(32, 64))
        assert difference.mean() < RATE / 100, name


# ---- against PyTorch ------------------------------------------------------------------------------------------------


class Reference:
    """PyTorch training transformers' GPT-2 from the same weights."""

    def __init__(self, folder):
        self.model = transformers.GPT2LMHeadModel.from_pretrained(folder)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": TRAINING.weight_decay}, {"params": others, "weight_decay": 0.0}]
        betas = (TRAINING.beta1, TRAINING.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=betas, eps=1e-8)

    def __call__(self, windows):
        windows = torch.tensor(windows, dtype=torch.long)
        logits = self.model(windows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), TRAINING.max_grad_norm)
        self.optimizer.step()
        return loss.item(), norm.item()

    def weights(self):
        return self._by_our_names(lambda p: p)

    def mean_gradients(self):
        return self._by_our_names(lambda p: self.optimizer.state[p]["exp_avg"])

    def _by_our_names(self, get):
        named = {name.removeprefix("transformer."): get(p) for name, p in self.model.named_parameters()}
        return {name: (t.T if name.endswith(CONV1D) else t).detach().numpy() for name, t in named.items()}


@pytest.mark.parametrize("steps", [1, 5])
def test_steps_are_those_of_pytorch(make_model, weights_of, bpe, batches, tmp_path, steps):
    model = make_model()
    save_model(tmp_path, model, bpe)
    reference, step = Reference(tmp_path), TrainingStep(model, TRAINING)
    for i, batch in enumerate(batches[:steps]):
        loss, norm = reference(batch)
        result = step(i, RATE, [batch])
        assert result.loss.item() == pytest.approx(loss, rel=1e-5)
        assert result.grad_norm.item() == pytest.approx(norm, rel=1e-4)
        assert norm > TRAINING.max_grad_norm
    assert_close(mean_gradients(step), reference.mean_gradients(), atol=1e-7)  # the largest are 1e-3 to 1e-2
    assert_weights_agree(weights_of(model), reference.weights())


# ---- however it is computed -----------------------------------------------------------------------------------------


def test_four_micro_batches_of_four_are_a_batch_of_sixteen(make_model, weights_of, batches):
    whole, parts = make_model(), make_model()
    whole_step, parts_step = TrainingStep(whole, TRAINING), TrainingStep(parts, TRAINING)
    for i in range(2):
        at_once = whole_step(i, RATE, [np.concatenate(batches[:4])])
        in_parts = parts_step(i, RATE, batches[:4])
        assert in_parts.loss.item() == pytest.approx(at_once.loss.item(), rel=1e-5)
        assert in_parts.grad_norm.item() == pytest.approx(at_once.grad_norm.item(), rel=1e-5)
    assert_close(mean_gradients(parts_step), mean_gradients(whole_step), atol=1e-7)
    assert_weights_agree(weights_of(parts), weights_of(whole))


def test_compiled_steps_are_the_eager_ones(make_model, weights_of, batches, eager):
    slow, fast = make_model(), make_model()
    slow_step, slow_losses = train(slow, batches)
    mx.enable_compile()
    fast_step, fast_losses = train(fast, batches)
    assert fast_losses == pytest.approx(slow_losses, rel=1e-6)
    assert_close(mean_gradients(fast_step), mean_gradients(slow_step), atol=1e-7)
    assert_weights_agree(weights_of(fast), weights_of(slow))


def test_bfloat16_is_for_computing_only(make_model, batches, eager):
    _, expected = train(make_model(), batches)
    model = make_model()
    step, losses = train(model, batches, dtype=mx.bfloat16)
    stored = [array for _, array in tree_flatten([model.parameters(), step.optimizer_state])]
    assert {array.dtype for array in stored if array.ndim} == {mx.float32}
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("limit", "shortened"), [(0.5, True), (1e6, False), (0.0, False)])
def test_only_gradients_above_the_limit_are_shortened(make_model, batches, eager, limit, shortened):
    step = TrainingStep(make_model(), dataclasses.replace(TRAINING, max_grad_norm=limit))
    norm = step(0, RATE, batches[:1]).grad_norm.item()
    used = np.sqrt(sum((m**2).sum() for m in mean_gradients(step).values())) / (1 - TRAINING.beta1)
    assert norm > 0.6
    assert used == pytest.approx(limit if shortened else norm, rel=1e-4)


# ---- dropout --------------------------------------------------------------------------------------------------------


def test_dropout_is_a_function_of_the_seed_and_the_step(make_model, weights_of, batches):
    def trained(training, elsewhere):
        mx.random.seed(elsewhere)
        model = make_model(dropout=0.1)
        train(model, batches[:2], training)
        return weights_of(model)

    once, again = trained(TRAINING, elsewhere=1), trained(TRAINING, elsewhere=2)
    other = trained(dataclasses.replace(TRAINING, seed=2), elsewhere=1)
    assert_same(once, again)
    assert not np.array_equal(once["wte.weight"], other["wte.weight"])


def test_two_halves_of_a_training_are_the_whole(make_model, weights_of, batches):
    whole, halves = make_model(dropout=0.1), make_model(dropout=0.1)
    train(whole, batches[:4])
    before, _ = train(halves, batches[:2])
    after = TrainingStep(halves, TRAINING)
    after.optimizer_state = before.optimizer_state
    for i in (2, 3):
        after(i, RATE, [batches[i]])
    assert_same(weights_of(whole), weights_of(halves))


def test_each_step_and_each_micro_step_drops_out_other_numbers(make_model, batches):
    step = TrainingStep(make_model(dropout=0.1), TRAINING)
    batch = batches[0]
    losses = [step(i, 0.0, [batch]).loss.item() for i in (0, 1, 0)]  # a rate of 0 leaves the weights
    assert losses[0] == losses[2] != losses[1]
    assert step(0, 0.0, [batch, batch]).loss.item() != losses[0]


def test_each_rank_drops_out_other_numbers(make_model, batches, eager):
    class Second(Ranks):
        rank, size = 1, 2

    first, second = (TrainingStep(make_model(dropout=0.1), TRAINING, ranks=ranks) for ranks in (ALONE, Second()))
    losses = [step(0, 0.0, batches[:1]).loss.item() for step in (first, first, second)]
    assert losses[0] == losses[1] != losses[2]


def test_ranks_that_split_their_batches_otherwise_weigh_alike(make_model, batches, monkeypatch, eager):
    """One may have a core to itself and another two, with a stream each."""
    sent = []

    class Recording(Ranks):
        rank, size = 0, 2

        def sum(self, arrays):
            sent.append(arrays)
            return arrays

    results = []
    for count in (1, 2):
        monkeypatch.setattr(backend, "share_count", lambda batch_size, on_gpu, saving, count=count: count)
        step = TrainingStep(make_model(), TRAINING, ranks=Recording())
        results.append(step(0, RATE, batches[:2]).numbers())
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    (_, one), (_, other) = sent
    np.testing.assert_allclose(one["wpe"]["weight"], other["wpe"]["weight"], atol=1e-6)


# ---- what must not break it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("poison", [np.inf, np.nan])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(make_model, weights_of, batches, poison):
    straight, poisoned = make_model(), make_model()
    train(straight, batches[:2])
    step, _ = train(poisoned, batches[:1])

    sound = poisoned.wpe.weight
    poisoned.wpe.weight = mx.where(mx.arange(32)[:, None] == 3, poison, sound)
    weights, state = weights_of(poisoned), state_of(step)
    assert not np.isfinite(step(1, RATE, batches[1:2]).loss.item())
    assert_same(weights_of(poisoned), weights)
    assert_same(state_of(step), state)

    poisoned.wpe.weight = sound
    step(1, RATE, batches[1:2])
    assert_same(weights_of(poisoned), weights_of(straight))


def test_training_lowers_the_loss_on_what_it_sees(make_model, batches):
    _, losses = train(make_model(), batches[:1] * 20)
    assert losses[-1] < losses[0] - 0.3
