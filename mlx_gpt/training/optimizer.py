"""AdamW, and the learning rate of each step."""

import math
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_gpt.config import TrainingConfig

Tree = Any
"""Arrays in nested dicts and lists, as `model.trainable_parameters()` gives them."""

EPSILON = 1e-8


class AdamW:
    """Adam with bias correction and decoupled weight decay on matrices (Loshchilov & Hutter 2019, arXiv:1711.05101).

    Unlike `mlx.optimizers.AdamW` it is a pure function of arrays, so that one compiled update can leave everything,
    its own counter included, as it was when the gradients are not finite.
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

    def update(
        self, parameters: Tree, gradients: Tree, state: Tree, learning_rate: mx.array, sound: mx.array
    ) -> tuple[Tree, Tree]:
        """New parameters and new state; both are the old ones where `sound`, a boolean scalar, is false."""
        updates = state["updates"] + 1
        step_size = learning_rate / (1 - mx.power(self.beta1, updates))
        correction = mx.rsqrt(1 - mx.power(self.beta2, updates))

        def mean(m: mx.array, g: mx.array) -> mx.array:
            return mx.where(sound, self.beta1 * m + (1 - self.beta1) * g, m)

        def mean_square(v: mx.array, g: mx.array) -> mx.array:
            return mx.where(sound, self.beta2 * v + (1 - self.beta2) * (g * g), v)

        def move(p: mx.array, m: mx.array, v: mx.array) -> mx.array:
            decay = self.weight_decay if p.ndim >= 2 else 0.0
            moved = p * (1 - learning_rate * decay) - step_size * m / (mx.sqrt(v) * correction + EPSILON)
            return mx.where(sound, moved, p)

        m = tree_map(mean, state["m"], gradients)
        v = tree_map(mean_square, state["v"], gradients)
        return tree_map(move, parameters, m, v), {"m": m, "v": v, "updates": mx.where(sound, updates, updates - 1)}


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
