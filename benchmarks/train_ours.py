"""The step of `mlx-gpt train`: `mlx_gpt.training.loop.make_step`, given what `mlx_gpt.training.loop.train` gives it."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from contender import MLXContender
from harness import serve


class Ours(MLXContender):
    """mlx-gpt.

    Args:
        settings: every setting of a run by name.
        windows: a file of `shapes.write_windows`.
        device: "cpu", "gpu" or "auto".
        precision: "float32", "bfloat16" or "auto".
        weights: a safetensors file of initial weights; without one they are drawn.
    """

    def __init__(
        self, settings: dict[str, Any], windows: str, device: str, precision: str, weights: str | None = None
    ) -> None:
        super().__init__(settings, device, precision)
        from mlx_gpt import models
        from mlx_gpt.optim import make_optimizer
        from mlx_gpt.training.loop import StepResult, make_step

        self.model = self.device.accelerate(models.init_weights(models.create(self.config), self.training.seed))
        if weights:
            self.model.load_weights(weights)
        else:
            self._enlarge_matrices()
        objective = self.device.accelerate(self.objective())
        self._step = make_step(
            self.model, make_optimizer(self.training, self.model), objective, self.training, self.device
        )
        self._weights_bt = self.mx.ones((self.training.batch_size, self.training.seq_len))
        self._made = 0
        self._unread: StepResult | None = None
        self.load_windows(windows)

    def objective(self) -> Any:
        """What the model is trained for."""
        from mlx_gpt.objectives import OBJECTIVES

        return OBJECTIVES["documents"]()

    def _enlarge_matrices(self) -> None:
        """Raise the deviation of the matrices from 0.02 to 1 / sqrt(n_embd).

        Attention hardly influences the loss of a small network with fresh weights, so its scale could be wrong unseen.
        """
        from mlx.utils import tree_map

        factor = 50 / math.sqrt(self.config.n_embd)
        self.model.update(tree_map(lambda p: p * factor if p.ndim == 2 else p, self.model.parameters()))

    def facts(self) -> dict[str, Any]:
        from mlx_gpt import models

        sizes = {
            "n_params": models.n_params(self.model),
            "flops_per_token": models.flops_per_token(self.model, self.training.seq_len),
        }
        return super().facts() | sizes

    def save_weights(self, path: str) -> None:
        """Write the initial weights for the others, by the names of GPT-2 and in the orientation of nn.Linear."""
        from mlx.utils import tree_flatten

        from mlx_gpt.models.tensors import save_arrays

        save_arrays(Path(path), dict(tree_flatten(self.model.parameters())))

    def rates(self, steps: int) -> list[float]:
        """The learning rates of the first steps of a run that is ten times as long: its warm-up."""
        from mlx_gpt.optim import make_schedule

        return [*map(make_schedule(self.training, 10 * steps), range(steps))]

    def memory(self) -> dict[str, int]:
        """Bytes of the weights, their gradients and AdamW's two means, all float32, and bytes that a run may take."""
        from mlx_gpt import models

        return {"least": 16 * models.n_params(self.model), "usable": self.device.usable}

    def step(self, windows_bt: np.ndarray, rate: float) -> Any:
        result = self._step(self._made, rate, [(self.mx.array(windows_bt), self._weights_bt)])
        if self._unread:
            self._unread.numbers()  # as `loop.fit` does while the device computes the next step
        self._made, self._unread = self._made + 1, result
        return result.loss

    def synchronize(self) -> None:
        if self._unread:
            self._unread.numbers()
        super().synchronize()


if __name__ == "__main__":
    serve(Ours)
