"""A run that is ready to train, and what belongs to it."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_gpt.config import Config, TrainingConfig
from mlx_gpt.data.batches import Shard, Windows
from mlx_gpt.data.tokens import Tokens
from mlx_gpt.device import Device
from mlx_gpt.distributed import ALONE, Ranks
from mlx_gpt.evaluation import Evaluator
from mlx_gpt.tokenizer import Tokenizer
from mlx_gpt.training.checkpoint import Progress
from mlx_gpt.training.metrics import Monitor
from mlx_gpt.training.plan import Plan


@dataclass
class Run:
    """Everything that training needs.

    Attributes:
        settings: the settings that run.toml keeps.
        config: the settings as they apply here, with the tokenizer's real size and the number of ranks.
        device: the device that trains.
        tokenizer: the tokenizer of the text and the model.
        tokens: the encoded text.
        windows: the training windows.
        val_windows: the validation windows.
        model: the network, in the form for this device.
        objective: the loss, in the form for this device.
        progress: how far the run is.
        source: the checkpoint to resume from.
        damaged: newer checkpoints, each with the reason why it is unusable.
        resumes: whether the run existed before.
        resources: the lock and the logs, which are closed at the end.
        ranks: the processes that train together.
        best_loss: lowest validation loss so far, which is the loss of `best/`; None before there is one.
        failed_saves: number of failed saves since a checkpoint was last saved.
        plan: what the run is expected to take; set once it is known.
        monitor: the logs; set when the folder is taken.
    """

    settings: Config
    config: Config
    device: Device
    tokenizer: Tokenizer
    tokens: Tokens
    windows: Windows
    val_windows: Windows
    model: nn.Module
    objective: nn.Module
    progress: Progress
    source: Path | None
    damaged: dict[Path, str]
    resumes: bool
    resources: contextlib.ExitStack
    ranks: Ranks = ALONE
    best_loss: float | None = None
    failed_saves: int = 0
    plan: Plan = field(init=False)
    monitor: Monitor = field(init=False)

    @property
    def folder(self) -> Path:
        """The folder that the run is written to."""
        return Path(self.config.out)

    @property
    def training(self) -> TrainingConfig:
        """The settings of its training."""
        return self.config.training

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: Any) -> None:
        """Close the logs and let others into the folder; an error ends all ranks."""
        self.resources.__exit__(*exception)

    def batches(self) -> Iterator[tuple[mx.array, ...]]:
        """Return this rank's micro-batches without end, from the first one that has not been trained on."""
        training = self.training
        start = self.progress.step * training.windows_per_step
        shard = Shard(self.ranks.rank, self.ranks.size, training.windows_per_step)
        batches = self.windows.training(training.micro_batch_size, training.seed, start, shard)
        return ((mx.array(windows_bt), mx.array(weights_bt)) for windows_bt, weights_bt in batches)

    def window_numbers(self, start: int, count: int) -> list[int]:
        """Return where windows begin in the text, in tokens."""
        return self.windows.places(self.training.seed, start, count)

    def evaluator(self) -> Evaluator:
        """Return the evaluator of the model on the validation text."""
        return Evaluator(
            self.model,
            self.val_windows,
            self.tokenizer.byte_lengths(),
            batch_size=self.training.micro_batch_size,
            objective=type(self.objective),
            limit=self.training.eval_windows,
            dtype=self.device.dtype(self.training.precision),
            on=self.device,
            ranks=self.ranks,
        )
