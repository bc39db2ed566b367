"""Training from settings to weights. Read `fit` for what happens in what order."""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_gpt import backend
from mlx_gpt.config import Config, DataConfig, resolve, write_toml
from mlx_gpt.data.batches import training_batches
from mlx_gpt.data.corpus import Corpus, open_corpus
from mlx_gpt.data.tokens import check_windows, get_tokenizer, tokenize
from mlx_gpt.errors import UserError
from mlx_gpt.evaluation import Evaluator
from mlx_gpt.model import GPT
from mlx_gpt.tokenizer import Tokenizer
from mlx_gpt.training import checkpoint
from mlx_gpt.training import run as run_folder
from mlx_gpt.training.checkpoint import Progress
from mlx_gpt.training.monitor import Display, Monitor
from mlx_gpt.training.optimizer import learning_rate
from mlx_gpt.training.plan import Plan, make_plan
from mlx_gpt.training.step import TrainingStep
from mlx_gpt.weights import load_model, save_model


@dataclass(frozen=True)
class Outcome:
    """How training ended.

    Attributes:
        finished: false when it was asked to stop; then a checkpoint of `step` is there to resume from.
        best_loss: lowest validation loss, in nats per token.
    """

    folder: Path
    finished: bool
    step: int
    best_loss: float | None


@dataclass
class Run:
    """Everything that training holds while it goes on."""

    config: Config
    plan: Plan
    model: GPT
    tokenizer: Tokenizer
    step: TrainingStep
    evaluate: Evaluator
    batches: Iterator[np.ndarray]
    monitor: Monitor
    progress: Progress

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return Path(self.config.out)


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
        stop_requested: asked after each step; when true, a checkpoint is saved and training ends.

    Raises:
        UserError: a setting, the data or a folder is not fit for it; nothing has been changed then.
    """
    run = set_up(settings, display, file, resume, overwrite)
    try:
        return fit(run, display, stop_requested)
    finally:
        run.monitor.close()


def set_up(
    settings: Mapping[str, Any], display: Display, file: str | Path | None, resume: str | None, overwrite: bool
) -> Run:
    """Check everything, and only then touch the run's folder."""
    if resume:
        folder, source = run_folder.find_resumable(resume, settings, display.line)
        config = run_folder.resumed_config(folder, settings, file)
        progress = checkpoint.read_progress(source)
    else:
        config, source, progress = resolve(settings, file), None, Progress()
        run_folder.check_free(Path(config.out), overwrite)
    training = config.training

    device = backend.device()
    backend.prepare(device)
    dtype = backend.compute_dtype(training.precision, device)
    corpus = open_data(config.data, display)
    if source:
        tokenizer = Tokenizer.load(source)
    else:
        tokenizer = get_tokenizer(config.data.tokenizer, config.model.vocab_size, corpus, display.line)
    tokens = tokenize(corpus, tokenizer, display.progress("Encoding"))
    check_windows(tokens, training.seq_len)
    if source and progress.fingerprint != tokens.fingerprint:
        raise UserError(f"The text in {config.data.data} is not what {config.out} was trained on: start another run.")
    progress = dataclasses.replace(progress, fingerprint=tokens.fingerprint)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size))

    model = load_model(source) if source else GPT(config.model).init_weights(training.seed)
    step = TrainingStep(model, training, dtype)
    if source:
        step.optimizer_state = checkpoint.load_optimizer(source, step.optimizer_state)
    plan = make_plan(config, model, tokens, device)

    if not source:
        run_folder.clear(Path(config.out))
    write_toml(config, Path(config.out) / run_folder.SETTINGS)
    monitor = Monitor(Path(config.out), display, progress.seconds, progress.step if source else None)
    if source:
        monitor.line(f"Going on from {source}, after step {progress.step}.")
    for line in plan.lines():
        monitor.line(line)
    evaluate = Evaluator(
        model,
        tokens.val,
        tokenizer.byte_lengths(),
        seq_len=training.seq_len,
        batch_size=training.batch_size,
        limit=training.eval_windows,
        dtype=dtype,
    )
    batches = training_batches(
        tokens.train,
        training.seq_len,
        training.batch_size,
        training.seed,
        start=progress.step * plan.windows_per_step,
    )
    return Run(config, plan, model, tokenizer, step, evaluate, batches, monitor, progress)


def open_data(data: DataConfig, display: Display) -> Corpus:
    """The corpus that the settings name, prepared if it wasn't yet.

    Raises:
        UserError: it can't be read, or there is nothing in it.
    """
    return open_corpus(
        data.data,
        column=data.column,
        documents=data.documents,
        val_fraction=data.val_fraction,
        echo=display.line,
        progress=display.progress("Preparing"),
    )


def fit(run: Run, display: Display, stop_requested: Callable[[], bool]) -> Outcome:
    """Step, log, evaluate, save, until the steps or the minutes are used up or a stop is asked for."""
    training, plan, monitor = run.config.training, run.plan, run.monitor
    step = run.progress.step

    def is_over() -> bool:
        out_of_time = training.max_minutes is not None and monitor.seconds >= 60 * training.max_minutes
        return step >= plan.total_steps or out_of_time

    bar = display.bar("Training", plan.total_steps, done=step)
    if step == 0:
        validate(run, step, display)
    over, stopping, running = is_over(), False, None
    while not (over or stopping):
        rate = learning_rate(step, plan.total_steps, training)
        result = run.step(step, rate, [next(run.batches) for _ in range(training.gradient_accumulation_steps)])
        if running:
            # Wait for the step before, not for this one: the device always has its next step.
            bar.advance(1, monitor.facts(running.loss.item(), rate))
        running = result
        step += 1
        monitor.count(plan.tokens(1))

        over, stopping = is_over(), stop_requested()
        if step % training.log_every == 0 or over:
            loss, norm = result.loss.item(), result.grad_norm.item()
            monitor.log_step(step, plan.epoch(step), plan.tokens(step), loss, rate, norm)
        if step % training.eval_every == 0 or over:
            validate(run, step, display)
        if step % training.save_every == 0 or over or stopping:
            save_checkpoint(run, step)
    bar.close()
    if over:
        save_model(run.folder / "final", run.model, run.tokenizer)
        monitor.line(f"Done: {step:,} steps in {monitor.seconds / 60:.1f} minutes.")
    return Outcome(run.folder, over, step, run.progress.best_loss)


def validate(run: Run, step: int, display: Display) -> None:
    """Evaluate, log it, and keep the weights if they are the best so far."""
    started = time.perf_counter()
    bar = display.bar("Evaluating", run.evaluate.windows, unit="window")
    evaluation = run.evaluate(bar.advance)
    bar.close()
    best = run.progress.best_loss
    is_best = best is None or evaluation.loss < best
    run.monitor.log_validation(step, run.plan.epoch(step), run.plan.tokens(step), evaluation, is_best)
    if is_best:
        run.progress = dataclasses.replace(run.progress, best_loss=evaluation.loss)
        save_model(run.folder / "best", run.model, run.tokenizer)
    run.monitor.aside(started)


def save_checkpoint(run: Run, step: int) -> None:
    """Save all that is needed to go on from `step`."""
    started = time.perf_counter()
    run.progress = dataclasses.replace(run.progress, step=step, seconds=run.monitor.seconds)
    state = run.step.optimizer_state
    mx.eval(state)
    checkpoint.save(run.folder, run.model, run.tokenizer, state, run.progress, run.config.training.keep_checkpoints)
    run.monitor.aside(started)
