"""The next token is drawn with the same probabilities as in transformers."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
import transformers

from mlx_gpt.config import GenerationConfig
from mlx_gpt.generation.sampling import keep_min_p, keep_top_k, keep_top_p, likeliest, penalise, sample

ENTRIES = 40
OFF: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}


@pytest.fixture(scope="module")
def logits():
    """Logits (5, ENTRIES) of five texts, positive and negative."""
    return (2 * np.random.default_rng(0).standard_normal((5, ENTRIES))).astype(np.float32)


@pytest.fixture(scope="module")
def keys():
    """Random keys for 3,000 draws."""
    return list(mx.random.split(mx.random.key(0), 3000))


def warped(warpers, logits, ids=None):
    scores = torch.tensor(logits)
    for warper in warpers:
        scores = warper(ids, scores)
    return scores.numpy()


def probabilities(logits):
    odds = np.exp(logits.astype(np.float64) - logits.max(axis=-1, keepdims=True))
    return odds / odds.sum(axis=-1, keepdims=True)


def draws(logits_v, keys, **settings):
    """Return the fraction of draws in which each entry is drawn."""
    logits_bv = mx.broadcast_to(mx.array(logits_v), (len(keys), len(logits_v)))
    drawn = np.array(sample(logits_bv, GenerationConfig(**OFF | settings), keys))
    return np.bincount(drawn, minlength=len(logits_v)) / len(keys)


def counts_of(ids):
    """Return how often each entry is in each row."""
    return mx.array(np.stack([np.bincount(row, minlength=ENTRIES) for row in ids]))


# ---- each filter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [0.5, 1.2, 3.0])
def test_the_repetition_penalty_is_that_of_transformers(logits, penalty):
    ids = np.random.default_rng(1).integers(0, ENTRIES, (5, 12))
    ours = penalise(mx.array(logits), counts_of(ids), GenerationConfig(repetition_penalty=penalty))
    processor = transformers.RepetitionPenaltyLogitsProcessor(penalty)
    np.testing.assert_allclose(np.array(ours), warped([processor], logits, torch.tensor(ids)), rtol=1e-6)


def test_presence_and_frequency_penalties_are_those_of_openai(logits):
    ids = np.random.default_rng(1).integers(0, ENTRIES, (5, 60))
    config = GenerationConfig(**OFF | {"presence_penalty": 0.7, "frequency_penalty": -0.3})
    counts = np.array(counts_of(ids))
    assert counts.max() > 2
    expected = logits - 0.7 * (counts > 0) + 0.3 * counts
    np.testing.assert_allclose(np.array(penalise(mx.array(logits), mx.array(counts), config)), expected, atol=1e-6)


def test_log_probabilities_are_of_the_whole_vocabulary(logits):
    tokens = np.arange(5)
    chosen, values, ids = (np.array(a) for a in likeliest(mx.array(logits), mx.array(tokens), 3))
    expected = np.log(probabilities(logits))
    np.testing.assert_allclose(chosen, expected[np.arange(5), tokens], atol=1e-5)
    np.testing.assert_allclose(np.sort(values), np.sort(expected)[:, -3:], atol=1e-5)
    np.testing.assert_allclose(values, np.take_along_axis(expected, ids.astype(int), axis=1), atol=1e-5)


@pytest.mark.parametrize("k", [1, 3, ENTRIES - 1])
def test_top_k_keeps_what_transformers_keeps(logits, k):
    kept, ids = keep_top_k(mx.array(logits), k)
    ours = np.full_like(logits, -np.inf)
    np.put_along_axis(ours, np.array(ids), np.array(kept), axis=1)
    assert np.array_equal(ours, warped([transformers.TopKLogitsWarper(k)], logits))


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_top_p_keeps_what_transformers_keeps(logits, p):
    assert np.array_equal(np.array(keep_top_p(mx.array(logits), p)), warped([transformers.TopPLogitsWarper(p)], logits))


@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 1.0])
def test_min_p_keeps_what_transformers_keeps(logits, p):
    assert np.array_equal(np.array(keep_min_p(mx.array(logits), p)), warped([transformers.MinPLogitsWarper(p)], logits))


# ---- drawing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "warpers"),
    [
        ({}, []),
        ({"temperature": 0.5}, [transformers.TemperatureLogitsWarper(0.5)]),
        ({"top_k": 5}, [transformers.TopKLogitsWarper(5)]),
        ({"top_p": 0.8}, [transformers.TopPLogitsWarper(0.8)]),
        ({"min_p": 0.2}, [transformers.MinPLogitsWarper(0.2)]),
        (
            # Each filter acts on the result of the one before, so another order would keep other tokens.
            {"temperature": 1.5, "top_k": 12, "top_p": 0.8, "min_p": 0.2},
            [
                transformers.TemperatureLogitsWarper(1.5),
                transformers.TopKLogitsWarper(12),
                transformers.TopPLogitsWarper(0.8),
                transformers.MinPLogitsWarper(0.2),
            ],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_draws_have_the_probabilities_of_transformers(logits, keys, settings, warpers):
    expected = probabilities(warped(warpers, logits))[0]
    found = draws(logits[0], keys, **settings)
    assert np.all(found[expected == 0] == 0)
    assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected / len(keys)))  # five standard errors


@pytest.mark.parametrize(
    "neutral", [{"top_k": 0}, {"top_k": ENTRIES}, {"top_k": 10**9}, {"top_p": 1.0}, {"min_p": 0.0}]
)
def test_a_neutral_setting_is_off(logits, keys, neutral):
    some = keys[:200]
    assert np.array_equal(draws(logits[0], some, **neutral), draws(logits[0], some))


def test_a_penalty_of_one_is_off(logits):
    counts = counts_of(np.zeros((5, 3), int))
    assert np.array_equal(np.array(penalise(mx.array(logits), counts, GenerationConfig(repetition_penalty=1))), logits)


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 0}, {"temperature": 1e-30}, {"top_k": 1}, {"top_p": 1e-9}, {"min_p": 1.0}],
    ids=str,
)
def test_the_strictest_settings_always_take_the_likeliest(logits, keys, settings):
    tokens = sample(mx.array(logits), GenerationConfig(**OFF | settings), keys[:5])
    assert np.array_equal(np.array(tokens), logits.argmax(axis=1))


def test_a_token_with_a_logit_of_minus_infinity_is_never_drawn(logits, keys):
    ruled_out = np.where(np.arange(ENTRIES) % 2, -np.inf, logits[0]).astype(np.float32)
    assert draws(ruled_out, keys[:500], temperature=50.0, top_k=30, top_p=0.99)[1::2].sum() == 0


def test_a_text_is_the_same_alone_and_in_a_batch(logits, keys):
    config = GenerationConfig(top_k=10, top_p=0.9)
    together = np.array(sample(mx.array(logits), config, keys[:5]))
    alone = [sample(mx.array(logits[i : i + 1]), config, keys[i : i + 1]).item() for i in range(5)]
    assert together.tolist() == alone
