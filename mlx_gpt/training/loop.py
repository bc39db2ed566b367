"""Training. Read `fit` for what happens in what order."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_gpt.errors import RunError
from mlx_gpt.models.directory import save_model
from mlx_gpt.progress import Display
from mlx_gpt.training import checkpoint, run_folder
from mlx_gpt.training.optimizer import learning_rate
from mlx_gpt.training.setup import Run, set_up
from mlx_gpt.training.step import StepResult

MAX_FAILED_SAVES = 3
AVERAGE_DECAY = 0.95  # of the running average that a loss is compared with
SPIKE = 1.0  # nats above that average make a spike


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        finished: false when it was asked to stop before its last step; then there is a checkpoint of `step`.
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
    stop_requested: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Train as the settings say, anew or from a checkpoint.

    Args:
        settings: by name, over those of the TOML `file`, over the preset's.
        resume: a run, a checkpoint, or "newest".
        overwrite: replace the run that is there.
        stop_requested: asked after each step; when true, a checkpoint is saved and training ends.

    Raises:
        RunError: as in `fit`.
        UserError: a setting, the data or a folder is not fit for it; nothing has been changed then.
    """
    with set_up(settings, display, file, resume, overwrite) as run:
        return fit(run, display, stop_requested)


def fit(run: Run, display: Display, stop_requested: Callable[[], bool]) -> Outcome:
    """Step, log, evaluate, save, until the steps or the minutes are used up or a stop is asked for.

    Raises:
        RunError: too many steps in a row had no finite loss, or a checkpoint could not be saved for the third time.
    """
    training, plan, monitor = run.config.training, run.plan, run.monitor
    step = began = run.progress.step

    def out_of_time() -> bool:
        return run.ranks.first and training.max_minutes is not None and monitor.seconds >= 60 * training.max_minutes

    bar = display.bar("Training", plan.total_steps, done=step)
    if step == 0:
        validate(run, step, display)
    over, stopping = step >= plan.total_steps or run.ranks.broadcast(out_of_time()), False
    unread: tuple[int, StepResult] | None = None
    while not (over or stopping):
        rate = learning_rate(step, plan.total_steps, training)
        result = run.step(step, rate, [next(run.batches) for _ in range(training.micro_steps)])
        if unread:
            review(run, *unread)  # the step before is done by now: the device never waits for this
        step, unread = step + 1, (step + 1, result)
        monitor.count(plan.tokens(1))

        over, stopping = run.ranks.any(out_of_time(), stop_requested())
        over = over or step >= plan.total_steps
        logs, validates = step % training.log_every == 0 or over, step % training.eval_every == 0 or over
        saves = step % training.save_every == 0 or over or stopping
        if logs or validates or saves:
            review(run, *unread)
            unread = None
        if logs:
            monitor.log_step(step, plan.epoch(step), plan.tokens(step), *result.numbers(), rate)
        if validates:
            validate(run, step, display)
        if saves:
            save_checkpoint(run, step, last=over or stopping)
        bar.advance(1, monitor.facts(run.progress.loss_average, rate))
    bar.close()
    if over and step == began and (run.folder / "final/model.safetensors").exists():
        monitor.line(f"This run is complete: {step:,} steps. Train on with a higher --max-steps or --max-epochs.")
    elif over:
        guarded(run, f"{run.folder}/final", lambda: save_model(run.folder / "final", run.model, run.tokenizer), True)
        monitor.line(f"Done: {step:,} steps in {monitor.seconds / 60:.1f} minutes.")
    return Outcome(run.folder, over, step, run.progress.best_loss)


