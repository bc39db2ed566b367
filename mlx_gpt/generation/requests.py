"""The requests of an engine, with the prompts that it reads and the texts that it generates for them."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import takewhile

import mlx.core as mx
import numpy as np

from mlx_gpt.config import GenerationConfig
from mlx_gpt.generation.cache import BatchCache
from mlx_gpt.generation.sampling import Logprobs, penalise, penalises, sample
from mlx_gpt.generation.stop_strings import StreamedText
from mlx_gpt.seeds import seed_from
from mlx_gpt.tokenizer import Tokenizer


@dataclass(frozen=True, eq=False)
class Request:
    """A prompt and how to continue it.

    Attributes:
        prompt: ids, from one to the model's context.
        config: one text is made for each of its `num_samples`.
        logit_bias: added to the logits of some ids before a token is drawn.
        alternatives: report each token's log-probability, and this many of the likeliest tokens in its place.
        prompt_too: report them for the prompt's tokens as well.
        ends: whether the tokenizer's `ends` end a text. If they do, no penalty makes them less likely.
    """

    prompt: Sequence[int]
    config: GenerationConfig = field(default_factory=GenerationConfig)
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    alternatives: int | None = None
    prompt_too: bool = False
    ends: bool = True


def room_for_answer(max_tokens: int, prompt: Sequence[int], context: int) -> int:
    """Return how many tokens the answer to a conversation may have, at least one.

    Beyond the end of the context, the engine drops the older half of it, and the question with that.
    """
    return max(1, min(max_tokens, context - len(prompt)))


class Continuation:
    """One text of a request, and everything except the network that its next token depends on.

    Attributes:
        ids: its tokens so far.
        picked: how many tokens it has, including those that are being computed.
    """

    def __init__(self, request: Request, sample: int, seed: int, tokenizer: Tokenizer, entries: int) -> None:
        config = request.config
        self.request, self.sample, self.seed = request, sample, seed
        self.text = StreamedText(sample, tokenizer, request.prompt, config.stop)
        self.ids: list[int] = []
        self.picked = 0
        self.dropped = False
        # Equal for texts whose tokens can be drawn together.
        self.sampling = dataclasses.replace(config, max_tokens=1, seed=None, num_samples=1, stop=())
        self.counts_v: mx.array | None = None
        if penalises(config):
            counts_v = np.bincount(request.prompt, minlength=entries)
            if request.ends:  # each turn of a conversation has one, and an answer must be able to end
                counts_v[[token for token in tokenizer.ends if token < entries]] = 0
            self.counts_v = mx.array(counts_v, mx.int32)  # GPUs do not scatter int64
        self.bias_v: mx.array | None = None
        if request.logit_bias:
            bias_v = np.zeros(entries, np.float32)
            bias_v[list(request.logit_bias)] = list(request.logit_bias.values())
            self.bias_v = mx.array(bias_v)

    @property
    def over(self) -> bool:
        """Whether it needs no further token."""
        return self.dropped or bool(self.text.reason) or self.picked == self.request.config.max_tokens


@dataclass(frozen=True)
class Past:
    """Tokens that have been read, and the cache whose first row has their keys and values."""

    ids: Sequence[int]
    cache: BatchCache

    def shared(self, ids: Sequence[int]) -> int:
        """Return how many tokens at the beginning of `ids` are the same."""
        return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self.ids, ids, strict=False)))


class Prompt:
    """Tokens to read before texts continue from them: the same for all samples of a request.

    Args:
        cache: a cache with one row.
        again: whether this is a text whose context was full.
    """

    def __init__(self, texts: list[Continuation], ids: Sequence[int], cache: BatchCache, again: bool) -> None:
        self.request, self.texts, self.ids, self.cache, self.again = texts[0].request, texts, ids, cache, again
        self.logprobs: list[Logprobs] | None = [] if self.request.prompt_too and not again else None

    @property
    def done(self) -> bool:
        """Whether all of it has been read."""
        return self.cache.rows.lengths[0] == len(self.ids)


@dataclass
class Picked:
    """Tokens (B,) of texts and, if requested, their log-probabilities. The device may still be computing both."""

    texts: list[Continuation]
    tokens_b: mx.array
    logprobs: Logprobs | None
    prompt_logprobs: list[Logprobs] | None = None


def choose(logits_bv: mx.array, texts: Sequence[Continuation]) -> mx.array:
    """Draw the next token of each text, (B,), with its request's settings."""
    if any(text.bias_v is not None for text in texts):
        none_v = mx.zeros(logits_bv.shape[-1])
        logits_bv = logits_bv + mx.stack([none_v if text.bias_v is None else text.bias_v for text in texts])
    alike: dict[GenerationConfig, list[int]] = {}
    for row, text in enumerate(texts):
        alike.setdefault(text.sampling, []).append(row)
    tokens = []
    for config, rows in alike.items():
        logits_nv = logits_bv if len(alike) == 1 else logits_bv[mx.array(rows)]
        members = [texts[row] for row in rows]
        if penalises(config):
            counts_nv = mx.stack([text.counts_v for text in members if text.counts_v is not None])
            logits_nv = penalise(logits_nv, counts_nv, config)
        keys = [mx.random.key(seed_from(text.seed, text.picked)) for text in members if config.temperature]
        tokens.append(sample(logits_nv, config, keys))
        if penalises(config):
            counts_nv = counts_nv.at[mx.arange(len(rows)), tokens[-1]].add(1)
            for text, counts_v in zip(members, counts_nv, strict=True):
                text.counts_v = counts_v
    order = [row for rows in alike.values() for row in rows]
    return tokens[0] if len(tokens) == 1 else mx.concatenate(tokens)[mx.array(np.argsort(order))]
