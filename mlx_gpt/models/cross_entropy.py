"""The loss of a head, without all of its logits in memory. N rows, C the width, V the vocabulary."""

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

CHUNK = 2**25  # logits at a time in `LinearCrossEntropy`: 128 MB in float32


class LinearCrossEntropy(nn.Module):
    """The cross-entropy of the logits `x @ weight.T`, which are never all in memory at once.

    The logits are computed for some rows at a time, and in training their gradient is computed at the same time. With a
    vocabulary of 50,000, all logits together would take most of the memory that training needs.
    """

    cpu_twin = "linear_cross_entropy"

    def __call__(self, x_nc: mx.array, weight_vc: mx.array, targets_n: mx.array, weights_n: mx.array) -> mx.array:
        """Return the sum of the rows' cross-entropies times `weights_n`, a float32 scalar in nats.

        Args:
            x_nc: hidden states, in the dtype to compute in.
            weight_vc: the head, in any dtype; its gradient has the same one.
            targets_n: ids in [0, V).
            weights_n: float32, without a gradient.
        """
        if self.training:
            return _linear_cross_entropy(x_nc, weight_vc, targets_n, weights_n)[0]
        weight = weight_vc.astype(x_nc.dtype)
        return self._sum(lambda x: x @ weight.T, len(weight_vc), x_nc, targets_n, weights_n)

    def frozen(
        self, head: Callable[[mx.array], mx.array], x_nc: mx.array, targets_n: mx.array, weights_n: mx.array
    ) -> mx.array:
        """Return the same sum for a `head` that is not trained and may be quantised. Only `x_nc` has a gradient.

        Args:
            head: turns hidden states (..., C) into logits (..., V).
        """
        vocab_size = head(x_nc[:1]).shape[-1]
        if not self.training:  # a custom function would compute the gradient, too
            return self._sum(head, vocab_size, x_nc, targets_n, weights_n)

        @mx.custom_function
        def total_and_dx(x_nc: mx.array) -> tuple[mx.array, mx.array]:
            dx: list[mx.array] = []
            total = mx.array(0.0)
            for part in chunks(len(x_nc), vocab_size, CHUNK):
                x, targets = mx.depends([x_nc[part], targets_n[part]], [total, *dx[-1:]])
                loss, gradient = self.loss_and_gradient(head, x, targets, weights_n[part])
                total = total + loss
                dx.append(gradient)
            return total, mx.concatenate(dx)

        @total_and_dx.vjp
        def backward(x_nc: mx.array, cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]) -> mx.array:
            return (cotangents[0] * outputs[1]).astype(x_nc.dtype)

        return total_and_dx(x_nc)[0]

    def _sum(
        self,
        head: Callable[[mx.array], mx.array],
        vocab_size: int,
        x_nc: mx.array,
        targets_n: mx.array,
        weights_n: mx.array,
    ) -> mx.array:
        total = mx.array(0.0)
        for part in chunks(len(x_nc), vocab_size, CHUNK):
            x, targets = mx.depends([x_nc[part], targets_n[part]], [total])  # one chunk after the other
            total = total + (self.losses(head(x), targets) * weights_n[part]).sum()
        return total

    def losses(self, logits_nv: mx.array, targets_n: mx.array) -> mx.array:
        """Return the loss of each row, (N,)."""
        return mx.fast.cross_entropy(logits_nv, targets_n)

    def loss_and_gradient(
        self, head: Callable[[mx.array], mx.array], x_nc: mx.array, targets_n: mx.array, weights_n: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Return the sum of some rows, and its gradient for `x_nc`."""

        def loss(x_nc: mx.array) -> mx.array:
            return (mx.fast.cross_entropy(head(x_nc), targets_n) * weights_n).sum()

        return mx.value_and_grad(loss)(x_nc)


def chunks(rows: int, vocab_size: int, logits: int) -> list[slice]:
    """Divide rows evenly into slices of at most about `logits` logits, but of 128 rows or more."""
    most = max(128, logits // vocab_size)
    size = math.ceil(rows / math.ceil(rows / most))
    return [slice(start, start + size) for start in range(0, rows, size)]


@mx.custom_function
def _linear_cross_entropy(
    x_nc: mx.array, weight_vc: mx.array, targets_n: mx.array, weights_n: mx.array
) -> tuple[mx.array, mx.array, mx.array]:
    # The sum, and its gradients for x and the weight, which cost little more while the logits are there.
    weight = weight_vc.astype(x_nc.dtype)

    def loss(logits: mx.array, targets: mx.array, weights: mx.array) -> mx.array:
        return (mx.fast.cross_entropy(logits, targets) * weights).sum()

    dx: list[mx.array] = []
    total, dweight = mx.array(0.0), mx.array(0.0)
    for part in chunks(len(x_nc), len(weight_vc), CHUNK):
        # Each chunk waits for the one before, because otherwise the logits of all chunks would be computed first.
        x, targets = mx.depends([x_nc[part], targets_n[part]], [total, dweight, *dx[-1:]])
        loss_sum, dlogits = mx.value_and_grad(loss)(x @ weight.T, targets, weights_n[part])
        total = total + loss_sum
        dx.append(dlogits @ weight)
        dweight = dweight + dlogits.T @ x
    return total, mx.concatenate(dx), dweight.astype(weight_vc.dtype)


@_linear_cross_entropy.vjp
def _linear_cross_entropy_vjp(
    primals: tuple[mx.array, ...], cotangents: tuple[mx.array, ...], outputs: tuple[mx.array, ...]
) -> tuple[mx.array, ...]:
    _, dx, dweight = outputs
    scale = cotangents[0]
    _, _, targets_n, weights_n = primals
    return (
        (scale * dx).astype(dx.dtype),
        (scale * dweight).astype(dweight.dtype),
        mx.zeros_like(targets_n),
        mx.zeros_like(weights_n),
    )
