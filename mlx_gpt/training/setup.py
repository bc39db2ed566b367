"""From settings to a run that is ready to train."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from tokenizers import Tokenizer as HFTokenizer

from mlx_gpt import backend
from mlx_gpt.config import Config, DataConfig, ModelConfig, TrainingConfig
from mlx_gpt.data.batches import Part, training_batches, window_numbers
from mlx_gpt.data.corpus import Corpus, open_corpus
from mlx_gpt.data.tokens import Tokens, check_windows, get_tokenizer, tokenize
from mlx_gpt.distributed import ALONE, Ranks, join
from mlx_gpt.errors import UserError
from mlx_gpt.evaluation import Evaluator
from mlx_gpt.model import GPT
from mlx_gpt.models.directory import load_model
from mlx_gpt.progress import Display, Lines
from mlx_gpt.settings import build, flat, read_toml, resolve, write_toml
from mlx_gpt.tokenizer import Tokenizer
from mlx_gpt.training import checkpoint, memory, reporters, run_folder
from mlx_gpt.training.checkpoint import Progress
from mlx_gpt.training.metrics import Monitor, improved_after
from mlx_gpt.training.plan import Plan, make_plan
from mlx_gpt.training.run_folder import Lock
from mlx_gpt.training.step import TrainingStep


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
    ranks: Ranks = ALONE
    failed_saves: int = 0

    @property
    def folder(self) -> Path:
        """Where it is written."""
        return Path(self.config.out)

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *exception: Any) -> None:
        """Close the logs and let others into the folder; an error ends all ranks."""
        self.resources.__exit__(*exception)


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
        ranks = resources.enter_context(join())
        start = agree_on(ranks, lambda: check(settings, display, file, resume, overwrite, resources, ranks))
        config, tokenizer, tokens = start.plan.config, start.tokenizer, start.tokens
        training = config.training

        model = network(config.model).init_weights(training.seed)
        dtype = backend.compute_dtype(training.precision, start.plan.device)
        step = TrainingStep(model, training, dtype, ranks)
        if start.source:
            # A file has some matrices transposed, and a product with one that lies so in memory may round otherwise.
            model.update(tree_map(mx.contiguous, load_model(start.source).parameters()))
            step.optimizer_state = checkpoint.load_optimizer(start.source, step.optimizer_state)
        model.update(ranks.copy(model.parameters()))
        step.optimizer_state = ranks.copy(step.optimizer_state)

        if ranks.first:
            # From here on the folder is touched.
            progress = take_folder(start, display, overwrite, resources)
            monitor = open_logs(start, progress, display, resources)
        else:
            progress, monitor = start.progress, Monitor(None, Lines())
        progress = Progress(**ranks.broadcast(dataclasses.asdict(progress)))
        part = Part(ranks.rank, ranks.size, start.plan.windows_per_step)
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
                batch_size=training.micro_batch_size,
                limit=training.eval_windows,
                dtype=dtype,
                ranks=ranks,
            ),
            batches=training_batches(
                tokens.train,
                training.seq_len,
                training.micro_batch_size,
                training.seed,
                start=progress.step * start.plan.windows_per_step,
                part=part,
            ),
            window_numbers=functools.partial(window_numbers, tokens.train, training.seq_len, training.seed),
            monitor=monitor,
            progress=progress,
            resources=resources.pop_all(),
            ranks=ranks,
        )


def take_folder(start: "Start", display: Display, overwrite: bool, resources: contextlib.ExitStack) -> Progress:
    """Make the run's folder ready for training, locked by `resources`; how far the run is in it.

    Raises:
        UserError: it is not free.
    """
    out, progress = Path(start.settings.out), start.progress
    if not start.resumes:
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
    keep = start.settings.training.keep_checkpoints
    checkpoint.remove_older(out, progress.step, keep)  # a kill may have come before that
    write_toml(start.settings, out / run_folder.SETTINGS)
    return progress if (out / "best").exists() else dataclasses.replace(progress, best_loss=None)


def open_logs(start: "Start", progress: Progress, display: Display, resources: contextlib.ExitStack) -> Monitor:
    """Begin to tell of the run; `resources` ends it."""
    config = start.plan.config
    resumed_at = progress.step if start.source else None
    monitor = Monitor(Path(config.out), display, progress.seconds, resumed_at)
    resources.callback(monitor.close)
    told = resources.enter_context(contextlib.closing(reporters.Reporters(config, resumed_at, monitor.line)))
    monitor.listen(told.record)
    if start.source:
        monitor.line(f"Going on from {start.source}, after step {progress.step}.")
    for line in start.plan.lines():
        monitor.line(line)
    return monitor


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
        ranks = resources.enter_context(join())
        if not ranks.first:
            return
        start = check(settings, display, file, resume, overwrite, resources, ranks)
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
        resumes: whether it goes on with a run that is there.
    """

    settings: Config
    plan: Plan
    tokenizer: Tokenizer
    tokens: Tokens
    source: Path | None
    progress: Progress
    damaged: dict[Path, str]
    problem: str
    resumes: bool

    def told(self) -> dict[str, Any]:
        """What the other ranks have to know of it, as `follow` takes it."""
        return {
            "settings": flat(self.plan.config),
            "tokenizer": self.tokenizer.to_json(),
            "end_of_text": self.tokenizer.end_of_text,
            "progress": dataclasses.asdict(self.progress),
        }


