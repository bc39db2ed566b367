"""The optimizer and the learning rate of a run, put together from `mlx.optimizers`."""

import functools
from collections.abc import Callable, Mapping, Sequence

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place

# isort: split

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten, tree_unflatten

from mlx_gpt.config import TrainingConfig
from mlx_gpt.models import block_matrices

Schedule = Callable[[float], float]
BLOCK = 1024  # rates computed at a time


class Groups(optim.MultiOptimizer):
    """Optimizers for groups of parameters, each with its own multiple of the learning rate.

    Args:
        groups: the names of the parameters, their optimizer, and the multiple.
    """

    def __init__(self, groups: Sequence[tuple[frozenset[str], optim.Optimizer, float]]) -> None:
        groups = [group for group in groups if group[0]]
        names, optimizers, self.multiples = zip(*groups, strict=True)
        super().__init__(list(optimizers), [lambda name, weight, own=own: name in own for own in names[:-1]])

    @property
    def learning_rate(self) -> mx.array:
        """The learning rate, before any multiple; set for each update."""
        return self.optimizers[-1].learning_rate / self.multiples[-1]

    @learning_rate.setter
    def learning_rate(self, rate: mx.array) -> None:
        for optimizer, multiple in zip(self.optimizers, self.multiples, strict=True):
            optimizer.learning_rate = rate * multiple


class Muon(optim.Muon):
    """`mlx.optimizers.Muon` (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), all matrices at once.

    Matrices of one shape are orthogonalised together, which takes fewer kernels. Each is treated as a whole, even if it
    joins the queries, keys and values, as GPT-2's does. Weight decay is decoupled from the gradient, as in AdamW: added
    to the gradient, it would disappear in the orthogonalisation.
    """

    def apply_gradients(self, gradients: dict, parameters: dict) -> dict:
        """Return the updated parameters; the arguments are trees of matrices, and `parameters` may have more."""
        flat, weights = dict(tree_flatten(gradients)), dict(tree_flatten(parameters))
        state: dict[str, mx.array] = dict(tree_flatten(self.state))
        updates = {}
        for name, gradient in flat.items():
            velocity = self.momentum * state[f"{name}.v"] + (1 - self.momentum) * gradient
            updates[name] = (1 - self.momentum) * gradient + self.momentum * velocity if self.nesterov else velocity
            state[f"{name}.v"] = velocity
        rate = self.learning_rate
        new = {
            name: weights[name] * (1 - rate * self.weight_decay) - rate * spectral_scale(update) * update
            for name, update in self._orthogonalised(updates).items()
        }
        self.state.update(tree_unflatten(list(state.items())) | {"step": self.step + 1})
        return tree_unflatten([(name, new[name]) for name in flat])

    def _orthogonalised(self, updates: Mapping[str, mx.array]) -> dict[str, mx.array]:
        by_shape: dict[tuple[int, ...], list[str]] = {}
        for name, update in updates.items():
            by_shape.setdefault(update.shape, []).append(name)
        found: dict[str, mx.array] = {}
        for names in by_shape.values():
            found |= zip(names, self.orthogonalise(mx.stack([updates[name] for name in names])), strict=True)
        return found

    def orthogonalise(self, x_nrc: mx.array) -> mx.array:
        """Move the singular values of N matrices (R, C) to about 1, by an odd polynomial that is applied repeatedly.

        The coefficients are Jordan's. In five steps they bring values from 0.01 of the norm on to between 0.7 and 1.2;
        smaller ones stay smaller.
        """
        a, b, c = 3.4445, -4.7750, 2.0315
        short, long = sorted(x_nrc.shape[-2:])
        wide = x_nrc.shape[-1] == long
        identity = mx.eye(short)

        def gram(x_nrc: mx.array) -> mx.array:
            x_ncr = x_nrc.swapaxes(-1, -2)
            return x_nrc @ x_ncr if wide else x_ncr @ x_nrc

        def factor(gram_nss: mx.array) -> mx.array:
            return mx.addmm(a * identity + b * gram_nss, gram_nss, gram_nss, alpha=c)

        def times(factor_nss: mx.array, x_nrc: mx.array) -> mx.array:
            return factor_nss @ x_nrc if wide else x_nrc @ factor_nss

        x_nrc = x_nrc / (mx.linalg.norm(x_nrc, axis=(-2, -1), keepdims=True) + 1e-7)
        if long < 2 * short:
            for _ in range(self.ns_steps):
                x_nrc = times(factor(gram(x_nrc)), x_nrc)
            return x_nrc
        # Every step multiplies by a function of the Gram matrix. These are multiplied with each other first, because
        # they are smaller.
        gram_nss, product_nss = gram(x_nrc), None
        for _ in range(self.ns_steps):
            factor_nss = factor(gram_nss)
            product_nss = factor_nss if product_nss is None else factor_nss @ product_nss
            gram_nss = factor_nss @ gram_nss @ factor_nss  # never computed after the last step
        return times(product_nss, x_nrc)


