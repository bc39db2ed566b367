"""The step of memory.py's comparison: the loss from all logits at once and every activation kept.

All else is ours: the network, AdamW, clipping, `mx.compile`.
"""

from typing import Any

import numpy as np

from contender import MLXContender
from harness import serve


class Plain(MLXContender):
    """The plain step."""

    def __init__(self, settings: dict[str, Any], windows: str, device: str, precision: str) -> None:
        super().__init__(settings, device, precision)
        import mlx.core as mx
        import mlx.nn as nn
        from mlx import optimizers
        from mlx.utils import tree_map

        from mlx_gpt.model import GPT
        from mlx_gpt.training.optimizer import AdamW, Tree

        model, training, dtype = GPT(self.config).init_weights(self.training.seed), self.training, self.dtype
        optimizer = AdamW(training)

        def loss(parameters: Tree, windows_bt: mx.array) -> mx.array:
            model.update(tree_map(lambda p: p.astype(dtype), parameters))
            logits_btv = model(windows_bt[:, :-1]).astype(mx.float32)
            return nn.losses.cross_entropy(logits_btv, windows_bt[:, 1:], reduction="mean")

        def step(parameters: Tree, state: Tree, windows_bt: mx.array, rate: mx.array) -> tuple[Tree, Tree, mx.array]:
            value, gradients = mx.value_and_grad(loss)(parameters, windows_bt)
            gradients, norm = optimizers.clip_grad_norm(gradients, training.max_grad_norm)
            rates, updates = optimizer.rates(state["updates"], rate, mx.array(1.0), mx.isfinite(norm))
            parameters, m, v = optimizer.update(parameters, gradients, state["m"], state["v"], rates)
            return parameters, {"m": m, "v": v, "updates": updates}, value

        self._parameters = model.trainable_parameters()
        self._state = optimizer.init(self._parameters)
        self._step = mx.compile(step)
        self.load_windows(windows)

    def step(self, windows_bt: np.ndarray, rate: float) -> Any:
        mx = self.mx
        self._parameters, self._state, loss = self._step(
            self._parameters, self._state, mx.array(windows_bt), mx.array(rate)
        )
        mx.eval(self._parameters, self._state, loss)
        return loss


if __name__ == "__main__":
    serve(Plain)
