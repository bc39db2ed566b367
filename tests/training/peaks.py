"""Compare the memory that a run is expected to take with the peak of its real steps.

As a script, it compares them over a grid of shapes: python -m tests.training.peaks
"""

import contextlib  # noqa: I001 - mlx_gpt.device stands before mlx, so that a tuned BLAS can take its place
import gc
import itertools
from typing import Any

import mlx_gpt.device  # noqa: F401

import mlx.core as mx
import numpy as np

from mlx_gpt.data.tokens import Tokens
from mlx_gpt.device import Device, device
from mlx_gpt import models
from mlx_gpt.objectives import OBJECTIVES
from mlx_gpt.optim import make_optimizer
from mlx_gpt.settings import resolve
from mlx_gpt.tokenizer import Tokenizer
from mlx_gpt.training import memory
from mlx_gpt.training.checkpoint import Progress
from mlx_gpt.training.loop import make_step
from mlx_gpt.training.run import Run

# Small and large micro-batches; where attention, the logits or the weights are the most.
SHAPES: list[dict[str, Any]] = [
    {},
    {"batch_size": 7, "seq_len": 160, "n_embd": 96, "n_layer": 5, "vocab_size": 2500},
    {"batch_size": 8, "seq_len": 64, "n_embd": 64, "n_layer": 12, "vocab_size": 400},
    {"batch_size": 8, "seq_len": 256, "n_embd": 256, "n_layer": 3, "vocab_size": 8000},
    {"model_type": "qwen3", "optimizer": "muon", "n_kv_head": 2, "batch_size": 7, "seq_len": 160, "vocab_size": 400},
]
VARIANTS: list[dict[str, Any]] = [
    {},
    {"gradient_accumulation_steps": 2},
    {"grad_checkpoint": True},
    {"grad_checkpoint": True, "gradient_accumulation_steps": 2},
]


class OneByteTokens(Tokenizer):
    """Any number of entries of one byte each."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def byte_lengths(self) -> np.ndarray:
        return np.ones(self.vocab_size, np.int64)


def make_run(on: Device | None = None, **settings: Any) -> Run:
    """A run of the preset tiny with other settings, on random tokens, without a folder."""
    config, on = resolve({"data": "builtin", "preset": "tiny", **settings}), on or device()
    windows = 3 * config.training.windows_per_step
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, windows * config.training.seq_len)
    tokens = ids.astype(np.uint32)
    split = Tokens(tokens, tokens[: 2 * config.training.batch_size * config.training.seq_len + 1], "")
    train, val = (OBJECTIVES["documents"].windows(split, name, config.training.seq_len) for name in ("train", "val"))
    return Run(
        settings=config,
        config=config,
        device=on,
        tokenizer=OneByteTokens(config.model.vocab_size),
        tokens=split,
        windows=train,
        val_windows=val,
        model=on.accelerate(models.init_weights(models.create(config.model), 0)),
        objective=on.accelerate(OBJECTIVES["documents"]()),
        progress=Progress(),
        source=None,
        damaged={},
        resumes=False,
        resources=contextlib.ExitStack(),
    )


def measured(run: Run) -> int:
    """Bytes at the peak of three steps between two evaluations, as `fit` makes them."""
    gc.collect()
    mx.clear_cache()
    mx.reset_peak_memory()
    optimizer = make_optimizer(run.training, run.model)
    step = make_step(run.model, optimizer, run.objective, run.training, run.device)
    batches, evaluate, unread = run.batches(), run.evaluator(), None
    evaluate()
    for number in range(3):
        result = step(number, 1e-3, itertools.islice(batches, run.training.micro_steps))
        if unread:
            unread.numbers()
        unread = result
    evaluate()
    return mx.get_peak_memory()


def expected(run: Run) -> int:
    """Bytes that the run is expected to take at its peak."""
    line = memory.measure(run, make_step, run.training)
    assert line is not None
    return line.at(run.training.micro_batch_size).peak


if __name__ == "__main__":
    for shape, variant in itertools.product(SHAPES, VARIANTS):
        run = make_run(**shape, **variant)
        told, took = expected(run), measured(run)
        print(f"{told / took - 1:+6.1%}  {told / 2**20:6.0f} of {took / 2**20:6.0f} MiB  {shape | variant}", flush=True)