def spectral_scale(update: mx.array) -> float:
    """Return the factor that makes an orthogonal (out, in) update change outputs by the same amount in every shape.

    The source is Jordan's post (see `Muon`). Adapters are stored as (in, out), and get the factor of an (out, in)
    matrix of that shape, as in mlx-lm.
    """
    rows, columns = update.shape
    return max(1.0, rows / columns) ** 0.5


def make_optimizer(training: TrainingConfig, model: nn.Module) -> Groups:
    """Return the optimizer of a model's trainable parameters.

    `adamw`: AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with bias correction, and weight decay on matrices only.
    `muon`: Muon for the matrices of the blocks, and AdamW for everything else.
    """
    weights = dict(tree_flatten(model.trainable_parameters()))
    matrices = {name for name, weight in weights.items() if weight.ndim >= 2}
    to_muon = matrices & block_matrices(model) if training.optimizer == "muon" else set()

    def adamw(weight_decay: float) -> optim.AdamW:
        betas = [training.beta1, training.beta2]
        return optim.AdamW(training.learning_rate, betas=betas, weight_decay=weight_decay, bias_correction=True)

    muon = Muon(training.muon_learning_rate, training.muon_momentum, training.weight_decay)
    return Groups(
        [
            (frozenset(to_muon), muon, training.muon_learning_rate / training.learning_rate),
            (frozenset(matrices - to_muon), adamw(training.weight_decay), 1.0),
            (frozenset(weights.keys() - matrices), adamw(0.0), 1.0),
        ]
    )


def warmup_steps(training: TrainingConfig, total_steps: int) -> int:
    """Return how many steps the rate rises for: as many as asked for, or a tenth of all, but at most 100."""
    return min(100, total_steps // 10) if training.warmup_steps is None else training.warmup_steps


def make_schedule(training: TrainingConfig, total_steps: int) -> Schedule:
    """Return the learning rate of step 0, 1, ... `total_steps` - 1: a linear warm-up, then down to `min_lr`.

    It depends only on the step, so it stays the same when a run is resumed or skips a step. A step may be a fraction.
    """
    highest = training.learning_rate
    lowest = highest / 10 if training.min_lr is None else training.min_lr
    warmup = warmup_steps(training, total_steps)
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

    def rate(step: float) -> float:
        number, within = divmod(min(int(step), total_steps - 1), BLOCK)
        return block(number)[within]

    return rate


def _stable_then_linear(highest: float, lowest: float, steps: int) -> Callable[[mx.array], mx.array]:
    """Return the highest rate for four fifths of the steps, then a linear decay.

    Source: Hu et al. 2024, MiniCPM, arXiv:2404.06395.
    """
    stable = 4 * steps // 5
    down = optim.linear_schedule(highest, lowest, steps - stable)
    return optim.join_schedules([lambda step: mx.array(highest), down], [stable])
