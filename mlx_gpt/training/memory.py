"""Measures the memory and the time that a run takes, by real steps with small micro-batches first.

The forward and backward pass take memory that is linear in the micro-batch, so measuring two sizes gives it for every
size; an update takes the same memory for every size. This holds for every model, objective, optimizer and device, and
needs no coefficients.
"""

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_gpt import models
from mlx_gpt.config import TrainingConfig
from mlx_gpt.optim import make_optimizer
from mlx_gpt.training.plan import HEADROOM
from mlx_gpt.training.run import Run

STEPS = 3  # of a trial at least; the first compiles
MORE_STEPS = 6  # at most, within `PATIENCE` seconds, for a better time
PATIENCE = 0.5
SLOW = 2.0  # seconds; after a first step that takes longer, only one more is made
BUDGET = 10.0  # seconds that further trials may take, after the two that make a line


@dataclass(frozen=True)
class Estimate:
    """The memory and time that a run is expected to take.

    Attributes:
        peak: the highest number of bytes at any time.
        step_seconds: seconds of one step.
    """

    peak: int
    step_seconds: float


@dataclass(frozen=True)
class Trial:
    """The memory and time that real steps took, with `windows` in a micro-batch.

    Attributes:
        peak: the highest number of bytes at any time.
        backward_peak: bytes up to the end of the backward pass.
        update_peak: bytes in the update.
    """

    windows: int
    peak: int
    backward_peak: int
    update_peak: int
    step_seconds: float


@dataclass(frozen=True)
class Line:
    """A line through one or two trials."""

    trials: tuple[Trial, ...]

    def at(self, windows: int) -> Estimate:
        """Return the estimate for micro-batches of this many windows."""
        first, last = self.trials[0], self.trials[-1]
        if windows == last.windows:
            return Estimate(last.peak, last.step_seconds)
        if first is last:
            ratio = windows / last.windows
            return Estimate(math.ceil(last.peak * max(1.0, ratio)), last.step_seconds * ratio)

        def along(at_first: float, at_last: float) -> float:
            slope = max(0.0, at_last - at_first) / (last.windows - first.windows)
            return at_first + slope * (windows - first.windows)

        # If the update takes the most in both trials, the peaks alone would give a level line.
        peak = max(along(first.peak, last.peak), along(first.backward_peak, last.backward_peak), last.update_peak)
        return Estimate(math.ceil(peak), along(first.step_seconds, last.step_seconds))


class _Phases:
    """Takes the place of the ranks in `make_step` for one process, and notes the peak before the update."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.backward_peak: int | None = None

    def sum(self, sums: Any) -> Any:
        if self.backward_peak is None:
            mx.eval(sums)
            self.backward_peak = _take_peak()
        return sums


def measure(run: Run, make_step: Callable[..., Any], training: TrainingConfig) -> Line | None:
    """Make real steps of the run with larger and larger micro-batches, up to the run's own if that is quick and safe.

    The run does not change: the steps have a learning rate of 0 and their own optimizer.

    Returns:
        The line through the two largest trials; None if even the smallest may take too much memory.
    """
    if sum(held_bytes(run)) > run.device.usable:
        return None
    most = training.micro_batch_size
    windows = min(most, 2 if run.device.accelerated else 1)  # a CPU computes two slices side by side
    trials, began = [_try(run, make_step, training, windows)], time.perf_counter()
    while windows < most:
        line = Line(tuple(trials[-2:]))

        def is_quick(larger: int, line: Line = line) -> bool:
            return time.perf_counter() - began + STEPS * line.at(larger).step_seconds < BUDGET

        # The further apart the two trials of a line are, the less their noise matters. Two are made however long they
        # take.
        sizes = [min(most, factor * windows) for factor in (4, 2)]
        larger = next(filter(is_quick, sizes), sizes[-1] if len(trials) == 1 else None)
        if larger is None or line.at(larger).peak > HEADROOM * run.device.usable:
            break
        trials.append(_try(run, make_step, training, larger))
        windows = larger
    return Line(tuple(trials[-2:]))


def held_bytes(run: Run) -> tuple[int, int, int]:
    """Return the bytes of the weights, of their gradients and of the optimizer's state.

    Nothing is allocated: MLX would make the arrays of the state when they are first used.
    """
    optimizer, trained = make_optimizer(run.training, run.model), run.model.trainable_parameters()
    optimizer.init(trained)
    return bytes_of(run.model.parameters()), bytes_of(trained), bytes_of(optimizer.state)


def bytes_of(tree: Any) -> int:
    """Return the bytes of the arrays in a tree."""
    return sum(array.nbytes for _, array in tree_flatten(tree))


def _try(run: Run, make_step: Callable[..., Any], training: TrainingConfig, windows: int) -> Trial:
    micro_steps = min(2, training.micro_steps)
    training = dataclasses.replace(
        training, batch_size=windows, gradient_accumulation_steps=micro_steps, ranks=1, auto_batch_size=False
    )
    draw = np.random.default_rng(0)
    ids = draw.integers(models.vocab_size(run.model), size=(windows, training.seq_len + 1), dtype=np.int32)
    batch = mx.array(ids), mx.ones((windows, training.seq_len))
    mx.eval(batch, run.model.parameters())
    _free()
    optimizer, phases = make_optimizer(training, run.model), _Phases()
    step = make_step(run.model, optimizer, run.objective, training, run.device, phases)
    began = time.perf_counter()
    mx.eval(step(0, 0.0, [batch] * micro_steps), run.model.parameters(), optimizer.state)
    most_steps = MORE_STEPS if time.perf_counter() - began < SLOW else 2
    backward_peak, update_peak = phases.backward_peak or 0, _take_peak()
    seconds: list[float] = []
    began = mark = time.perf_counter()
    unread = step(1, 0.0, [batch] * micro_steps)
    for number in range(2, most_steps):
        # As in `fit`, the numbers of a step are read when the next one has begun.
        result = step(number, 0.0, [batch] * micro_steps)
        unread.numbers()
        seconds.append(time.perf_counter() - mark)
        unread, mark = result, time.perf_counter()
        if number + 1 >= STEPS and mark - began > PATIENCE:
            break
    mx.eval(unread, run.model.parameters(), optimizer.state)
    seconds.append(time.perf_counter() - mark)
    evaluate = run.evaluator()
    evaluate.summed_loss(ids, np.ones((windows, training.seq_len), np.float32))
    peak = max(backward_peak, update_peak, _take_peak())
    if run.ranks.size > 1:
        peak += 8 * models.n_trained(run.model)  # for the gradients, joined to be sent, and for their sum
    del optimizer, step, evaluate
    _free()
    return Trial(windows, peak, backward_peak, update_peak, statistics.median(seconds))


def _take_peak() -> int:
    """Return the peak in bytes since the last call."""
    peak: int = mx.get_peak_memory()
    mx.reset_peak_memory()
    return peak


def _free() -> None:
    """Free what earlier trials have left, and begin to count the peak anew."""
    gc.collect()  # a step, its optimizer and their closures refer to each other
    mx.clear_cache()
    mx.reset_peak_memory()
