"""The step that `mlx-gpt train` makes: `mlx_gpt.training.step.TrainingStep`, built as `mlx_gpt.training.setup` does."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from contender import MLXContender
from harness import serve


class Ours(MLXContender):
    """mlx-gpt, from `weights` or from its own."""

    def __init__(
        self, settings: dict[str, Any], windows: str, device: str, precision: str, weights: str | None = None
    ) -> None:
        super().__init__(settings, device, precision)
        from mlx_gpt.model import GPT
        from mlx_gpt.training.step import StepResult, TrainingStep

        self.network = GPT(self.config).init_weights(self.training.seed)
        if weights:
            self.network.load_weights(weights)
        else:
            self._raise_voices()
        self.load_windows(windows)
        self._step = TrainingStep(self.network, self.training, self.dtype)
        self._made = 0
        self._unread: StepResult | None = None

    def _raise_voices(self) -> None:
        """Bring the matrices from a deviation of 0.02 to 1 / sqrt(n_embd).

        In fresh weights of a small network attention is hardly heard: its scale could be wrong and the loss the same.
        """
        from mlx.utils import tree_map

        louder = 50 / math.sqrt(self.config.n_embd)
        self.network.update(tree_map(lambda p: p * louder if p.ndim == 2 else p, self.network.parameters()))

    def facts(self) -> dict[str, Any]:
        sizes = {
            "n_params": self.network.n_params(),
            "flops_per_token": self.network.flops_per_token(self.training.seq_len),
        }
        return super().facts() | sizes

    def save_weights(self, path: str) -> None:
        """Write the initial weights, by `GPT`'s names, for the others to begin with."""
        from mlx.utils import tree_flatten

        from mlx_gpt.models.directory import save_arrays

        save_arrays(Path(path), dict(tree_flatten(self.network.parameters())))

    def rates(self, steps: int) -> list[float]:
        """The learning rates of the first steps of a training ten times as long, which are its warm-up."""
        from mlx_gpt.training.optimizer import learning_rate

        return [learning_rate(step, 10 * steps, self.training) for step in range(steps)]

    def expected_memory(self) -> dict[str, int]:
        """Bytes that a step should need, and that there are."""
        from mlx_gpt.training.memory import estimate

        return {"needed": estimate(self.config, self.training, self.device).peak, "usable": self.device.usable}

    def step(self, windows_bt: np.ndarray, rate: float) -> Any:
        result = self._step(self._made, rate, [windows_bt])
        if self._unread:
            self._unread.numbers()  # as `loop.fit` does, while the next step is computed
        self._made, self._unread = self._made + 1, result
        return result.loss

    def synchronize(self) -> None:
        if self._unread:
            self._unread.numbers()
        super().synchronize()


if __name__ == "__main__":
    serve(Ours)
