"""Compare the memory that training is expected to hold with what MLX says that it held.

Run as a script, it does so over a grid of shapes, each in a process of its own:  python -m tests.training.peaks
"""

import argparse  # noqa: I001 - mlx_gpt stands before mlx, so that a tuned BLAS serves it
import gc
import itertools
import json
import subprocess
import sys
from typing import NamedTuple

import mlx_gpt  # noqa: F401

import mlx.core as mx
import numpy as np

from mlx_gpt.backend import Device
from mlx_gpt.config import ModelConfig, TrainingConfig
from mlx_gpt.model import GPT
from mlx_gpt.training.memory import estimate
from mlx_gpt.training.step import TrainingStep

ANY_CPU = Device("cpu", "any", 2**40, 2**40)


class Shape(NamedTuple):
    """Layers, heads, width; tokens per window, windows; vocabulary."""

    L: int
    H: int
    C: int
    T: int
    B: int
    V: int


# Narrow and wide, shallow and deep; few tokens and many; where attention, the logits or the weights are the most. The
# coefficients of memory.py for the CPU were fitted to these.
GRID = [
    Shape(4, 4, 128, 128, 16, 2048),
    Shape(4, 4, 128, 64, 12, 65),
    Shape(6, 8, 256, 128, 8, 4096),
    Shape(2, 4, 256, 256, 8, 1024),
    Shape(8, 4, 128, 256, 4, 512),
    Shape(12, 12, 384, 128, 2, 1024),
    Shape(4, 2, 128, 512, 4, 256),
    Shape(4, 8, 512, 64, 2, 8192),
    Shape(2, 2, 64, 128, 32, 16384),
    Shape(6, 6, 384, 256, 4, 2048),
    Shape(4, 16, 256, 256, 4, 1000),
    Shape(2, 12, 768, 128, 2, 30000),
    Shape(3, 4, 64, 64, 64, 512),
    Shape(2, 8, 512, 512, 2, 8192),
    Shape(16, 4, 128, 32, 8, 256),
    Shape(5, 5, 320, 96, 6, 3000),
    Shape(12, 6, 192, 192, 4, 10000),
    Shape(6, 8, 512, 256, 4, 8192),
    Shape(3, 3, 96, 384, 6, 700),
    Shape(3, 8, 128, 128, 4, 1000),
    Shape(4, 4, 128, 64, 4, 3000),
    Shape(2, 4, 64, 256, 4, 300),
    Shape(24, 8, 128, 128, 8, 10000),
    Shape(24, 8, 256, 256, 2, 2048),
    Shape(24, 4, 64, 128, 8, 300),
    Shape(36, 4, 64, 64, 8, 500),
    Shape(6, 4, 128, 128, 8, 20000),
    Shape(24, 16, 512, 256, 2, 8192),
    Shape(8, 6, 192, 128, 12, 6000),
    Shape(12, 12, 768, 256, 2, 16384),
    Shape(2, 2, 64, 128, 8, 6000),
    Shape(3, 2, 96, 96, 6, 5000),
    Shape(3, 4, 80, 112, 10, 3500),
    Shape(6, 3, 72, 80, 12, 1500),
]


def peak(shape: Shape, training: TrainingConfig, dropout: float) -> tuple[int, int]:
    """Bytes that two steps hold at their peak: expected, measured."""
    config = ModelConfig(shape.V, shape.L, shape.H, shape.C, shape.T, dropout)
    gc.collect()  # a compiled step and its model hold each other
    before = mx.get_active_memory()
    step = TrainingStep(GPT(config).init_weights(0), training)
    windows = np.random.default_rng(0).integers(0, shape.V, (shape.B, shape.T + 1), dtype=np.int32)
    micro_batches = [windows] * training.gradient_accumulation_steps
    step(0, 1e-3, micro_batches).numbers()  # the first also makes the weights
    mx.clear_cache()
    mx.reset_peak_memory()
    step(1, 1e-3, micro_batches)
    step(2, 1e-3, micro_batches).numbers()
    return estimate(config, training, ANY_CPU).peak, mx.get_peak_memory() - before


def variants(shape: Shape) -> list[tuple[TrainingConfig, float]]:
    """The shape with and without recomputed activations, accumulated gradients and dropout."""
    return [
        (TrainingConfig(shape.T, shape.B, gradient_accumulation_steps=count, grad_checkpoint=recompute), dropout)
        for recompute, count, dropout in itertools.product((False, True), (1, 2), (0.0, 0.1))
    ]


def main() -> None:
    """Measure the grid, and print each case and the largest deviation."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", nargs=2, type=int, help=argparse.SUPPRESS)
    case = parser.parse_args().case
    if case:
        shape = GRID[case[0]]
        print(json.dumps(peak(shape, *variants(shape)[case[1]])))
        return
    largest = 0.0
    for i, shape in enumerate(GRID):
        for j, (training, dropout) in enumerate(variants(shape)):
            command = [sys.executable, "-m", "tests.training.peaks", "--case", str(i), str(j)]
            expected, measured = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
            deviation = expected / measured - 1
            largest = max(largest, abs(deviation))
            kind = "recomputed" if training.grad_checkpoint else "kept"
            print(
                f"{shape} {kind:10} x{training.gradient_accumulation_steps} dropout {dropout}: expected "
                f"{expected / 1e6:7,.0f} MB, measured {measured / 1e6:7,.0f} MB, {deviation:+.1%}",
                flush=True,
            )
    print(f"The largest deviation is {largest:.1%}.")


if __name__ == "__main__":
    main()
