"""Loss, perplexity and bits per byte on fixed windows."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx_gpt.device  # noqa: F401 - before mlx, so that a tuned BLAS can take its place

# isort: split

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_gpt.data.batches import Shard, Windows
from mlx_gpt.device import Device, device
from mlx_gpt.distributed import ALONE, Ranks
from mlx_gpt.models.base import cast_parameters
from mlx_gpt.objectives.text import Text


@dataclass(frozen=True)
class Evaluation:
    """How well a model predicts a text.

    Attributes:
        loss: mean cross-entropy per token that counts, in nats.
        tokens: number of tokens that count.
        text_bytes: number of UTF-8 bytes in the text of these tokens.
    """

    loss: float
    tokens: int
    text_bytes: int

    @property
    def perplexity(self) -> float:
        """exp(loss), or infinity beyond what a float holds."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Bits that the model needs per byte of text: unlike the loss, comparable between tokenizers."""
        return self.loss * self.tokens / math.log(2) / max(1, self.text_bytes)


class Evaluator:
    """Evaluates a model on the same windows each time, without dropout and without drawing a random number.

    Args:
        windows: the validation windows.
        byte_lengths: (vocab_size,) UTF-8 bytes of each id.
        objective: the class of the objective that computes the loss.
        limit: take only this many windows, spread evenly; 0 takes all.
        dtype: the type to compute in; None for the type of the parameters.
        ranks: the ranks, which share the windows and all get the result.
    """

    def __init__(
        self,
        model: nn.Module,
        windows: Windows,
        byte_lengths: np.ndarray,
        *,
        batch_size: int,
        objective: type[Text] = Text,
        limit: int = 0,
        dtype: mx.Dtype | None = None,
        on: Device | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self._model, self._windows, self._byte_lengths = model, windows, byte_lengths
        self._batch_size, self._limit, self._dtype = batch_size, limit, dtype
        self._ranks, self._shard = ranks, Shard(ranks.rank, ranks.size)
        self._device = on or device()
        self._objective = self._device.accelerate(objective()).eval()
        self._sums = self._device.in_slices(mx.compile(self._summed_loss))

    @property
    def windows(self) -> int:
        """The number of windows that this rank reads in one evaluation."""
        return self._windows.validation_count(self._limit, self._shard)

    def __call__(self, progress: Callable[[int], None] = lambda windows: None) -> Evaluation:
        """Evaluate the model as it is now; `progress` is called with the windows done since its last call."""
        nats, count, text_bytes = 0.0, 0, 0
        for windows, weights in self._windows.validation(self._batch_size, self._limit, self._shard):
            nats += self.summed_loss(windows, weights)
            count += int(weights.sum())
            text_bytes += int(self._byte_lengths[windows[:, 1:]][weights > 0].sum())
            progress(int(weights.any(axis=1).sum()))
        nats, *counts = self._ranks.total(nats, count, text_bytes)
        return Evaluation(nats / counts[0], *map(int, counts))

    def summed_loss(self, windows: np.ndarray, weights: np.ndarray) -> float:
        """Return the weighted sum of the losses, in nats, of windows (B, T + 1) with weights (B, T)."""
        parameters, training = self._model.parameters(), self._model.training
        self._model.eval()
        slices = self._sums(parameters, None, mx.array(windows), mx.array(weights))
        loss: float = self._device.add(slices).item()
        self._model.train(training)
        self._model.update(parameters)
        return loss

    def _summed_loss(
        self, parameters: dict, key: mx.array | None, windows_bt: mx.array, weights_bt: mx.array
    ) -> mx.array:
        if self._dtype is not None:
            self._model.update(cast_parameters(self._model, parameters, self._dtype))
        else:
            self._model.update(parameters)
        return self._objective(self._model, windows_bt, weights_bt)[0]