def agree_on(ranks: Ranks, check: Callable[[], Start]) -> Start:
    """What rank 0 has checked, on all ranks: other hosts have neither the run's folder nor, maybe, the flags' files.

    Raises:
        UserError: it can't be begun, or the text of this host is another one.
    """
    start = check() if ranks.first else None
    if start and start.problem:
        raise UserError(start.problem)
    told = ranks.broadcast(start.told() if start else {})
    return ranks.in_turns(lambda: start or follow(ranks, **told))


def follow(ranks: Ranks, settings: dict[str, Any], tokenizer: str, end_of_text: int, progress: dict) -> Start:
    """The start of a rank that has to follow rank 0, with its own copy of the text."""
    config: Config = build(Config, settings)
    config = dataclasses.replace(config, training=dataclasses.replace(config.training, ranks=ranks.size))
    device = backend.part_of(backend.device(), ranks.here)
    backend.prepare(device)
    theirs = Tokenizer(HFTokenizer.from_str(tokenizer), end_of_text)
    tokens = tokenize(open_data(config.data, Lines()), theirs)
    if tokens.fingerprint != progress["fingerprint"]:
        raise UserError(f"The text in {config.data.data} on this host is not the one of rank 0: copy that here.")
    plan = make_plan(config, tokens, device, ranks.here)
    if not memory.fits(plan.memory, device):
        raise UserError(f"This host is too small for it: {device} can't spare {memory.in_words(plan.memory.peak)}.")
    return Start(config, plan, theirs, tokens, None, Progress(**progress), {}, "", False)


def check(
    settings: Mapping[str, Any],
    display: Display,
    file: str | Path | None,
    resume: str | None,
    overwrite: bool,
    resources: contextlib.ExitStack,
    ranks: Ranks = ALONE,
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
    config = dataclasses.replace(config, training=share_out(config.training, ranks.size))
    device = backend.part_of(backend.device(), ranks.here)
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
    plan = make_plan(dataclasses.replace(config, model=shape), tokens, device, ranks.here)
    if progress.step > plan.total_steps:
        raise UserError(
            f"{config.out} is at step {progress.step:,} already, beyond the {plan.total_steps:,} that it would end at: "
            "give more with --max-steps or --max-epochs."
        )
    run_folder.check_room(Path(config.out), plan.n_params, overwrite)
    return Start(config, plan, tokenizer, tokens, source, progress, damaged, problem, bool(resume))


def share_out(training: TrainingConfig, ranks: int) -> TrainingConfig:
    """The settings for as many ranks, which share the windows of each step.

    Raises:
        UserError: they can't share them evenly.
    """
    windows = training.windows_per_step
    if windows % ranks:
        fewer = next(count for count in range(ranks, 0, -1) if windows % count == 0)
        raise UserError(
            f"{ranks} ranks can't share the {windows} windows of a step evenly: start {fewer} (mlx.launch -n {fewer}), "
            "or begin a run with another --batch-size or --gradient-accumulation-steps."
        )
    return dataclasses.replace(training, ranks=ranks)


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