def review(run: Run, step: int, result: StepResult) -> None:
    """Look at a step's numbers: note one that was skipped or that jumped, and end a run that learns nothing.

    Raises:
        RunError: `max_bad_steps` in a row had no finite loss or gradient.
    """
    progress, training = run.progress, run.config.training
    loss, norm = result.numbers()
    if math.isfinite(loss) and math.isfinite(norm):
        average = progress.loss_average
        if average is not None and loss > average + SPIKE:
            run.monitor.log_spike(step, loss, average)
        average = loss if average is None else AVERAGE_DECAY * average + (1 - AVERAGE_DECAY) * loss
        run.progress = dataclasses.replace(progress, bad_steps=0, loss_average=average)
        return
    bad_steps = progress.bad_steps + 1
    run.progress = dataclasses.replace(progress, bad_steps=bad_steps)
    per_step = run.plan.windows_per_step
    run.monitor.log_skipped(step, loss, norm, run.window_numbers((step - 1) * per_step, per_step))
    if bad_steps > training.max_bad_steps:  # on all ranks alike
        before = [at for at in checkpoint.all_checkpoints(run.folder) if checkpoint.step_of(at) <= step - bad_steps]
        start = f"--resume {before[-1]}" if before else f"--config {run.folder / run_folder.SETTINGS}"
        newest = before and not checkpoint.later_than(run.folder, checkpoint.step_of(before[-1]))
        way_back = f"mlx-gpt train {start}{'' if newest else ' --overwrite'}"
        raise RunError(
            f"{bad_steps} steps in a row had no finite loss or gradient, and changed nothing. Likely causes: a "
            f"learning rate that is too high (it was {training.learning_rate:g}), bfloat16 (try --precision float32), "
            "or weights that had grown too large before. Go back with: "
            f"{way_back} --learning-rate {training.learning_rate / 3:.1g}"
        )


def validate(run: Run, step: int, display: Display) -> None:
    """Evaluate, log it, and keep the weights if they are the best so far."""
    started = time.perf_counter()
    bar = display.bar("Evaluating", run.evaluate.windows, unit="window")
    evaluation = run.evaluate(bar.advance)
    bar.close()
    best = run.progress.best_loss
    is_best = math.isfinite(evaluation.loss) and (best is None or evaluation.loss < best)
    run.monitor.log_validation(step, run.plan.epoch(step), run.plan.tokens(step), evaluation, is_best)
    if is_best:
        run.progress = dataclasses.replace(run.progress, best_loss=evaluation.loss)
        guarded(run, f"{run.folder}/best", lambda: save_model(run.folder / "best", run.model, run.tokenizer))
    run.monitor.aside(started)


def save_checkpoint(run: Run, step: int, last: bool) -> None:
    """Save all that is needed to go on from `step`; `last` when training ends here."""
    started = time.perf_counter()
    run.progress = dataclasses.replace(run.progress, step=step, seconds=run.monitor.seconds)

    def save() -> None:
        keep = run.config.training.keep_checkpoints
        checkpoint.save(run.folder, run.model, run.tokenizer, run.step.optimizer_state, run.progress, keep)
        run.failed_saves = 0

    guarded(run, f"the checkpoint of step {step:,}", save, last)
    run.monitor.aside(started)


def guarded(run: Run, what: str, save: Callable[[], object], last: bool = False) -> None:
    """Save on rank 0, and train on if that fails, as it does on a full disk: what was saved before is still there.

    Raises:
        RunError: saving has failed for the third time since it last went well, or it was the `last` of the run.
    """
    if not run.ranks.first:
        return
    try:
        save()
    except OSError as error:
        run.failed_saves += 1
        why = error.strerror or str(error)
        sound = checkpoint.all_checkpoints(run.folder)
        newest = f"the newest checkpoint is {sound[-1]}" if sound else "there is no checkpoint yet"
        if last or run.failed_saves >= MAX_FAILED_SAVES:
            raise RunError(
                f"{what} could not be saved ({why}){'' if last else ', the third failure'}; training ends, {newest}. "
                f"Make room, then go on with: mlx-gpt train --resume {run.folder}"
            ) from None
        run.monitor.line(
            f"WARNING: {what} could not be saved ({why}); {newest}. Training goes on: make room, for after "
            f"{MAX_FAILED_SAVES} failures it ends."
        )
