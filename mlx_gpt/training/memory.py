"""What a run takes, measured: memory and time of real steps with small micro-batches, extrapolated to its own.

The forward and backward pass take memory that is linear in the micro-batch, so two sizes give it for all; an update
takes the same for all. This holds for every model, objective, optimizer and device, and needs no coefficients.
"""

import dataclasses
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt import models
from mlx_gpt.config import TrainingConfig
from mlx_gpt.device import Device
from mlx_gpt.errors import UserError
from mlx_gpt.optim import make_optimizer
from mlx_gpt.progress import Display
from mlx_gpt.training import run_folder
from mlx_gpt.training.plan import in_words, make_plan
from mlx_gpt.training.setup import Run

HEADROOM = 0.9  # of the usable memory: what is measured can be a few percent too low
SHORTEST = 128  # windows that a suggestion cuts no shorter
CHOSEN = ("batch_size", "gradient_accumulation_steps", "grad_checkpoint", "auto_batch_size")
PATIENCE = 2.0  # seconds; a step that takes longer is timed once


@dataclass(frozen=True)
class Estimate:
    """What a run is expected to take.

    Attributes:
        peak: bytes, at the most.
        step_seconds: of one step.
    """

    peak: int
    step_seconds: float


@dataclass(frozen=True)
class Trial:
    """What real steps took, with `windows` in a micro-batch.

    Attributes:
        peak: bytes, of the forward and backward pass and of evaluation: linear in the windows.
        update_peak: bytes, of the update: the same for all windows, and more than the other where they are few.
    """

    windows: int
    peak: int
    update_peak: int
    step_seconds: float


@dataclass(frozen=True)
class Line:
    """A line through one or two trials."""

    trials: tuple[Trial, ...]

    def at(self, windows: int) -> Estimate:
        """The estimate for micro-batches of so many windows."""
        first, last = self.trials[0], self.trials[-1]
        update = max(first.update_peak, last.update_peak)
        if first.windows == last.windows:
            ratio = windows / last.windows
            return Estimate(max(update, math.ceil(last.peak * max(1.0, ratio))), last.step_seconds * ratio)
        beyond = (windows - first.windows) / (last.windows - first.windows)
        peak = first.peak + beyond * (last.peak - first.peak)
        seconds = first.step_seconds + beyond * max(0.0, last.step_seconds - first.step_seconds)
        return Estimate(max(update, math.ceil(max(peak, first.peak if windows < first.windows else 0))), seconds)


class _Alone:
    """One rank, which notes the peaks before and after the gradients are complete."""

    rank, size = 0, 1

    def __init__(self) -> None:
        self.peak = self.update_peak = 0

    def sum(self, sums: Any) -> Any:
        mx.eval(sums)
        self.peak = max(self.peak, self.take())
        return sums

    def take(self) -> int:
        """Bytes at the peak since the last call."""
        peak = mx.get_peak_memory()
        mx.reset_peak_memory()
        return peak


def plan_run(
    run: Run, make_step: Callable[..., Any], display: Display, *, overwrite: bool, show: bool, ignore_memory: bool
) -> None:
    """Measure the run, choose its batch if that was left to us, and refuse what does not fit.

    Args:
        make_step: as in `loop`.
        show: show the plan.
        ignore_memory: plan a run that does not fit, too.

    Raises:
        UserError: it does not fit, or the disk has no room, or the run is over; the sentence says what to change.
    """
    lines: dict[tuple[int, bool], Line | None] = {}

    def estimate(training: TrainingConfig) -> Estimate | None:
        key = training.seq_len, training.grad_checkpoint
        if key not in lines:
            lines[key] = measure(run, make_step, training)
        line = lines[key]
        if not line:
            return None
        found = line.at(training.micro_batch_size)
        tried = min(2, training.micro_steps)
        return dataclasses.replace(found, step_seconds=found.step_seconds * training.micro_steps / tried)

    training, problem = run.training, ""
    if not run.resumes:
        training, problem = fit(run.training, estimate, run.device)
    training = dataclasses.replace(training, **run.ranks.broadcast({name: getattr(training, name) for name in CHOSEN}))
    run.config = dataclasses.replace(run.config, training=training)
    run.settings = dataclasses.replace(run.settings, training=training)
    found = estimate(training)
    run.plan = make_plan(run, found.peak if found else None, found.step_seconds if found else None)
    if show:
        for line in run.plan.lines():
            display.line(line)
    if problem and not ignore_memory:
        raise UserError(f"{problem} --ignore-memory starts it all the same.")
    if run.progress.step > run.plan.total_steps:
        raise UserError(
            f"{run.folder} is at step {run.progress.step:,} already, beyond the {run.plan.total_steps:,} that it would "
            "end at: give more with --max-steps or --max-epochs."
        )
    if run.ranks.first:
        run_folder.check_room(run.folder, models.n_params(run.model), overwrite)


