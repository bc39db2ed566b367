"""AdamW's update on a CPU: one kernel per parameter, half of the parameters on each stream.

`mlx.optimizers.AdamW`, followed by a choice between new and old arrays, compiles to six kernels, which read and write
each array several times. Here scalars make the choice, so that one kernel reads and writes each array once.
"""

from typing import Any, NamedTuple

import mlx.core as mx
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gpt.cpu import streams


class Rates(NamedTuple):
    """The scalars of one update, which say how much of the old values to keep and how much of the new to add."""

    sound: mx.array
    keep_m: mx.array
    take_m: mx.array
    keep_v: mx.array
    take_v: mx.array
    step_size: mx.array
    epsilon: mx.array
    keep_weight: mx.array


def fits(optimizer: Any) -> bool:
    """Return whether `update` computes the same as this optimizer."""
    return all(type(one) is optim.AdamW and one.bias_correction for one in getattr(optimizer, "optimizers", [None]))


def update(optimizer: Any, gradients: dict, parameters: dict, before: dict, sound: mx.array) -> tuple[dict, dict]:
    """Return the parameters and the optimizer's state after an update, or unchanged if `sound` is false.

    Args:
        optimizer: an `mlx.optimizers.MultiOptimizer` of `AdamW`s with bias correction.
        before: its state before the learning rate of this step was set.
    """
    weights, grads = dict(tree_flatten(parameters)), dict(tree_flatten(gradients))
    new_weights, states = {}, []
    choose = streams.balance()
    for one, old in zip(optimizer.optimizers, before["states"], strict=True):
        rates, state = _rates(one, sound), dict(tree_flatten(one.state))
        state["step"] = mx.where(sound, one.step + 1, one.step)
        state["learning_rate"] = mx.where(sound, one.learning_rate, old["learning_rate"])
        for name in [name for name in grads if f"{name}.m" in state]:
            with choose(grads[name].size):
                new = _updated(weights[name], grads[name], state[f"{name}.m"], state[f"{name}.v"], rates)
            new_weights[name], state[f"{name}.m"], state[f"{name}.v"] = new
        states.append(tree_unflatten(list(state.items())))
    return tree_unflatten([(name, new_weights[name]) for name in grads]), {"states": states}


def _rates(optimizer: optim.AdamW, sound: mx.array) -> Rates:
    (beta1, beta2), number, rate = optimizer.betas, optimizer.step + 1, optimizer.learning_rate
    root = mx.sqrt(1 - beta2**number)  # the two corrections of the bias, worked into scalars
    return Rates(
        sound=sound,
        keep_m=mx.where(sound, beta1, 1.0),
        take_m=mx.where(sound, 1 - beta1, 0.0),
        keep_v=mx.where(sound, beta2, 1.0),
        take_v=mx.where(sound, 1 - beta2, 0.0),
        step_size=mx.where(sound, rate * root / (1 - beta1**number), 0.0),
        epsilon=optimizer.eps * root,
        keep_weight=mx.where(sound, 1 - rate * optimizer.weight_decay, 1.0),
    )


def _updated(
    weight: mx.array, gradient: mx.array, m: mx.array, v: mx.array, rates: Rates
) -> tuple[mx.array, mx.array, mx.array]:
    gradient = mx.where(rates.sound, gradient, 0.0)
    m = rates.keep_m * m + rates.take_m * gradient
    v = rates.keep_v * v + rates.take_v * (gradient * gradient)
    return weight * rates.keep_weight - rates.step_size * (m / (mx.sqrt(v) + rates.epsilon)), m, v
