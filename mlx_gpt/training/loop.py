"""Training: `train` makes a run, `fit` makes its steps, and `make_step` makes one step."""

import contextlib
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_map

from mlx_gpt.config import TrainingConfig
from mlx_gpt.device import Device
from mlx_gpt.distributed import ALONE, Ranks
from mlx_gpt.evaluation import Evaluator
from mlx_gpt.models import lora
from mlx_gpt.models.base import cast_parameters, has_dropout, recompute_in_backward, seed_dropout, set_precision
from mlx_gpt.models.directory import save_model
from mlx_gpt.optim import make_optimizer, make_schedule, warmup_steps
from mlx_gpt.progress import Display
from mlx_gpt.seeds import seed_from
from mlx_gpt.signals import acknowledged
from mlx_gpt.training import checkpoint, trouble
from mlx_gpt.training.metrics import was_evaluated
from mlx_gpt.training.planning import plan_run
from mlx_gpt.training.run import Run
from mlx_gpt.training.setup import set_up, take_folder

Batch = tuple[mx.array, ...]
"""Tokens (B, T + 1), and the weights (B, T) of all tokens except the first."""
Sums = Any
"""A list, one item for each slice: ((sum of losses, sum of weights), gradients of the first)."""

AVERAGE_DECAY = 0.95  # of the running average that a loss is compared with
SPIKE = 1.0  # nats above that average make a spike


class StepResult(NamedTuple):
    """Scalars that MLX may still be computing; `.item()` waits for them.

    Attributes:
        loss: mean loss over all tokens of the step that count, in nats.
        grad_norm: global norm of the gradients before clipping.
    """

    loss: mx.array
    grad_norm: mx.array

    def numbers(self) -> tuple[float, float]:
        """Wait for both."""
        return self.loss.item(), self.grad_norm.item()


