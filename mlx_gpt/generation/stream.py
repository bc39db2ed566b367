"""Continues one prompt, and streams the text."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt import models
from mlx_gpt.chat_template import ChatTemplate
from mlx_gpt.config import GenerationConfig
from mlx_gpt.device import device
from mlx_gpt.errors import UserError
from mlx_gpt.generation.cache import bytes_per_token
from mlx_gpt.generation.engine import Engine
from mlx_gpt.generation.requests import Request, room_for_answer
from mlx_gpt.generation.stop_strings import Piece
from mlx_gpt.seeds import fresh_seed
from mlx_gpt.tokenizer import Tokenizer

MOST_AT_ONCE = 64  # samples

Prompt: TypeAlias = str | Sequence[Mapping[str, str]]
"""A text to continue, or the messages of a conversation to answer, each with a `role` and a `content`."""


@dataclass
class Stats:
    """The speed of a generation, filled in while it streams.

    Attributes:
        samples: how many samples are written at the same time.
        prompt_tokens: tokens of the prompt, which is read once for all samples that are written at the same time.
        new_tokens: tokens of all samples together.
        prompt_seconds: time up to the first token.
        seconds: time after the first token.
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


def stream(
    model: nn.Module, tokenizer: Tokenizer, prompt: Prompt, config: GenerationConfig, stats: Stats | None = None
) -> Iterator[Piece]:
    """Continue a text or answer messages, yielding text as soon as it is certain; `stats` is filled in meanwhile.

    Many samples are written group by group, so that memory does not grow with their number. Sample i has the seed
    `seed` + i in any group.

    Raises:
        UserError: as in `check_prompt`.
    """
    stats = stats if stats is not None else Stats()
    ids, context = check_prompt(model, tokenizer, prompt), models.context_length(model)
    if not isinstance(prompt, str):
        config = dataclasses.replace(config, max_tokens=room_for_answer(config.max_tokens, ids, context))
    mx.reset_peak_memory()
    started = time.perf_counter()
    capacity = min(len(ids) + config.max_tokens, context)
    at_once = samples_at_once(model, config.num_samples, capacity)
    engine = Engine(model, tokenizer, at_once, capacity)
    stats.samples, stats.prompt_tokens = at_once, len(ids)
    seed = fresh_seed() if config.seed is None else config.seed
    for first in range(0, config.num_samples, at_once):
        count = min(at_once, config.num_samples - first)
        engine.add(Request(ids, dataclasses.replace(config, num_samples=count, seed=seed + first)))
        while engine.busy:
            told = engine.step()
            now = time.perf_counter()
            if not engine.made:
                continue
            if not stats.new_tokens:
                stats.prompt_seconds = now - started
            stats.new_tokens, stats.seconds = engine.made, now - started - stats.prompt_seconds
            stats.peak_memory = mx.get_peak_memory()
            for _, piece in told:
                yield dataclasses.replace(piece, sample=first + piece.sample)


def samples_at_once(model: nn.Module, count: int, capacity: int) -> int:
    """Return how many of `count` samples to write at the same time: their cache may take half of the free memory.

    Args:
        capacity: tokens that each sample may have in the cache.
    """
    if count == 1:
        return 1
    free = device().usable - mx.get_active_memory()
    return max(1, min(count, MOST_AT_ONCE, free // 2 // (capacity * bytes_per_token(model))))


def check_prompt(model: nn.Module, tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Return the ids of a prompt, with those that its model expects at the start.

    Raises:
        UserError: it is neither text nor messages, or empty, or longer than the context; or the model has no chat
            template for messages.
    """
    if isinstance(prompt, str):
        ids = tokenizer.encode(prompt)
        if not ids:
            raise UserError("The prompt is empty: give a few words to continue.")
        ids = [*tokenizer.start, *ids]
    else:
        ids = _ids_of_messages(tokenizer, prompt)
    if len(ids) > models.context_length(model):
        raise UserError(
            f"The prompt has {len(ids):,} tokens, more than the model's context of {models.context_length(model):,}: "
            "shorten it."
        )
    return ids


def _ids_of_messages(tokenizer: Tokenizer, messages: Sequence[Mapping[str, str]]) -> list[int]:
    if not isinstance(messages, list | tuple):
        raise UserError(f"The prompt must be text or a list of messages, not {type(messages).__name__}.")
    for message in messages:
        parts = [message.get(name) for name in ("role", "content")] if isinstance(message, Mapping) else [None]
        if not all(isinstance(part, str) for part in parts):
            raise UserError('A message must be like {"role": "user", "content": "Which bird?"}.')
    if not messages or messages[-1]["role"] != "user":
        raise UserError("The last message must be from the user: that one is answered.")
    template = ChatTemplate.of(tokenizer)
    if template is None:
        raise UserError("The model has no chat template, so it can't answer messages: give it a text.")
    return template.ids(messages, tokenizer)
