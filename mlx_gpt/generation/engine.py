"""Prompt to text: prefill, decode with a cache, stream."""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx

from mlx_gpt import backend
from mlx_gpt.config import GenerationConfig
from mlx_gpt.errors import UserError
from mlx_gpt.generation.parts import GPTInParts, in_parts
from mlx_gpt.generation.sampling import penalise_repetition, sample
from mlx_gpt.model import GPT
from mlx_gpt.tokenizer import Detokenizer, Tokenizer

Reason = Literal["", "end", "stop", "length"]


@dataclass(frozen=True)
class Piece:
    """Some text of one sample as it is made.

    Attributes:
        sample: 0, 1, ... of `num_samples`.
        reason: why the sample ends with this piece: it ended itself, a stop string, or `max_tokens`; else empty.
    """

    sample: int
    text: str
    reason: Reason = ""


@dataclass
class Stats:
    """The speed of a generation; filled while it streams.

    Attributes:
        prompt_tokens: read once, whatever the number of samples.
        new_tokens: of all samples together.
        prompt_seconds: up to the first token.
        seconds: after it.
        peak_memory: bytes.
    """

    samples: int = 1
    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    new_tokens: int = 0
    seconds: float = 0.0
    peak_memory: int = 0

    def __str__(self) -> str:
        prompt_speed = self.prompt_tokens / max(1e-9, self.prompt_seconds)
        later = self.new_tokens - self.samples  # the first token of each belongs to the prompt's time
        speed = f"{later / self.seconds:,.1f}" if later > 0 and self.seconds > 0 else "-"
        return (
            f"Prompt: {self.prompt_tokens:,} tokens, {prompt_speed:,.1f} tokens/s. "
            f"Generation: {self.new_tokens:,} tokens, {speed} tokens/s. "
            f"Peak memory: {self.peak_memory / 1e6:,.0f} MB."
        )