def fit(
    training: TrainingConfig, estimate: Callable[[TrainingConfig], Estimate | None], device: Device
) -> tuple[TrainingConfig, str]:
    """The settings to train with on `device`, and what is wrong with them: empty if they fit.

    They are those given; if the batch was left to us, it is chosen, and whether activations are computed twice.

    Args:
        estimate: what settings take; None where even trying them is not safe.
    """
    asked = training
    if training.auto_batch_size:
        asked = dataclasses.replace(
            training,
            batch_size=training.windows_per_rank,
            gradient_accumulation_steps=training.ranks,
            auto_batch_size=False,
        )

    def fits(candidate: TrainingConfig) -> bool:
        found = estimate(candidate)
        return found is not None and found.peak <= HEADROOM * device.usable

    fitting = next((candidate for candidate in changes(asked) if fits(candidate)), None)
    if fitting == asked or (fitting and training.auto_batch_size and fitting.seq_len == asked.seq_len):
        return fitting, ""
    needed = estimate(asked)
    takes = f"about {in_words(needed.peak)} at its peak" if needed else "more memory than it is safe to try"
    problem = f"Training would take {takes}, and {device} can safely spare {in_words(HEADROOM * device.usable)}."
    if fitting:
        found = estimate(fitting)
        assert found is not None
        return asked, f"{problem} This fits: {flags(training, fitting)} (about {in_words(found.peak)})."
    return asked, f"{problem} No batch of this model fits: take a smaller --preset, or free some memory."


def measure(run: Run, make_step: Callable[..., Any], training: TrainingConfig) -> Line | None:
    """Make real steps of the run with small micro-batches; None where even the smallest may take too much memory.

    Nothing of the run changes: the steps have a learning rate of 0 and an optimizer of their own.
    """
    # Weights, their gradients and AdamW's two means in float32, before any activation.
    if 16 * models.n_params(run.model) > run.device.usable:
        return None
    most = training.micro_batch_size
    smallest = min(most, 2 if run.device.accelerated else 1)  # a CPU computes two slices side by side
    trials = [_try(run, make_step, training, smallest)]
    # The larger the second, the less the noise of both counts.
    second = min(most, next((n for n in (4, 2) if n * trials[0].peak <= run.device.usable), 1) * smallest)
    if second > smallest:
        trials.append(_try(run, make_step, training, second))
    return Line(tuple(trials))


def _try(run: Run, make_step: Callable[..., Any], training: TrainingConfig, windows: int) -> Trial:
    micro_steps = min(2, training.micro_steps)
    training = dataclasses.replace(
        training, batch_size=windows, gradient_accumulation_steps=micro_steps, ranks=1, auto_batch_size=False
    )
    draw = np.random.default_rng(0)
    ids = draw.integers(models.vocab_size(run.model), size=(windows, training.seq_len + 1), dtype=np.int32)
    batch = mx.array(ids), mx.ones((windows, training.seq_len))
    mx.eval(batch, run.model.parameters())
    _tidy()
    optimizer, watch = make_optimizer(training), _Alone()
    step = make_step(run.model, optimizer, run.objective, training, run.device, watch)
    seconds: list[float] = []
    for number in range(4):
        started = time.perf_counter()
        mx.eval(step(number, 0.0, [batch] * micro_steps), run.model.parameters(), optimizer.state)
        seconds.append(time.perf_counter() - started)
        watch.update_peak = max(watch.update_peak, watch.take())
        if number > 0 and seconds[-1] > PATIENCE:
            break
    evaluate = run.evaluator()
    evaluate.summed_loss(ids, np.ones((windows, training.seq_len), np.float32))
    peak, update_peak = max(watch.peak, watch.take()), watch.update_peak
    if run.ranks.size > 1:
        peak += 8 * models.n_params(run.model)  # gradients joined to be sent, and their sum
    del optimizer, step, evaluate
    _tidy()
    return Trial(windows, peak, update_peak, statistics.median(seconds[1:]))


def _tidy() -> None:
    """Free what is no longer used, which a trial or the run would be charged for, and forget the peak before."""
    gc.collect()  # a step, its optimizer and their closures refer to each other
    mx.clear_cache()
    mx.reset_peak_memory()


def changes(training: TrainingConfig) -> Iterator[TrainingConfig]:
    """Ways to take less memory, cheapest first; the windows per step stay the same.

    Smaller micro-batches change only the time; computing activations twice costs a third more of it; shorter windows
    change what is learnt.
    """
    windows, seq_len = training.windows_per_step, training.seq_len
    while True:
        for recompute in [True] if training.grad_checkpoint else [False, True]:
            for batch_size in range(training.batch_size, 0, -1):
                if windows % batch_size == 0:
                    yield dataclasses.replace(
                        training,
                        batch_size=batch_size,
                        gradient_accumulation_steps=windows // batch_size,
                        grad_checkpoint=recompute,
                        seq_len=seq_len,
                    )
        if seq_len // 2 < SHORTEST:
            return
        seq_len //= 2


def flags(before: TrainingConfig, after: TrainingConfig) -> str:
    """The command-line flags that turn the one into the other."""
    words = []
    for name in ("batch_size", "gradient_accumulation_steps", "grad_checkpoint", "seq_len"):
        value = getattr(after, name)
        if value != getattr(before, name):
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return " ".join(words)
