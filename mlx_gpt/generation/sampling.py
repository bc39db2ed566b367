"""Draws the next token from logits. The settings have the meaning and the order of Hugging Face's transformers.

Shapes: B texts, V entries of the vocabulary, N of which are candidates.
"""

from collections.abc import Sequence

import mlx.core as mx

from mlx_gpt.config import GenerationConfig

Logprobs = tuple[mx.array, mx.array, mx.array]  # as of `likeliest`


def penalise(logits_bv: mx.array, counts_bv: mx.array, config: GenerationConfig) -> mx.array:
    """Make tokens that are already in the text less likely; `counts_bv` says how often each one is there.

    A positive logit is divided by the repetition penalty and a negative one multiplied by it, once, however often the
    token occurs (Keskar et al. 2019, CTRL, arXiv:1909.05858). The presence penalty is subtracted once, and the
    frequency penalty once for each occurrence, as OpenAI's API defines them.
    """
    penalties = (config.repetition_penalty, config.presence_penalty, config.frequency_penalty)
    return _penalise(logits_bv, counts_bv, *map(mx.array, penalties))


@mx.compile
def _penalise(
    logits_bv: mx.array, counts_bv: mx.array, repetition: mx.array, presence: mx.array, frequency: mx.array
) -> mx.array:
    divided_bv = mx.where(logits_bv > 0, logits_bv / repetition, logits_bv * repetition) - presence
    return mx.where(counts_bv > 0, divided_bv - frequency * counts_bv, logits_bv)


def penalises(config: GenerationConfig) -> bool:
    """Return whether `penalise` changes anything."""
    return (config.repetition_penalty, config.presence_penalty, config.frequency_penalty) != (1, 0, 0)


def sample(logits_bv: mx.array, config: GenerationConfig, keys: Sequence[mx.array]) -> mx.array:
    """Draw one token for each row and return the ids, (B,).

    Each row has its own random key, so a text is the same whether it is generated alone or in a batch.
    """
    if config.temperature == 0:
        return mx.argmax(logits_bv, axis=-1)
    logits_bn, ids_bn = logits_bv, None
    if 0 < config.top_k < logits_bn.shape[-1]:  # first, because it leaves little work for the other filters
        logits_bn, ids_bn = keep_top_k(logits_bn, config.top_k)
    # The highest logit becomes 0, so that a tiny temperature gives -inf and never inf.
    logits_bn = (logits_bn - logits_bn.max(axis=-1, keepdims=True)) / config.temperature
    if config.top_p < 1:
        logits_bn = keep_top_p(logits_bn, config.top_p)
    if config.min_p > 0:
        logits_bn = keep_min_p(logits_bn, config.min_p)
    # The largest of logits plus Gumbel noise is a draw from their softmax (Gumbel 1954).
    noise_bn = mx.stack([mx.random.gumbel(logits_bn.shape[1:], key=key) for key in keys])
    choice_b1 = mx.argmax(logits_bn + noise_bn, axis=-1, keepdims=True)
    return (choice_b1 if ids_bn is None else mx.take_along_axis(ids_bn, choice_b1, axis=-1)).squeeze(-1)


def keep_top_k(logits_bn: mx.array, k: int) -> tuple[mx.array, mx.array]:
    """Return the `k` highest logits of each row and their indices, (B, k) both, in no particular order."""
    ids_bk = mx.argpartition(-logits_bn, kth=k - 1, axis=-1)[:, :k]
    return mx.take_along_axis(logits_bn, ids_bk, axis=-1), ids_bk


def keep_top_p(logits_bn: mx.array, p: float) -> mx.array:
    """Set all logits to -inf except those of the likeliest tokens that together reach probability `p`.

    Source: Holtzman et al. 2020, arXiv:1904.09751.
    """
    order_bn = mx.argsort(-logits_bn, axis=-1)
    probabilities_bn = mx.softmax(mx.take_along_axis(logits_bn, order_bn, axis=-1), axis=-1)
    likelier_bn = mx.cumsum(probabilities_bn, axis=-1) - probabilities_bn
    # The likeliest token always stays, even if rounding makes its `likelier_bn` more than zero.
    outside_bn = (likelier_bn >= p) & (mx.arange(logits_bn.shape[-1]) > 0)
    outside_bn = mx.put_along_axis(mx.zeros_like(outside_bn), order_bn, outside_bn, axis=-1)
    return mx.where(outside_bn, -mx.inf, logits_bn)


def keep_min_p(logits_bn: mx.array, p: float) -> mx.array:
    """Set the logits of tokens that are less likely than `p` times the likeliest to -inf.

    Source: Nguyen et al. 2024, arXiv:2407.01082.
    """
    relative_bn = mx.exp(logits_bn - logits_bn.max(axis=-1, keepdims=True))
    return mx.where(relative_bn < p, -mx.inf, logits_bn)


def likeliest(logits_bv: mx.array, tokens_b: mx.array, k: int) -> Logprobs:
    """Return the log-probability of a token of each row, (B,), and the `k` highest with their ids, (B, k) both.

    The `k` highest are in no particular order.
    """
    logprobs_bv = logits_bv - mx.logsumexp(logits_bv, axis=-1, keepdims=True)
    chosen_b = mx.take_along_axis(logprobs_bv, tokens_b[:, None], axis=-1).squeeze(-1)
    return chosen_b, *keep_top_k(logprobs_bv, k)


def listed(logprobs: Logprobs) -> list[tuple[float, tuple[tuple[int, float], ...]]]:
    """Return each token's log-probability, and the likeliest tokens in its place, the likeliest first."""
    chosen, values, ids = (array.tolist() for array in logprobs)
    return [
        (logprob, tuple(sorted(zip(row_ids, row_values, strict=True), key=lambda pair: -pair[1])))
        for logprob, row_values, row_ids in zip(chosen, values, ids, strict=True)
    ]
