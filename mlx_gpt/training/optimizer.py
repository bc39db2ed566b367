"""AdamW, and the learning rate of each step."""

import math
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_map

from mlx_gpt.config import TrainingConfig

Tree = Any
"""Arrays in nested dicts and lists, as `model.trainable_parameters()` gives them."""

EPSILON = 1e-8


class Rates(NamedTuple):
    """The scalars of one update: how much of the old is kept and of the new taken."""

    sound: mx.array
    keep_m: mx.array
    take_m: mx.array
    keep_v: mx.array
    take_v: mx.array
    step_size: mx.array
    epsilon: mx.array
    keep_weight: mx.array


class AdamW:
    """Adam with bias correction and decoupled weight decay on matrices (Loshchilov & Hutter 2019, arXiv:1711.05101).

    Unlike `mlx.optimizers.AdamW` it is pure functions of arrays, so that one compiled update can leave everything, its
    own counter included, as it was when the gradients are not finite.
    """

    def __init__(self, training: TrainingConfig) -> None:
        self.beta1 = training.beta1
        self.beta2 = training.beta2
        self.weight_decay = training.weight_decay

    def init(self, parameters: Tree) -> Tree:
        """The state before the first update: mean gradients `m`, mean squared gradients `v`, their number."""
        return {
            "m": tree_map(mx.zeros_like, parameters),
            "v": tree_map(mx.zeros_like, parameters),
            "updates": mx.array(0, mx.int32),
        }

    def rates(
        self, updates: mx.array, learning_rate: mx.array, scale: mx.array, sound: mx.array
    ) -> tuple[Rates, mx.array]:
        """The scalars of the update after `updates` others, and the number of updates after it.

        Args:
            scale: what the gradients are to be multiplied with.
            sound: a boolean; if it is false, the update changes nothing.
        """
        number = updates + 1
        # The two corrections of the bias, worked into scalars.
        root = mx.sqrt(1 - mx.power(self.beta2, number))
        rates = Rates(
            sound=sound,
            keep_m=mx.where(sound, self.beta1, 1.0),
            take_m=mx.where(sound, (1 - self.beta1) * scale, 0.0),
            keep_v=mx.where(sound, self.beta2, 1.0),
            take_v=mx.where(sound, (1 - self.beta2) * (scale * scale), 0.0),
            step_size=mx.where(sound, learning_rate * root / (1 - mx.power(self.beta1, number)), 0.0),
            epsilon=EPSILON * root,
            keep_weight=mx.where(sound, 1 - learning_rate * self.weight_decay, 1.0),
        )
        return rates, mx.where(sound, number, updates)

    def update(self, parameters: Tree, gradients: Tree, m: Tree, v: Tree, rates: Rates) -> tuple[Tree, Tree, Tree]:
        """New parameters, `m` and `v`. Each array is updated in one kernel, which reads and writes it once."""

        def mean(m: mx.array, g: mx.array) -> mx.array:
            return rates.keep_m * m + rates.take_m * g

        def mean_square(v: mx.array, g: mx.array) -> mx.array:
            return rates.keep_v * v + rates.take_v * (g * g)

        def move(p: mx.array, m: mx.array, v: mx.array) -> mx.array:
            decayed = p * rates.keep_weight if p.ndim >= 2 else p
            return decayed - rates.step_size * (m / (mx.sqrt(v) + rates.epsilon))

        gradients = tree_map(lambda g: mx.where(rates.sound, g, 0.0), gradients)
        m, v = tree_map(mean, m, gradients), tree_map(mean_square, v, gradients)
        return tree_map(move, parameters, m, v), m, v


def learning_rate(step: int, total_steps: int, training: TrainingConfig) -> float:
    """The rate of step 0, 1, ... `total_steps` - 1: a linear warm-up, then the schedule down to `min_lr`."""
    highest = training.learning_rate
    lowest = highest / 10 if training.min_lr is None else training.min_lr
    warmup = min(100, total_steps // 10) if training.warmup_steps is None else training.warmup_steps
    if step < warmup:
        return highest * (step + 1) / (warmup + 1)
    done = min(1.0, (step - warmup) / max(1, total_steps - 1 - warmup))
    if training.schedule == "constant":
        return highest
    if training.schedule == "linear":
        return highest + (lowest - highest) * done
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * done)) / 2
