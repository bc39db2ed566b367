"""Losses are those computed by hand, and evaluating changes nothing."""

import math

import mlx.core as mx
import numpy as np
import pytest

from mlx_gpt.config import TrainingConfig
from mlx_gpt.data.batches import TextWindows
from mlx_gpt.device import device
from mlx_gpt.evaluation import Evaluation, Evaluator
from mlx_gpt.objectives.text import Text
from mlx_gpt.optim import make_optimizer
from mlx_gpt.training.loop import make_step

SEQ_LEN = 16


@pytest.fixture(scope="module")
def text(byte_tokenizer, sentences):
    """Bytes of some documents: 12 windows and a tail, of which the last batch of 4 is short."""
    ids = [i for sentence in sentences for i in [*byte_tokenizer.encode(sentence), byte_tokenizer.end_of_text]]
    return np.array(ids[: 12 * SEQ_LEN + 6], np.uint16)


@pytest.fixture
def evaluator(text, byte_tokenizer):
    def make(model, **options):
        return Evaluator(model, TextWindows(text, SEQ_LEN), byte_tokenizer.byte_lengths(), batch_size=4, **options)

    return make


def trainer(model, ids):
    """A function that makes step `i` on a batch of `ids`."""
    training = TrainingConfig()
    step = make_step(model, make_optimizer(training, model), device().accelerate(Text()), training, device())
    return lambda i: step(i, 1e-3, [(mx.array(ids), mx.ones((4, 16)))])


def losses_by_hand(model, text):
    """The loss of each token but the first, each window read by itself."""
    losses = []
    for begin in range(0, len(text) - 1, SEQ_LEN):
        window = text[begin : begin + SEQ_LEN + 1].astype(np.int32)
        logits = np.array(model(mx.array(window[None, :-1])), np.float64)[0]
        logits -= logits.max(axis=-1, keepdims=True)
        log_probabilities = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        losses.append(-log_probabilities[np.arange(len(window) - 1), window[1:]])
    return losses


def test_is_the_mean_over_every_token_but_the_first(model, text, evaluator):
    losses = np.concatenate(losses_by_hand(model, text))
    evaluation = evaluator(model)()
    assert evaluation.tokens == len(losses) == len(text) - 1 == 12 * SEQ_LEN + 5
    assert evaluation.loss == pytest.approx(losses.mean(), rel=1e-5)
    assert evaluation.perplexity == pytest.approx(math.exp(losses.mean()), rel=1e-4)
    assert evaluation.text_bytes == sum(i < 256 for i in text[1:]) < evaluation.tokens
    assert evaluation.bits_per_byte == pytest.approx(losses.sum() / math.log(2) / evaluation.text_bytes, rel=1e-5)


def test_a_limit_takes_windows_from_all_over_the_text(model, text, evaluator):
    losses = losses_by_hand(model, text)
    chosen = np.concatenate([losses[i] for i in (0, 4, 8, 12)])
    evaluation = evaluator(model, limit=4)()
    assert evaluation.tokens == len(chosen)
    assert evaluation.loss == pytest.approx(chosen.mean(), rel=1e-5)


def test_progress_counts_the_windows(model, evaluator):
    seen: list[int] = []
    evaluator(model)(seen.append)
    assert seen == [4, 4, 4, 1]


def test_bfloat16_gives_nearly_the_same_and_leaves_the_weights_in_float32(make_model, evaluator, weights_of, eager):
    model = make_model()
    before = weights_of(model)
    exact, rough = evaluator(model)(), evaluator(model, dtype=mx.bfloat16)()
    assert rough.loss != exact.loss
    assert rough.loss == pytest.approx(exact.loss, rel=0.01)
    assert model.wte.weight.dtype == mx.float32
    assert all(np.array_equal(before[name], weight) for name, weight in weights_of(model).items())


def test_dropout_is_off(make_model, model, evaluator):
    assert evaluator(make_model(dropout=0.5))() == evaluator(model)()


def test_evaluates_the_model_as_it_is_now(make_model, evaluator, ids):
    model = make_model()
    evaluate, step = evaluator(model), trainer(model, ids)
    before = evaluate()
    step(0)
    after = evaluate()
    assert after != before
    assert after == evaluator(model)()


def test_how_often_a_model_is_evaluated_never_changes_training(make_model, evaluator, ids, weights_of):
    def trained(every):
        model = make_model(dropout=0.1)
        evaluate, step = evaluator(model), trainer(model, ids)
        for i in range(4):
            if i % every == 0:
                evaluate()
            step(i)
        return weights_of(model)

    always, once = trained(every=1), trained(every=4)
    assert all(np.array_equal(always[name], once[name]) for name in always)


def test_a_hopeless_model_has_infinite_perplexity():
    assert Evaluation(loss=1e4, tokens=1, text_bytes=1).perplexity == math.inf


def test_a_text_of_no_bytes_has_a_finite_price():
    assert math.isfinite(Evaluation(loss=1.0, tokens=1, text_bytes=0).bits_per_byte)
