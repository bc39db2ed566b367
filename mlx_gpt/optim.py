"""The optimizer and the learning rate of a run, put together from `mlx.optimizers`."""

import functools
from collections.abc import Callable

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place

# isort: split

import mlx.core as mx
import mlx.optimizers as optim

from mlx_gpt.config import TrainingConfig

Schedule = Callable[[int], float]
BLOCK = 1024  # rates computed at a time


def make_optimizer(training: TrainingConfig) -> optim.MultiOptimizer:
    """AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with bias correction, and weight decay on matrices only."""

    def adamw(weight_decay: float) -> optim.AdamW:
        betas = [training.beta1, training.beta2]
        return optim.AdamW(training.learning_rate, betas=betas, weight_decay=weight_decay, bias_correction=True)

    return optim.MultiOptimizer([adamw(training.weight_decay), adamw(0.0)], [lambda name, weight: weight.ndim >= 2])


def make_schedule(training: TrainingConfig, total_steps: int) -> Schedule:
    """Return the learning rate of step 0, 1, ... `total_steps` - 1: a linear warm-up, then down to `min_lr`.

    It depends only on the step, so it stays the same when a run is resumed or skips a step.
    """
    highest = training.learning_rate
    lowest = highest / 10 if training.min_lr is None else training.min_lr
    warmup = min(100, total_steps // 10) if training.warmup_steps is None else training.warmup_steps
    decay_steps = max(1, total_steps - 1 - warmup)
    falling = {
        "cosine": lambda: optim.cosine_decay(highest, decay_steps, lowest),
        "linear": lambda: optim.linear_schedule(highest, lowest, decay_steps),
        "constant": lambda: lambda step: mx.array(highest),
        "wsd": lambda: _stable_then_linear(highest, lowest, decay_steps),
    }[training.schedule]()
    # The rate is above 0 from the first step on, because otherwise that step would change nothing.
    rising = optim.linear_schedule(highest / (warmup + 1), highest, max(1, warmup))
    joined = optim.join_schedules([rising, falling], [warmup])

    @functools.lru_cache(maxsize=1)
    def block(number: int) -> list[float]:
        # Many at a time: asking MLX for a rate waits for the step that it is computing.
        return joined(mx.arange(number * BLOCK, (number + 1) * BLOCK)).tolist()

    def rate(step: int) -> float:
        number, within = divmod(min(step, total_steps - 1), BLOCK)
        return block(number)[within]

    return rate


def _stable_then_linear(highest: float, lowest: float, steps: int) -> Callable[[mx.array], mx.array]:
    """Return the highest rate for four fifths of the steps, then a linear decay.

    Source: Hu et al. 2024, MiniCPM, arXiv:2404.06395.
    """
    stable = 4 * steps // 5
    down = optim.linear_schedule(highest, lowest, steps - stable)
    return optim.join_schedules([lambda step: mx.array(highest), down], [stable])