class KVCache:
    """Keys and values of one layer's heads, (B, H, capacity, D), allocated once and filled from the left."""

    def __init__(self, capacity: int) -> None:
        self.offset = 0
        self._capacity = capacity
        self._keys: mx.array | None = None
        self._values: mx.array | None = None

    def update(self, keys_bhtd: mx.array, values_bhtd: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys and values, and return those of all tokens so far."""
        B, H, T, D = keys_bhtd.shape
        if self._keys is None or self._values is None:
            self._keys = mx.zeros((B, H, self._capacity, D), keys_bhtd.dtype)
            self._values = mx.zeros((B, H, self._capacity, D), keys_bhtd.dtype)
        start, self.offset = self.offset, self.offset + T
        self._keys[:, :, start : self.offset] = keys_bhtd
        self._values[:, :, start : self.offset] = values_bhtd
        return self._keys[:, :, : self.offset], self._values[:, :, : self.offset]

    def repeat(self, times: int) -> None:
        """Make `times` rows of one."""
        if times > 1 and self._keys is not None and self._values is not None:
            self._keys, self._values = mx.repeat(self._keys, times, axis=0), mx.repeat(self._values, times, axis=0)


def stream(
    model: GPT, tokenizer: Tokenizer, prompt: str, config: GenerationConfig, stats: Stats | None = None
) -> Iterator[Piece]:
    """Continue `prompt`, yielding text as soon as it is certain; `stats` is filled on the way.

    Raises:
        UserError: the prompt is empty or longer than the context.
    """
    stats = stats if stats is not None else Stats()
    ids = check_prompt(model, tokenizer, prompt)
    mx.reset_peak_memory()
    started = time.perf_counter()
    samples = [_Sample(i, tokenizer, ids, config) for i in range(config.num_samples)]
    for n, tokens in enumerate(decode(model, tokenizer, ids, config), 1):
        now = time.perf_counter()
        if n == 1:
            stats.samples, stats.prompt_tokens, stats.prompt_seconds = len(samples), len(ids), now - started
        stats.seconds = now - started - stats.prompt_seconds
        stats.peak_memory = mx.get_peak_memory()
        for item, token in zip(samples, tokens, strict=True):
            if not item.reason:
                stats.new_tokens += 1
                yield from item.add(token, last=n == config.max_tokens)
        if all(item.reason for item in samples):
            break


def check_prompt(model: GPT, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """The ids of a prompt.

    Raises:
        UserError: it is empty, or longer than the context.
    """
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError("The prompt is empty: give a few words to go on from.")
    if len(ids) > model.config.n_positions:
        raise UserError(
            f"The prompt has {len(ids):,} tokens, more than the model's context of {model.config.n_positions:,}: "
            "shorten it."
        )
    return ids


def decode(model: GPT, tokenizer: Tokenizer, prompt: list[int], config: GenerationConfig) -> Iterator[list[int]]:
    """The next token of each of `num_samples` texts, `max_tokens` times.

    The device computes the tokens after those that the caller is working on.
    """
    network = in_parts(model, config.num_samples)
    backend.use_all_cores(network.count if isinstance(network, GPTInParts) else 1)
    seed = random.SystemRandom().randrange(2**62) if config.seed is None else config.seed
    samples, entries, positions = config.num_samples, model.config.vocab_size, model.config.n_positions
    texts = [list(prompt) for _ in range(samples)]
    # Where a vocabulary was padded to a round size.
    unknown_v = mx.arange(entries) >= tokenizer.vocab_size if tokenizer.vocab_size < entries else None
    seen_bs = mx.array([prompt] * samples)

    def pick(logits_bv: mx.array, n: int) -> mx.array:
        """Token number `n` of each text, (B,)."""
        nonlocal seen_bs
        logits_bv = logits_bv.astype(mx.float32)
        if unknown_v is not None:
            logits_bv = mx.where(unknown_v, -mx.inf, logits_bv)
        if config.repetition_penalty != 1:
            logits_bv = penalise_repetition(logits_bv, seen_bs, config.repetition_penalty)
        keys = [mx.random.key(backend.seed_for(seed + i, n)) for i in range(samples if config.temperature else 0)]
        tokens_b = sample(logits_bv, config, keys)
        if config.repetition_penalty != 1:
            seen_bs = mx.concatenate([seen_bs, tokens_b[:, None].astype(seen_bs.dtype)], axis=1)
        mx.async_eval(tokens_b)
        return tokens_b

    # All texts have the same prompt: it is read once, then shared.
    cache = make_cache(network, min(len(prompt) + config.max_tokens, positions))
    logits_bv = read(network, mx.array([prompt]), cache)
    for layer in cache:
        layer.repeat(samples)
    tokens_b = pick(mx.broadcast_to(logits_bv, (samples, entries)), 0)
    for n in range(1, config.max_tokens):
        if cache[0].offset < positions:
            following_b = pick(read(network, tokens_b[:, None], cache), n)
            ids = tokens_b.tolist()
        else:
            # The context is full. Go on from its second half, read anew at the first positions.
            ids = tokens_b.tolist()
            kept = max(1, positions // 2)
            recent_bt = mx.array([[*text, token][-kept:] for text, token in zip(texts, ids, strict=True)])
            cache = make_cache(network, positions)
            following_b = pick(read(network, recent_bt, cache), n)
        for text, token in zip(texts, ids, strict=True):
            text.append(token)
        yield ids
        tokens_b = following_b
    yield tokens_b.tolist()


def make_cache(network: GPT | GPTInParts, capacity: int) -> list[KVCache]:
    """An empty cache for `capacity` tokens, one per layer and part of it."""
    count = network.n_caches if isinstance(network, GPTInParts) else len(network.h)
    return [KVCache(capacity) for _ in range(count)]


def read(network: GPT | GPTInParts, ids_bt: mx.array, cache: Sequence[KVCache]) -> mx.array:
    """Read tokens into the cache; logits (B, V) of what comes after the last."""
    return network.head(network.hidden(ids_bt, cache)[:, -1])


class _Sample:
    """One text while it is made: what is certain of it and what a stop string still holds back."""

    def __init__(self, index: int, tokenizer: Tokenizer, prompt: list[int], config: GenerationConfig) -> None:
        self.reason: Reason = ""
        self._index = index
        self._end_of_text = tokenizer.end_of_text
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stop = config.stop
        self._held = ""

    def add(self, token: int, last: bool) -> Iterator[Piece]:
        """The text that this token makes certain, if any, and the reason if it is the end."""
        if token == self._end_of_text:
            self.reason = "end"
        else:
            self._held += self._detokenizer.add(token)
            self.reason = "length" if last else ""
        if self.reason:
            self._held += self._detokenizer.finish()
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.reason, certain = "stop", min(found)
        elif self.reason:
            certain = len(self._held)
        else:
            certain = len(self._held) - held_back(self._held, self._stop)
        text, self._held = self._held[:certain], self._held[certain:]
        if text or self.reason:
            yield Piece(self._index, text, self.reason)


def held_back(text: str, stops: tuple[str, ...]) -> int:
    """How many characters at the end of `text` may be the beginning of a stop string."""
    longest = max((len(stop) for stop in stops), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