Step = Callable[[int, float, Iterable[Batch]], StepResult]


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        finished: false if training was asked to stop before its last step; in that case there is a checkpoint of
            `step`.
        best_loss: lowest validation loss, in nats per token.
    """

    folder: Path
    finished: bool
    step: int
    best_loss: float | None


def train(
    settings: Mapping[str, Any],
    display: Display,
    *,
    file: str | Path | None = None,
    resume: str | None = None,
    overwrite: bool = False,
    ignore_memory: bool = False,
    dry_run: bool = False,
    stop_requested: Callable[[], bool] = lambda: False,
    around: contextlib.AbstractContextManager = contextlib.nullcontext(),  # noqa: B008 - it has no state
    network: Callable[[nn.Module], nn.Module] = lambda model: model,
) -> Outcome:
    """Train as the settings say, from the beginning or from a checkpoint.

    Args:
        settings: by name; they override the TOML `file`, which overrides the preset.
        resume: a run, a checkpoint, or "newest".
        overwrite: replace the run that is already in the folder.
        ignore_memory: start even if the run is expected to need more memory than there is.
        dry_run: show the plan and stop; the run's folder stays as it is.
        stop_requested: called after each step; if it returns true, a checkpoint is saved and training ends.
        around: a context that is entered while steps are made, such as a handler of signals.
        network: may replace the model with another one that has the same parameters.

    Raises:
        RunError: as in `fit`, or macOS ended the GPU's work.
        UserError: a setting, the data or a folder cannot be used, or there is too little memory or disk; in that case
            nothing has been changed.
    """
    with set_up(settings, display, file, resume, overwrite, dry_run) as run, trouble.gpu_failures(run):
        run.model = network(run.model)
        with acknowledged("Stopping after this step."):
            plan_run(run, make_step, display, show=dry_run, ignore_memory=ignore_memory)
        if dry_run:
            return Outcome(run.folder, False, run.progress.step, run.best_loss)
        optimizer = make_optimizer(run.training, run.model)
        step = make_step(run.model, optimizer, run.objective, run.training, run.device, run.ranks)
        restore(run, optimizer)
        take_folder(run, display)
        with around:
            return fit(run, step, optimizer, display, stop_requested)


def make_step(
    model: nn.Module,
    optimizer: optim.MultiOptimizer,
    objective: nn.Module,
    training: TrainingConfig,
    device: Device,
    ranks: Ranks = ALONE,
) -> Step:
    """Return a function that makes one step, given its number, a learning rate and micro-batches of one shape.

    Parameters and optimizer state are float32; the network computes in `training.precision`.
    """
    dtype = device.dtype(training.precision)
    set_precision(model, dtype)
    recompute_in_backward(model.layers, training.grad_checkpoint)
    optimizer.init(model.trainable_parameters())
    drops = has_dropout(model)
    frozen = lora.frozen(model)

    def loss(parameters: dict, key: mx.array | None, *batch: mx.array) -> tuple[mx.array, mx.array]:
        # Cast inside, so that the gradients come back in the parameters' float32.
        model.update(cast_parameters(model, frozen, dtype))
        model.update(cast_parameters(model, parameters, dtype))
        seed_dropout(model, key)
        return objective(model, *batch)

    def update(parameters: dict, state: dict, sums: Sums, rate: mx.array) -> tuple[tuple[dict, dict], StepResult]:
        (loss, weight), gradients = device.add(sums)
        norm = device.global_norm(gradients) / weight
        scale = 1 / weight
        if training.max_grad_norm > 0:
            scale = scale * mx.minimum(1.0, training.max_grad_norm / (norm + 1e-6))
        gradients = tree_map(lambda gradient: gradient * scale, gradients)
        sound = mx.isfinite(norm) & mx.isfinite(loss)  # one bad step must not poison the weights for good
        return device.update(optimizer, gradients, parameters, state, rate, sound), StepResult(loss / weight, norm)

    compiled = mx.compile(mx.value_and_grad(loss))
    # Each slice has gradients of its own, which recomputed activations are to save the memory of.
    forward_backward = (lambda *batch: [compiled(*batch)]) if training.grad_checkpoint else device.in_slices(compiled)
    clip_and_update = mx.compile(update)

    def step(number: int, rate: float, batches: Iterable[Batch]) -> StepResult:
        parameters = model.trainable_parameters()
        sums: Sums = []
        for i, batch in enumerate(batches):
            # What is dropped is a function of (seed, step, micro-step, rank), and on a CPU of how a batch is sliced, so
            # that a resume on the same machine needs no saved state.
            key = mx.random.key(seed_from(training.seed, number, i * ranks.size + ranks.rank)) if drops else None
            micro_sums = forward_backward(parameters, key, *batch)
            if sums:
                mx.eval(sums)  # otherwise two micro-batches' activations would be in memory
                micro_sums = tree_map(mx.add, sums, micro_sums)
            sums = micro_sums
            if training.micro_steps > 1 or training.grad_checkpoint:
                mx.async_eval(sums)
        sums = ranks.sum([device.add(sums)] if ranks.size > 1 else sums)
        (parameters, state), result = clip_and_update(parameters, optimizer.state, sums, mx.array(rate))
        del sums, micro_sums
        model.update(frozen)
        model.update(parameters)
        optimizer.state = state
        mx.async_eval(parameters, state, result)
        return result

    return step


def restore(run: Run, optimizer: optim.MultiOptimizer) -> None:
    """Load the optimizer's state from the checkpoint that the run resumes from, and give all ranks rank 0's arrays."""
    if run.source:
        optimizer.state = checkpoint.load_optimizer(run.source, optimizer.state)
    run.model.update(run.ranks.copy(run.model.trainable_parameters()))
    optimizer.state = run.ranks.copy(optimizer.state)


def fit(
    run: Run,
    step: Step,
    optimizer: optim.MultiOptimizer,
    display: Display,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Step, log, evaluate and save until the steps or the minutes are used up, or until a stop is requested.

    Raises:
        RunError: too many steps in a row had no finite loss, or a checkpoint could not be saved for the third time.
    """
    training, plan, monitor, batches = run.training, run.plan, run.monitor, run.batches()
    schedule, evaluate = make_schedule(training, plan.scheduled_steps), run.evaluator()
    warmup = warmup_steps(training, plan.scheduled_steps)
    number = began = run.progress.step

    def out_of_time() -> bool:
        return run.ranks.first and training.max_minutes is not None and monitor.seconds >= 60 * training.max_minutes

    def rate_of(number: int) -> float:
        """Return the learning rate of a step. With a time limit the schedule is as far as the used time or the steps.

        The warm-up goes by steps all the same, because the first evaluation may take much of the time.
        """
        if training.max_minutes is None:
            return schedule(number)
        done = max(number / plan.total_steps, monitor.seconds / (60 * training.max_minutes))
        rate = schedule(run.ranks.broadcast(done) * plan.scheduled_steps)
        return min(rate, schedule(number)) if number < warmup else rate

    with contextlib.closing(display.bar("Training", plan.scheduled_steps, done=number)) as bar:
        over, stopping = number >= plan.total_steps or run.ranks.broadcast(out_of_time()), False
        # Also if the run was killed between a checkpoint and its evaluation.
        if (number % training.eval_every == 0 or over) and not run.ranks.broadcast(was_evaluated(run.folder, number)):
            validate(run, number, evaluate, display)
        unread: tuple[int, StepResult] | None = None
        saved = began > 0
        while not (over or stopping):
            result = step(number, rate := rate_of(number), itertools.islice(batches, training.micro_steps))
            if unread:
                review(run, *unread)  # the step before is done by now, so the device never waits for this
            number, unread = number + 1, (number + 1, result)
            monitor.count(plan.tokens(1))

            over, stopping = run.ranks.any(out_of_time(), stop_requested())
            over = over or number >= plan.total_steps
            logs, validates = number % training.log_every == 0 or over, number % training.eval_every == 0 or over
            # The first weights to be evaluated get a checkpoint too, so a kill never leaves a `best` that cannot be
            # resumed.
            saves = number % training.save_every == 0 or over or stopping or (validates and not saved)
            if logs or validates or saves:
                review(run, *unread)
                unread = None
            if logs:
                monitor.log_step(number, plan.epoch(number), plan.tokens(number), *result.numbers(), rate)
            if saves:
                saved = save_checkpoint(run, number, optimizer, last=over or stopping) or saved
            if validates:
                validate(run, number, evaluate, display)
            bar.advance(1, monitor.facts(run.progress.loss_average, rate))
    if over and number == began and run.ranks.broadcast((run.folder / "final/model.safetensors").exists()):
        limits = plan.reached(number) + (["--max-minutes"] if out_of_time() else [])
        monitor.line(f"This run is complete: {number:,} steps. To train it further, raise {' and '.join(limits)}.")
    elif over:
        final = run.folder / "final"
        trouble.guarded(run, f"{final}", lambda: save_model(final, run.model, run.tokenizer), last=True)
        monitor.line(f"Done: {number:,} steps in {monitor.seconds / 60:.1f} minutes{' in all' if began else ''}.")
    return Outcome(run.folder, over, number, run.best_loss)


