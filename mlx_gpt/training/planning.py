"""Plans a run by its measured memory and time: chooses the batch, and refuses a run that does not fit."""

import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

from mlx_gpt import models
from mlx_gpt.config import Config, TrainingConfig
from mlx_gpt.device import Device
from mlx_gpt.errors import UserError
from mlx_gpt.models import lora
from mlx_gpt.models.base import set_dropout
from mlx_gpt.progress import Display
from mlx_gpt.training import checkpoint, run_folder
from mlx_gpt.training.memory import Estimate, Line, bytes_of, held_bytes, measure
from mlx_gpt.training.plan import FEW_STEPS, HEADROOM, Plan, in_words
from mlx_gpt.training.run import Run

EPOCHS = 10  # the length of a run for which no limit is set
OFTEN, DROPOUT = 10, 0.1  # with more epochs than this, `--dropout auto` drops this fraction
SHORTEST = 128  # windows that a suggestion cuts no shorter
CHOSEN = ("batch_size", "gradient_accumulation_steps", "grad_checkpoint", "auto_batch_size")


def plan_run(run: Run, make_step: Callable[..., Any], display: Display, *, show: bool, ignore_memory: bool) -> None:
    """Measure the run, choose its batch if the user left that to us, and refuse a run that does not fit.

    Args:
        make_step: as in `loop`.
        show: show the plan.
        ignore_memory: plan the run even if it does not fit.

    Raises:
        UserError: it does not fit, or the disk has no room, or the run is over; the sentence says what to change.
    """
    lines: dict[tuple[int, bool, int], Line | None] = {}
    if run.config.model.auto_dropout and not run.config.lora.lora_rank:
        set_dropout(run.model, DROPOUT)  # dropout takes memory and time, and the time may decide about it

    def estimate(training: TrainingConfig) -> Estimate | None:
        key = training.seq_len, training.grad_checkpoint, min(2, training.micro_steps)
        if not lines:
            display.line("Measuring the memory and time that a few steps take ...")
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
    if problem and (windows := training.windows_per_step) > run.windows.per_epoch:
        problem = (
            f"A step of {windows:,} windows is more than the whole text has: use a lower --batch-size or fewer "
            "--gradient-accumulation-steps. It does not fit into memory, either."
        )
    training = dataclasses.replace(training, **run.ranks.broadcast({name: getattr(training, name) for name in CHOSEN}))
    run.config = dataclasses.replace(run.config, training=training)
    run.settings = dataclasses.replace(run.settings, training=training)
    found = estimate(training)
    # Ranks may measure different times, but must have one schedule.
    step_seconds = run.ranks.broadcast(found.step_seconds if found else None)
    run.plan = make_plan(run, found.peak if found else None, step_seconds)
    if run.config.model.auto_dropout:
        choose_dropout(run)
    if show:
        for line in run.plan.lines():
            display.line(line)
    if not ignore_memory:
        run.ranks.in_turns(lambda: _refuse(problem))
    if run.progress.step > run.plan.total_steps:
        raise UserError(
            f"{run.folder} is already at step {run.progress.step:,}, beyond step {run.plan.total_steps:,}, at which it "
            f"would end: raise {' and '.join(run.plan.reached(run.progress.step))}."
        )
    if run.ranks.first:
        _check_disk(run)


def _check_disk(run: Run) -> None:
    """Make sure that the disk has room for all that the run keeps at one time.

    Raises:
        UserError: it has too little.
    """
    training, steps = run.training, run.plan.total_steps - run.plan.first_step
    # The first evaluation of a run saves a checkpoint as well.
    saves = math.ceil(steps / training.save_every) + (not run.resumes and training.eval_every < training.save_every)
    if run.resumes:
        saves += len(checkpoint.all_checkpoints(run.folder))
    weights, gradients, state = held_bytes(run)
    small = len(run.tokenizer.to_json().encode()) + checkpoint.SMALL_FILES
    saved = weights
    if lora.adapted_layers(run.model):  # models are written whole and unpacked, checkpoints only have the adapters
        weights, saved = bytes_of(lora.without_adapters(run.model).parameters()), gradients
    run_folder.check_room_for_run(
        run.folder, weights + small, saved + state + small, min(saves, training.keep_checkpoints + 1)
    )


