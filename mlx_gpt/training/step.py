"""One step of training: losses and gradients of the micro-batches, clipping, one update."""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from mlx_gpt import backend
from mlx_gpt.config import TrainingConfig
from mlx_gpt.distributed import ALONE, Ranks
from mlx_gpt.model import GPT
from mlx_gpt.training.optimizer import AdamW, Tree


class StepResult(NamedTuple):
    """Scalars that MLX may still be computing: `.item()` waits for them.

    Attributes:
        loss: mean cross-entropy over every token of the step, in nats.
        grad_norm: global norm of the gradients before clipping.
    """

    loss: mx.array
    grad_norm: mx.array

    def numbers(self) -> tuple[float, float]:
        """Loss and norm, waited for."""
        return self.loss.item(), self.grad_norm.item()


class TrainingStep:
    """Trains `model` in place. The parameters and AdamW's state are float32; `dtype` is what it computes in.

    Each of several `ranks` computes the gradients of its own windows. Their mean updates the weights of all alike.
    """

    def __init__(
        self, model: GPT, training: TrainingConfig, dtype: mx.Dtype = mx.float32, ranks: Ranks = ALONE
    ) -> None:
        self.model = model
        self.model.recompute = training.grad_checkpoint
        self.optimizer = AdamW(training)
        self.optimizer_state = self.optimizer.init(model.trainable_parameters())
        self._training = training
        self._dtype = dtype
        self._ranks = ranks
        self._share = mx.compile(self._loss_and_gradients)
        self._update = mx.compile(self._clip_and_update)

    def __call__(self, step: int, learning_rate: float, micro_batches: Sequence[np.ndarray]) -> StepResult:
        """Make step number `step` on micro-batches (B, T) of one shape, and start computing it."""
        parameters = self.model.trainable_parameters()
        count = 0
        sums: list[tuple[mx.array, Tree]] = []  # of losses and gradients, one of each stream
        for windows in micro_batches:
            mx.eval(sums)  # or the activations of all micro-batches would stand at once
            for i, (windows_bt,) in enumerate(backend.shares(windows, saving=self._training.grad_checkpoint)):
                # What dropout drops is a function of (seed, step), so a resume needs no saved generator.
                seed = backend.seed_for(self._training.seed, step, count * self._ranks.size + self._ranks.rank)
                key = mx.random.key(seed) if self.model.config.dropout > 0 else None
                share = self._share(parameters, windows_bt, key)
                sums[i : i + 1] = [tree_map(mx.add, sums[i], share) if i < len(sums) else share]
                count += 1
        if self._ranks.size > 1:  # their means, in one, so that little has to travel
            total = functools.reduce(lambda one, other: tree_map(mx.add, one, other), sums)
            # Divided before: another rank may have made another number of shares.
            weight = 1 / (count * self._ranks.size)
            sums, count = [self._ranks.sum(tree_map(functools.partial(mx.multiply, weight), total))], 1
        if self._training.grad_checkpoint:
            # By themselves: with the update in one graph, MLX would keep what is recomputed until the norm is known.
            mx.async_eval(sums)
        parameters, self.optimizer_state, result = self._update(
            parameters, sums, self.optimizer_state, mx.array(float(count)), mx.array(learning_rate)
        )
        del sums, share
        self.model.update(parameters)
        mx.async_eval(parameters, self.optimizer_state, result)
        return StepResult(*result)

    def _loss_and_gradients(
        self, parameters: Tree, windows_bt: mx.array, key: mx.array | None
    ) -> tuple[mx.array, Tree]:
        def loss(parameters: Tree) -> mx.array:
            # Cast inside, so that the gradients come back in the parameters' float32.
            self.model.update(tree_map(lambda p: p.astype(self._dtype), parameters))
            return self.model.loss(windows_bt[:, :-1], windows_bt[:, 1:], key)

        return mx.value_and_grad(loss)(parameters)

    def _clip_and_update(
        self, parameters: Tree, sums: Sequence[tuple[mx.array, Tree]], state: Tree, count: mx.array, rate: mx.array
    ) -> tuple[Tree, Tree, tuple[mx.array, mx.array]]:
        # Sums over `count` shares of the step become means: all have as many tokens.
        loss = sum(loss for loss, _ in sums) / count
        shares = [dict(tree_flatten(gradients)) for _, gradients in sums]
        old = [dict(tree_flatten(tree)) for tree in (parameters, state["m"], state["v"])]
        parts = backend.parts({name: p.size for name, p in old[0].items()})
        gradients: dict[str, mx.array] = {}
        squares: list[mx.array] = []
        for names in backend.side_by_side(parts):
            gradients |= {name: sum(share[name] for share in shares) for name in names}
            squares += [_square(gradients[name]) for name in names]
        norm = mx.sqrt(mx.stack(squares).sum()) / count
        scale = 1 / count
        if self._training.max_grad_norm > 0:
            scale = scale * mx.minimum(1.0, self._training.max_grad_norm / (norm + 1e-6))
        sound = mx.isfinite(norm) & mx.isfinite(loss)  # one bad step must not poison the weights for good
        rates, updates = self.optimizer.rates(state["updates"], rate, scale, sound)
        new: list[dict[str, mx.array]] = [{}, {}, {}]
        for names in backend.side_by_side(parts):
            p, m, v, g = ({name: tree[name] for name in names} for tree in (*old, gradients))
            for tree, part in zip(new, self.optimizer.update(p, g, m, v, rates), strict=True):
                tree |= part
        parameters, m, v = (tree_unflatten(list(tree.items())) for tree in new)
        return parameters, {"m": m, "v": v, "updates": updates}, (loss, norm)


def _square(x: mx.array) -> mx.array:
    """The sum of squares."""
    return mx.inner(x.flatten(), x.flatten())
