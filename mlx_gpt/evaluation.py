"""Loss, perplexity and bits per byte on fixed windows."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_gpt import backend, ops
from mlx_gpt.data.batches import Part, validation_batches, validation_windows
from mlx_gpt.distributed import ALONE, Ranks
from mlx_gpt.model import GPT


def token_losses(model: GPT, windows_bt: mx.array) -> mx.array:
    """Cross-entropy (B, T - 1), in nats and float32, of each token of (B, T) windows but the first."""
    x_nc = model.hidden(windows_bt[:, :-1]).flatten(0, 1)
    targets_bt = windows_bt[:, 1:]
    size = ops.rows_at_once(targets_bt.size, model.config.vocab_size, backend.on_gpu())
    losses: list[mx.array] = []
    for start in range(0, targets_bt.size, size):
        # One after the other, so that the logits of all tokens never stand at once.
        chunk_nc = mx.depends(x_nc[start : start + size], losses[-1:])
        losses.append(ops.cross_entropy(model.head(chunk_nc), targets_bt.flatten()[start : start + size]))
    return mx.concatenate(losses).reshape(targets_bt.shape)


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a text.

    Attributes:
        loss: mean cross-entropy per token, in nats.
        tokens: how many were predicted.
        text_bytes: UTF-8 bytes of their text.
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
        tokens: (tokens,) ids of the text.
        byte_lengths: (vocab_size,) UTF-8 bytes of each id.
        limit: take only this many windows, spread evenly; 0 takes all.
        ranks: that share the windows, and all learn what came out.
    """

    def __init__(
        self,
        model: GPT,
        tokens: np.ndarray,
        byte_lengths: np.ndarray,
        *,
        seq_len: int,
        batch_size: int,
        limit: int = 0,
        dtype: mx.Dtype = mx.float32,
        ranks: Ranks = ALONE,
    ) -> None:
        self._model, self._tokens, self._byte_lengths = model, tokens, byte_lengths
        self._seq_len, self._batch_size, self._dtype = seq_len, batch_size, dtype
        self._ranks, self._part, self._limit = ranks, Part(ranks.rank, ranks.size), limit
        self._loss = mx.compile(self._summed_loss)

    @property
    def windows(self) -> int:
        """How many windows this rank takes in one evaluation."""
        return len(validation_windows(self._tokens, self._seq_len, self._limit, self._part))

    def __call__(self, progress: Callable[[int], None] = lambda windows: None) -> Evaluation:
        """Evaluate the model as it is now; `progress` is told the windows done since the last call."""
        parameters = self._model.parameters()
        nats, count, text_bytes = 0.0, 0, 0
        batches = validation_batches(self._tokens, self._seq_len, self._batch_size, self._limit, self._part)
        for windows, weights in batches:
            losses = [self._loss(parameters, *share) for share in backend.shares(windows, weights)]
            mx.async_eval(losses)
            nats += sum(loss.item() for loss in losses)
            count += int(weights.sum())
            text_bytes += int(self._byte_lengths[windows[:, 1:]][weights > 0].sum())
            progress(int(weights.any(axis=1).sum()))
        self._model.update(parameters)
        nats, *counts = self._ranks.total(nats, count, text_bytes)
        return Evaluation(nats / counts[0], *map(int, counts))

    def _summed_loss(self, parameters: dict, windows_bt: mx.array, weights_bt: mx.array) -> mx.array:
        self._model.update(tree_map(lambda p: p.astype(self._dtype), parameters))
        return (token_losses(self._model, windows_bt) * weights_bt).sum()