def _refuse(problem: str) -> None:
    if problem:
        raise UserError(f"{problem} --ignore-memory starts it anyway.")


def fit(
    training: TrainingConfig, estimate: Callable[[TrainingConfig], Estimate | None], device: Device
) -> tuple[TrainingConfig, str]:
    """Return the settings to train with on `device`, and what is wrong with them: "" if they fit.

    These are the given settings. If the batch was left to us, this chooses it, and whether to compute activations
    twice.

    Args:
        estimate: returns what settings take; None if it is not even safe to try them.
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
    return asked, f"{problem} No batch of this model fits: take a smaller model, or free some memory."


def changes(training: TrainingConfig) -> Iterator[TrainingConfig]:
    """Yield ways to take less memory, cheapest first; the windows per step stay the same.

    Smaller micro-batches change only the time; computing activations twice takes a third more time; shorter windows
    change what is learned.
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
    """Return the command-line flags that turn `before` into `after`."""
    words = []
    for name in ("batch_size", "gradient_accumulation_steps", "grad_checkpoint", "seq_len"):
        value = getattr(after, name)
        if value != getattr(before, name):
            words.append(f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}"))
    return " ".join(words)


def make_plan(run: Run, peak: int | None, step_seconds: float | None) -> Plan:
    """Work out the size of a `Run`."""
    training = run.training
    per_step = training.windows_per_step
    per_epoch = run.windows.per_epoch
    default_epochs = max(EPOCHS, FEW_STEPS * per_step / per_epoch) if run.config.init_from else EPOCHS
    epochs = training.max_epochs or (math.inf if training.max_minutes else default_epochs)
    ends = {"--max-steps": training.max_steps or sys.maxsize}
    if epochs < math.inf:
        ends["--max-epochs"] = math.ceil(epochs * per_epoch / per_step)
    total_steps = min(ends.values())
    scheduled_steps = min(total_steps, math.ceil((training.max_epochs or default_epochs) * per_epoch / per_step))
    if training.max_minutes and step_seconds:
        scheduled_steps = max(1, min(total_steps, round(60 * training.max_minutes / step_seconds)))
    return Plan(
        config=run.config,
        device=run.device,
        n_params=models.n_params(run.model),
        n_trained=models.n_trained(run.model),
        sizes=models.describe(run.model) + (f", from {run.config.init_from}" if run.config.init_from else ""),
        train_tokens=len(run.tokens.train),
        val_tokens=len(run.tokens.val),
        windows_per_step=per_step,
        windows_per_epoch=per_epoch,
        total_steps=total_steps,
        limits=ends,
        scheduled_steps=scheduled_steps,
        first_step=run.progress.step,
        peak=peak,
        step_seconds=step_seconds,
        ranks_here=run.ranks.here,
        facts=tuple(run.windows.facts),
        extra=tuple(lora.fully_trained(run.model)) if run.config.lora.lora_rank else (),
    )


def choose_dropout(run: Run) -> None:
    """Drop activations if the text is read so often that the model would learn it by heart (benchmarks/NOTES.md).

    This does not change runs that train adapters, because adapters have a dropout of their own.
    """
    often = round(run.plan.epochs) > OFTEN and not run.config.lora.lora_rank

    def chosen(config: Config) -> Config:
        model = dataclasses.replace(config.model, dropout=DROPOUT if often else 0.0, auto_dropout=False)
        return dataclasses.replace(config, model=model)

    run.config, run.settings = chosen(run.config), chosen(run.settings)
    run.plan = dataclasses.replace(run.plan, config=run.config)
    if not run.config.lora.lora_rank:
        set_dropout(run.model, run.config.model.dropout)
