"""Continues one prompt, and streams the text."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt import models
from mlx_gpt.config import GenerationConfig
from mlx_gpt.errors import UserError
from mlx_gpt.generation.engine import Engine, Request
from mlx_gpt.generation.stop_strings import Piece
from mlx_gpt.tokenizer import Tokenizer


@dataclass
class Stats:
    """The speed of a generation, filled in while it streams.

    Attributes:
        prompt_tokens: tokens of the prompt, which is read once for all samples.
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
    model: nn.Module, tokenizer: Tokenizer, prompt: str, config: GenerationConfig, stats: Stats | None = None
) -> Iterator[Piece]:
    """Continue `prompt`, yielding text as soon as it is certain; `stats` is filled in meanwhile.

    Raises:
        UserError: the prompt is empty or longer than the context.
    """
    stats = stats if stats is not None else Stats()
    ids = check_prompt(model, tokenizer, prompt)
    mx.reset_peak_memory()
    started = time.perf_counter()
    capacity = min(len(ids) + config.max_tokens, models.context_length(model))
    engine = Engine(model, tokenizer, config.num_samples, capacity)
    engine.add(Request(ids, config))
    stats.samples, stats.prompt_tokens = config.num_samples, len(ids)
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
            yield piece


def check_prompt(model: nn.Module, tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids of a prompt.

    Raises:
        UserError: it is empty, or longer than the context.
    """
    ids = tokenizer.encode(prompt)
    if not ids:
        raise UserError("The prompt is empty: give a few words to continue.")
    if len(ids) > models.context_length(model):
        raise UserError(
            f"The prompt has {len(ids):,} tokens, more than the model's context of {models.context_length(model):,}: "
            "shorten it."
        )
    return ids
