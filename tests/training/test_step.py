"""A step gives the same numbers as PyTorch, and they depend only on its arguments."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers
from mlx.utils import tree_flatten

from mlx_gpt.config import TrainingConfig
from mlx_gpt.cpu import streams
from mlx_gpt.device import device
from mlx_gpt.distributed import ALONE
from mlx_gpt.models import gpt2
from mlx_gpt.models.directory import save_model
from mlx_gpt.objectives.text import Text
from mlx_gpt.optim import make_optimizer
from mlx_gpt.training.loop import make_step

RATE = 1e-3
# Clips for certain: the gradients of the models here have norms of 1 to 3.
TRAINING = TrainingConfig(max_grad_norm=0.5, seed=1)
MUON = dataclasses.replace(TRAINING, optimizer="muon")
QWEN3: dict[str, Any] = {"model_type": "qwen3", "n_head": 4, "n_kv_head": 2, "tie_embeddings": False}
# What a GPU computes with, and what a CPU computes with.
PLAIN, ACCELERATED = dataclasses.replace(device(), accelerated=False), dataclasses.replace(device(), accelerated=True)


@pytest.fixture(scope="module")
def windows(bpe):
    """Five arrays of 4 windows of 16 tokens and their successors."""
    draw = np.random.default_rng(5)
    return [draw.integers(0, bpe.vocab_size, (4, 17)).astype(np.int32) for _ in range(5)]


@pytest.fixture(scope="module")
def weights():
    """Weights for the same windows, a third of them 0, and other sums for each array."""
    draw = np.random.default_rng(6)
    return [(draw.random((4, 16)) > share).astype(np.float32) for share in (0.1, 0.2, 0.4, 0.6, 0.4)]


class Trainer:
    """A model with its optimizer and its compiled step."""

    def __init__(self, model, training=TRAINING, on=None, ranks: Any = ALONE):
        on = on or device()
        self.model, self.optimizer = model, make_optimizer(training, model)
        self._step = make_step(model, self.optimizer, on.accelerate(Text()), training, on, ranks)

    def __call__(self, number, windows, weights=None, rate=RATE):
        """Make a step of micro-batches whose tokens weigh 1 where no weights are given."""
        weights = weights or [np.ones((len(batch), batch.shape[1] - 1), np.float32) for batch in windows]
        batches = [(mx.array(tokens), mx.array(w)) for tokens, w in zip(windows, weights, strict=True)]
        return self._step(number, rate, batches)

    def train(self, windows, start=0):
        """Make a step of each array of windows; the losses."""
        return [self(number, [batch]).loss.item() for number, batch in enumerate(windows, start)]

    def state(self):
        """The optimizer's state as a copy in numpy."""
        return {name: np.array(array) for name, array in tree_flatten(self.optimizer.state)}

    def mean_gradients(self):
        """The first moments of all parameters: those of the matrices and those of the vectors."""
        matrices, vectors = (tree_flatten(state) for state in self.optimizer.state["states"])
        return {name[:-2]: np.array(m) for name, m in matrices + vectors if name.endswith(".m")}


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
    """PyTorch training transformers' network from the same weights."""

    def __init__(self, folder):
        self.model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
        matrices = [p for p in self.model.parameters() if p.ndim >= 2]
        others = [p for p in self.model.parameters() if p.ndim < 2]
        groups = [{"params": matrices, "weight_decay": TRAINING.weight_decay}, {"params": others, "weight_decay": 0.0}]
        betas = (TRAINING.beta1, TRAINING.beta2)
        self.optimizer = torch.optim.AdamW(groups, lr=RATE, betas=betas, eps=1e-8)

    def __call__(self, windows, weights=None):
        """Make a step of windows (B, 17); targets whose weight is 0 are ignored."""
        windows = torch.tensor(windows, dtype=torch.long)
        targets = windows[:, 1:]
        if weights is not None:
            targets = targets.masked_fill(torch.tensor(weights) == 0, -100)
        logits = self.model(windows[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)
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
        return {name: (t.T if name.endswith(gpt2.CONV1D) else t).detach().numpy() for name, t in named.items()}


@pytest.fixture(params=[{}, QWEN3], ids=["gpt2", "qwen3"])
def make_either(request, make_model):
    """Make either network of ours."""
    return lambda **settings: make_model(**request.param | settings)


@pytest.fixture
def reference(make_either, bpe, tmp_path):
    save_model(tmp_path, make_either(), bpe)
    return Reference(tmp_path)


def assert_agrees(result, expected):
    loss, norm = expected
    assert result.loss.item() == pytest.approx(loss, rel=1e-5)
    assert result.grad_norm.item() == pytest.approx(norm, rel=1e-4)
    assert norm > TRAINING.max_grad_norm


@pytest.fixture(params=[PLAIN, ACCELERATED], ids=["plain", "accelerated"])
def trainer(request, make_either):
    """The model on the path of a GPU and on that of a CPU."""
    made = make_either()
    model = type(made)(made.args)
    model.update(made.parameters())
    return Trainer(request.param.accelerate(model), on=request.param)


@pytest.mark.parametrize("steps", [1, 5])
def test_steps_are_those_of_pytorch(trainer, reference, weights_of, windows, steps):
    for number, batch in enumerate(windows[:steps]):
        assert_agrees(trainer(number, [batch]), reference(batch))
    assert_close(trainer.mean_gradients(), reference.mean_gradients(), atol=1e-7)  # the largest are 1e-3 to 1e-2
    assert_weights_agree(weights_of(trainer.model), reference.weights())


@pytest.mark.parametrize("micro_steps", [1, 4])
def test_a_token_of_weight_0_does_not_count(trainer, reference, weights_of, windows, weights, micro_steps):
    """Every other token weighs the same, however few of them its micro-batch has."""
    tokens, kept = np.concatenate(windows[:4]), np.concatenate(weights[:4])
    result = trainer(0, np.split(tokens, micro_steps), np.split(kept, micro_steps))
    assert_agrees(result, reference(tokens, kept))
    assert_close(trainer.mean_gradients(), reference.mean_gradients(), atol=1e-7)
    assert_weights_agree(weights_of(trainer.model), reference.weights())


# ---- however it is computed -----------------------------------------------------------------------------------------


def test_four_micro_batches_of_four_are_a_batch_of_sixteen(make_model, weights_of, windows):
    whole, parts = Trainer(make_model()), Trainer(make_model())
    for number in range(2):
        at_once = whole(number, [np.concatenate(windows[:4])])
        in_parts = parts(number, windows[:4])
        assert in_parts.loss.item() == pytest.approx(at_once.loss.item(), rel=1e-5)
        assert in_parts.grad_norm.item() == pytest.approx(at_once.grad_norm.item(), rel=1e-5)
    assert_close(parts.mean_gradients(), whole.mean_gradients(), atol=1e-7)
    assert_weights_agree(weights_of(parts.model), weights_of(whole.model))


def test_compiled_steps_are_the_eager_ones(make_model, weights_of, windows, eager):
    slow, fast = Trainer(make_model()), Trainer(make_model())
    slow_losses = slow.train(windows)
    mx.enable_compile()
    fast_losses = fast.train(windows)
    assert fast_losses == pytest.approx(slow_losses, rel=1e-6)
    assert_close(fast.mean_gradients(), slow.mean_gradients(), atol=1e-7)
    assert_weights_agree(weights_of(fast.model), weights_of(slow.model))


@pytest.mark.parametrize(("network", "training"), [({}, TRAINING), (QWEN3, MUON)], ids=["gpt2", "qwen3 with muon"])
def test_bfloat16_is_for_computing_only(make_model, windows, eager, network, training):
    expected = Trainer(make_model(**network), training, PLAIN).train(windows)
    trainer = Trainer(make_model(**network), dataclasses.replace(training, precision="bfloat16"), PLAIN)
    losses = trainer.train(windows)
    stored = [array for _, array in tree_flatten([trainer.model.parameters(), trainer.optimizer.state])]
    assert {array.dtype for array in stored if array.ndim} == {mx.float32}
    assert losses != expected
    assert losses == pytest.approx(expected, rel=0.01)


@pytest.mark.parametrize(("limit", "shortened"), [(0.5, True), (1e6, False), (0.0, False)])
def test_only_gradients_above_the_limit_are_shortened(make_model, windows, eager, limit, shortened):
    trainer = Trainer(make_model(), dataclasses.replace(TRAINING, max_grad_norm=limit))
    norm = trainer(0, windows[:1]).grad_norm.item()
    used = np.sqrt(sum((m**2).sum() for m in trainer.mean_gradients().values())) / (1 - TRAINING.beta1)
    assert norm > 0.6
    assert used == pytest.approx(limit if shortened else norm, rel=1e-4)


def test_recomputed_activations_change_no_number(make_either, windows, eager):
    """The dropout of the second computation is that of the first."""
    kept, recomputed = (
        Trainer(make_either(dropout=0.1), dataclasses.replace(TRAINING, grad_checkpoint=on), PLAIN)
        for on in (False, True)
    )
    assert recomputed.train(windows[:2]) == pytest.approx(kept.train(windows[:2]), rel=1e-6)
    assert_close(recomputed.mean_gradients(), kept.mean_gradients(), atol=1e-7)


# ---- dropout --------------------------------------------------------------------------------------------------------


def test_dropout_is_a_function_of_the_seed_and_the_step(make_model, weights_of, windows):
    def trained(training, elsewhere):
        mx.random.seed(elsewhere)
        model = make_model(dropout=0.1)
        Trainer(model, training).train(windows[:2])
        return weights_of(model)

    once, again = trained(TRAINING, elsewhere=1), trained(TRAINING, elsewhere=2)
    other = trained(dataclasses.replace(TRAINING, seed=2), elsewhere=1)
    assert_same(once, again)
    assert not np.array_equal(once["wte.weight"], other["wte.weight"])


@pytest.mark.parametrize(("network", "training"), [({}, TRAINING), (QWEN3, MUON)], ids=["gpt2", "qwen3 with muon"])
def test_two_halves_of_a_training_are_the_whole(make_model, weights_of, windows, network, training):
    whole, half = (Trainer(make_model(dropout=0.1, **network), training) for _ in range(2))
    whole.train(windows[:4])
    half.train(windows[:2])
    other_half = Trainer(half.model, training)
    other_half.optimizer.state = half.optimizer.state
    other_half.train(windows[2:4], start=2)
    assert_same(weights_of(whole.model), weights_of(half.model))
    assert_same(whole.state(), other_half.state())


def test_each_step_and_each_micro_step_drops_other_activations(make_model, windows):
    trainer = Trainer(make_model(dropout=0.1))
    batch = windows[0]
    losses = [trainer(number, [batch], rate=0.0).loss.item() for number in (0, 1, 0)]  # a rate of 0 leaves the weights
    assert losses[0] == losses[2] != losses[1]
    assert trainer(0, [batch, batch], rate=0.0).loss.item() != losses[0]


# ---- several ranks --------------------------------------------------------------------------------------------------


def test_each_rank_drops_other_activations(make_model, windows, eager):
    second = SimpleNamespace(rank=1, size=2, sum=lambda sums: sums)
    trainers = Trainer(make_model(dropout=0.1)), Trainer(make_model(dropout=0.1), ranks=second)
    losses = [trainers[i](0, windows[:1], rate=0.0).loss.item() for i in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def sums_of(model, windows, weights):
    """What a rank sends to the others: its loss, its weights and its gradients, summed over its tokens."""
    sent: list[Any] = []

    def record(sums):
        sent.append(sums)
        return sums

    Trainer(model, ranks=SimpleNamespace(rank=0, size=2, sum=record))(0, windows, weights)
    return {name: np.array(array) for name, array in tree_flatten(sent[0])}


def test_the_sums_of_two_ranks_are_those_of_one_that_has_both_batches(make_model, windows, weights, eager):
    both, *each = (sums_of(make_model(), windows[p], weights[p]) for p in (slice(0, 2), slice(0, 1), slice(1, 2)))
    for name, total in both.items():
        np.testing.assert_allclose(each[0][name] + each[1][name], total, rtol=1e-5, atol=1e-5, err_msg=name)


def test_a_rank_with_one_core_sends_the_sums_of_one_with_two(make_model, windows, weights, monkeypatch, eager):
    found = []
    for count in (1, 2):
        monkeypatch.setattr(streams, "stream_count", lambda count=count: count)
        found.append(sums_of(make_model(), windows[:2], weights[:2]))
    one, two = found
    assert_close(one, two, atol=1e-4)


# ---- what must not break it -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [PLAIN, ACCELERATED], ids=["plain", "accelerated"])
@pytest.mark.parametrize("training", [TRAINING, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("poison", [np.inf, np.nan])
def test_a_step_that_is_not_finite_is_as_if_it_had_not_been(make_model, weights_of, windows, poison, training, place):
    straight, poisoned = (Trainer(make_model(), training, place) for _ in range(2))
    straight.train(windows[:2])
    poisoned.train(windows[:1])

    model = poisoned.model
    sound = model.wpe.weight
    model.wpe.weight = mx.where(mx.arange(32)[:, None] == 3, poison, sound)
    parameters, state = weights_of(model), poisoned.state()
    assert not np.isfinite(poisoned(1, windows[1:2]).loss.item())
    assert_same(weights_of(model), parameters)
    assert_same(poisoned.state(), state)

    model.wpe.weight = sound
    poisoned(1, windows[1:2])
    assert_same(weights_of(model), weights_of(straight.model))
    assert_same(poisoned.state(), straight.state())


def test_a_step_without_a_token_that_counts_changes_nothing(make_model, weights_of, windows, eager):
    trainer = Trainer(make_model())
    trainer.train(windows[:1])
    parameters, state = weights_of(trainer.model), trainer.state()
    assert not np.isfinite(trainer(1, windows[:1], [np.zeros((4, 16), np.float32)]).grad_norm.item())
    assert_same(weights_of(trainer.model), parameters)
    assert_same(trainer.state(), state)


@pytest.mark.parametrize(("network", "training"), [({}, TRAINING), (QWEN3, MUON)], ids=["gpt2", "qwen3 with muon"])
def test_training_lowers_the_loss_on_what_it_sees(make_model, windows, network, training):
    losses = Trainer(make_model(**network), training).train(windows[:1] * 20)
    assert losses[-1] < losses[0] - 0.3
