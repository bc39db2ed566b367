"""Computes the optimizers' updates on a CPU, with a part of the work on each stream.

`mlx.optimizers.AdamW`, followed by a choice between new and old arrays, compiles to six kernels, which read and write
each array several times. Here scalars make the choice, so that one kernel reads and writes each array once. Muon's own
update is unchanged, but each stream computes a part of its matrices.
"""

import copy
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


def update(optimizer: Any, gradients: dict, parameters: dict, before: dict, sound: mx.array) -> tuple[dict, dict]:
    """Return the parameters and the optimizer's state after an update, or unchanged if `sound` is false.

    Args:
        optimizer: an `mlx.optimizers.MultiOptimizer` of `AdamW`s, which correct the bias, and Muons.
        before: its state before the learning rate of this step was set.
    """
    weights, grads = dict(tree_flatten(parameters)), dict(tree_flatten(gradients))
    new_weights: dict[str, mx.array] = {}
    states = []
    for one, old in zip(optimizer.optimizers, before["states"], strict=True):
        kept = dict(tree_flatten(one.state))
        own = [name for name in grads if f"{name}.v" in kept]
        compute = _adamw if type(one) is optim.AdamW else _muon
        new, state = compute(one, {k: grads[k] for k in own}, {k: weights[k] for k in own}, old, sound)
        new_weights |= new
        states.append(state)
    return tree_unflatten([(name, new_weights[name]) for name in grads]), {"states": states}


def _adamw(one: optim.AdamW, gradients: dict, weights: dict, old: dict, sound: mx.array) -> tuple[dict, dict]:
    rates, state, new_weights = _rates(one, sound), dict(tree_flatten(one.state)), {}
    choose = streams.balance()
    state["step"] = mx.where(sound, one.step + 1, one.step)
    state["learning_rate"] = mx.where(sound, one.learning_rate, old["learning_rate"])
    for name, gradient in gradients.items():
        with choose(gradient.size):
            new = _updated(weights[name], gradient, state[f"{name}.m"], state[f"{name}.v"], rates)
        new_weights[name], state[f"{name}.m"], state[f"{name}.v"] = new
    return new_weights, tree_unflatten(list(state.items()))


def _muon(one: Any, gradients: dict, weights: dict, old: dict, sound: mx.array) -> tuple[dict, dict]:
    # The matrices of each shape take turns between the streams, so that all streams have as much to do.
    count = streams.stream_count()
    names = sorted(gradients, key=lambda name: gradients[name].shape)
    new_weights, state = {}, dict(tree_flatten(one.state))
    before = dict(tree_flatten(old))
    for chosen in streams.side_by_side(part for i in range(count) if (part := names[i::count])):
        own = copy.copy(one)
        own.state = _tree({name: array for name, array in state.items() if name.removesuffix(".v") in chosen}) | {
            name: one.state[name] for name in ("step", "learning_rate")
        }
        new = own.apply_gradients(_tree({name: gradients[name] for name in chosen}), _tree(weights))
        for name, weight in tree_flatten(new):
            new_weights[name] = mx.where(sound, weight, weights[name])
        for name, array in tree_flatten(own.state):
            state[name] = mx.where(sound, array, before[name])
    return new_weights, _tree(state)


def _tree(flat: dict[str, mx.array]) -> Any:
    return tree_unflatten(list(flat.items()))


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
