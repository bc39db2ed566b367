"""From settings to a run that is ready to train."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_gpt import backend
from mlx_gpt.config import Config, DataConfig, ModelConfig, read_toml, resolve, write_toml
from mlx_gpt.data.batches import training_batches, window_numbers
from mlx_gpt.data.corpus import Corpus, open_corpus
from mlx_gpt.data.tokens import Tokens, check_windows, get_tokenizer, tokenize
from mlx_gpt.errors import UserError
from mlx_gpt.evaluation import Evaluator
from mlx_gpt.model import GPT
from mlx_gpt.tokenizer import Tokenizer
from mlx_gpt.training import checkpoint, memory, reporters
from mlx_gpt.training import run as run_folder
from mlx_gpt.training.checkpoint import Progress
from mlx_gpt.training.monitor import Display, Monitor, improved_after
from mlx_gpt.training.plan import Plan, make_plan
from mlx_gpt.training.run import Lock
from mlx_gpt.training.step import TrainingStep
from mlx_gpt.weights import load_model


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
    window_numbers: Callable[[int, int], list[int]]
    monitor: Monitor
    progress: Progress
    resources: contextlib.ExitStack
    failed_saves: int = 0

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return Path(self.config.out)

    def close(self) -> None:
        """Close the logs and let others into the folder."""
        self.resources.close()


def set_up(
    settings: Mapping[str, Any],
    display: Display,
    file: str | Path | None = None,
    resume: str | None = None,
    overwrite: bool = False,
    network: Callable[[ModelConfig], GPT] = GPT,
) -> Run:
    """Check everything, and only then touch the run's folder. Arguments as in `loop.train`.

    Args:
        network: makes the model from its shape; another one than `GPT` has to have its parameters.

    Raises:
        UserError: a setting, the data or a folder is not fit for it, or memory or disk are too small.
    """
    with contextlib.ExitStack() as resources:
        start = check(settings, display, file, resume, overwrite, resources)
        if start.problem:
            raise UserError(start.problem)
        config, tokenizer, tokens, progress = start.plan.config, start.tokenizer, start.tokens, start.progress
        training, out = config.training, Path(config.out)

        model = network(config.model).init_weights(training.seed)
        dtype = backend.compute_dtype(training.precision, start.plan.device)
        step = TrainingStep(model, training, dtype)
        if start.source:
            model.update(load_model(start.source).parameters())
            step.optimizer_state = checkpoint.load_optimizer(start.source, step.optimizer_state)

        # From here on the folder is touched.
        if not resume:
            run_folder.check_free(out, overwrite)  # again, for preparing a text can take a while
            resources.enter_context(Lock(out))
        if not start.source:
            run_folder.clear(out)
        checkpoint.remove_unfinished(out)
        for folder, why in start.damaged.items():
            aside = checkpoint.set_aside(folder)
            display.line(f"{why} It is set aside as {aside.name}, and an earlier one is taken.")
        if checkpoint.later_than(out, progress.step):  # with --overwrite
            checkpoint.remove_after(out, progress.step, improved_after(out, progress.step, progress.best_loss))
        checkpoint.remove_older(out, progress.step, training.keep_checkpoints)  # a kill may have come before that
        if not (out / "best").exists():
            progress = dataclasses.replace(progress, best_loss=None)
        write_toml(start.settings, out / run_folder.SETTINGS)
        resumed_at = progress.step if start.source else None
        monitor = Monitor(out, display, progress.seconds, resumed_at)
        resources.callback(monitor.close)
        told = resources.enter_context(contextlib.closing(reporters.Reporters(config, resumed_at, monitor.line)))
        monitor.listen(told.record)
        if start.source:
            monitor.line(f"Going on from {start.source}, after step {progress.step}.")
        for line in start.plan.lines():
            monitor.line(line)
        return Run(
            config=config,
            plan=start.plan,
            model=model,
            tokenizer=tokenizer,
            step=step,
            evaluate=Evaluator(
                model,
                tokens.val,
                tokenizer.byte_lengths(),
                seq_len=training.seq_len,
                batch_size=training.batch_size,
                limit=training.eval_windows,
                dtype=dtype,
            ),
            batches=training_batches(
                tokens.train,
                training.seq_len,
                training.batch_size,
                training.seed,
                start=progress.step * start.plan.windows_per_step,
            ),
            window_numbers=functools.partial(window_numbers, tokens.train, training.seq_len, training.seed),
            monitor=monitor,
            progress=progress,
            resources=resources.pop_all(),
        )


def dry_run(
    settings: Mapping[str, Any],
    display: Display,
    file: str | Path | None = None,
    resume: str | None = None,
    overwrite: bool = False,
) -> None:
    """What `set_up` would begin, checked in the same way, with the run's folder left as it is.

    Raises:
        UserError: as `set_up`; where memory is too small, the plan is shown before.
    """
    with contextlib.ExitStack() as resources:
        start = check(settings, display, file, resume, overwrite, resources)
        for line in start.plan.lines():
            display.line(line)
        if start.problem:
            raise UserError(start.problem)


@dataclass(frozen=True)
class Start:
    """A run that has been checked.

    Attributes:
        settings: what run.toml keeps.
        source: the checkpoint to go on from.
        damaged: newer ones, and what is wrong with them.
        problem: why it does not fit in memory, and what would.
    """

    settings: Config
    plan: Plan
    tokenizer: Tokenizer
    tokens: Tokens
    source: Path | None
    progress: Progress
    damaged: dict[Path, str]
    problem: str


def check(
    settings: Mapping[str, Any],
    display: Display,
    file: str | Path | None,
    resume: str | None,
    overwrite: bool,
    resources: contextlib.ExitStack,
) -> Start:
    """Read what the settings name and see whether it can be trained; a run to go on with stays locked by `resources`.

    Raises:
        UserError: as `set_up`.
    """
    source, progress = None, Progress()
    damaged: dict[Path, str] = {}
    if resume:
        given = (read_toml(file) if file else {}) | dict(settings)
        folder, source = run_folder.run_to_resume(resume, given)
        config = run_folder.resumed_config(folder, given)
        reporters.check(config.training.report_to)
        resources.enter_context(Lock(folder))
        if overwrite and not source:
            raise UserError(
                "--resume and --overwrite go together only where --resume names a checkpoint to go back to."
            )
        source, progress, damaged = find_checkpoint(folder, source, overwrite)
        if not source:
            display.line(f"{folder} has no checkpoint yet: it starts from the beginning.")
    else:
        config = resolve(settings, file)
        reporters.check(config.training.report_to)
        run_folder.check_free(Path(config.out), overwrite)
    device = backend.device()
    backend.prepare(device)
    tokenizer, tokens = read_text(config, source, display)
    if source and progress.fingerprint != tokens.fingerprint:
        raise UserError(f"The text in {config.data.data} is not what {config.out} was trained on: start another run.")
    progress = dataclasses.replace(progress, fingerprint=tokens.fingerprint)

    # The tokenizer may be smaller than was asked for; run.toml keeps what was asked.
    shape = dataclasses.replace(config.model, vocab_size=tokenizer.vocab_size)
    problem = ""
    if not resume:
        training, problem = memory.fit(shape, config.training, device)
        config = dataclasses.replace(config, training=training)
    plan = make_plan(dataclasses.replace(config, model=shape), tokens, device)
    if progress.step > plan.total_steps:
        raise UserError(
            f"{config.out} is at step {progress.step:,} already, beyond the {plan.total_steps:,} that it would end at: "
            "give more with --max-steps or --max-epochs."
        )
    run_folder.check_room(Path(config.out), plan.n_params, overwrite)
    return Start(config, plan, tokenizer, tokens, source, progress, damaged, problem)


def find_checkpoint(
    folder: Path, chosen: Path | None, overwrite: bool
) -> tuple[Path | None, Progress, dict[Path, str]]:
    """The checkpoint to go on from, how far it is, and newer ones that are damaged, with what is wrong with them.

    There is none when the run was stopped before its first.

    Raises:
        UserError: the chosen one is damaged or, without `overwrite`, not the newest; or none of them is sound.
    """
    if chosen:
        progress = checkpoint.read_progress(chosen)
        later = checkpoint.later_than(folder, progress.step)
        if later and not overwrite:
            raise UserError(
                f"{folder} goes on to step {checkpoint.step_of(later[-1]):,}: --overwrite drops what came after step "
                f"{progress.step:,}; to keep it, copy the run's folder and go back in the copy."
            )
        return chosen, progress, {}
    found, damaged = checkpoint.newest_sound(folder)
    if found:
        return *found, damaged
    if damaged:
        raise UserError(
            "\n".join([*damaged.values(), f"No checkpoint in {folder} is sound: --overwrite starts again."])
        )
    return None, Progress(), {}


def read_text(config: Config, source: Path | None, display: Display) -> tuple[Tokenizer, Tokens]:
    """The tokenizer, that of the checkpoint `source` if there is one, and the tokens to train on.

    Raises:
        UserError: the text can't be read, or is too short.
    """
    corpus = open_data(config.data, display)
    if source:
        tokenizer = Tokenizer.load(source)
    else:
        tokenizer = get_tokenizer(config.data.tokenizer, config.model.vocab_size, corpus, display.line)
    tokens = tokenize(corpus, tokenizer, display.progress("Encoding"))
    check_windows(tokens, config.training.seq_len)
    return tokenizer, tokens


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