def review(run: Run, step: int, result: StepResult) -> None:
    """Check a step's numbers: log a skipped step or a loss that jumped, and end a run that learns nothing.

    Raises:
        RunError: more than `max_bad_steps` steps in a row had no finite loss or gradient.
    """
    loss, norm = result.numbers()
    average = run.progress.loss_average
    if math.isfinite(loss) and math.isfinite(norm):
        if average is not None and loss > average + SPIKE:
            run.monitor.log_spike(step, loss, average)
        average = loss if average is None else AVERAGE_DECAY * average + (1 - AVERAGE_DECAY) * loss
        run.progress = dataclasses.replace(run.progress, bad_steps=0, loss_average=average)
        return
    run.progress = dataclasses.replace(run.progress, bad_steps=run.progress.bad_steps + 1)
    per_step = run.plan.windows_per_step
    run.monitor.log_skipped(step, loss, norm, run.window_numbers((step - 1) * per_step, per_step))
    if run.progress.bad_steps > run.training.max_bad_steps:
        raise trouble.too_many_bad_steps(run, step)


def validate(run: Run, step: int, evaluate: Evaluator, display: Display) -> None:
    """Evaluate, log the result, and save the weights if they are the best so far."""
    started = time.perf_counter()
    with contextlib.closing(display.bar("Evaluating", evaluate.windows, unit="window")) as bar:
        evaluation = evaluate(bar.advance)
    is_best = math.isfinite(evaluation.loss) and (run.best_loss is None or evaluation.loss < run.best_loss)

    def save() -> None:
        checkpoint.save_best(run.folder, run.model, run.tokenizer, step, evaluation.loss)

    if is_best and trouble.guarded(run, f"{run.folder / 'best'}", save):
        run.best_loss = evaluation.loss
    run.monitor.log_validation(step, run.plan.epoch(step), run.plan.tokens(step), evaluation, is_best)
    run.monitor.aside(started)


def save_checkpoint(run: Run, step: int, optimizer: optim.MultiOptimizer, last: bool) -> bool:
    """Save everything that a resume at `step` needs, and return whether that succeeded.

    Args:
        last: training ends here.
    """
    started = time.perf_counter()
    run.progress = dataclasses.replace(run.progress, step=step, seconds=run.monitor.seconds)

    def save() -> None:
        keep = run.training.keep_checkpoints
        checkpoint.save(run.folder, run.model, run.tokenizer, optimizer.state, run.progress, keep)
        run.failed_saves = 0

    saved = trouble.guarded(run, f"the checkpoint of step {step:,}", save, last)
    run.monitor.aside(started)
    return saved
