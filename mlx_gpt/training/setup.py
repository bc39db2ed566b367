"""Turns settings into a run that is ready to train.

`set_up` goes step by step: settings, folder, text, tokenizer, tokens, model. Rank 0 decides, and the other ranks get
its decisions. Nothing in the run's folder changes before `take_folder`.
"""

import contextlib
import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_gpt import models
from mlx_gpt.chat_template import chatml
from mlx_gpt.config import Config, TrainingConfig
from mlx_gpt.data import hub
from mlx_gpt.data.corpus import Corpus, open_corpus
from mlx_gpt.data.tokens import Tokens, get_tokenizer, lost_text
from mlx_gpt.device import device
from mlx_gpt.distributed import Ranks, join
from mlx_gpt.errors import UserError, typed
from mlx_gpt.models.tokenizer_files import read_tokenizer
from mlx_gpt.objectives import OBJECTIVES
from mlx_gpt.progress import Display, Lines
from mlx_gpt.settings import build, flat, resolve
from mlx_gpt.tokenizer import Tokenizer
from mlx_gpt.tokenizer_training import END_OF_TURN, START_OF_TURN
from mlx_gpt.training import checkpoint, fine_tuning, reporters, run_folder, run_settings
from mlx_gpt.training.checkpoint import Progress
from mlx_gpt.training.lock import Lock
from mlx_gpt.training.metrics import Monitor
from mlx_gpt.training.network import make_model
from mlx_gpt.training.run import Run


@dataclass(frozen=True)
class Resumed:
    """The settings of a run, and the checkpoint to resume it from, if there is one."""

    config: Config
    source: Path | None
    progress: Progress
    damaged: dict[Path, str]


def set_up(
    settings: Mapping[str, Any],
    display: Display,
    file: str | Path | None = None,
    resume: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Run:
    """Check everything that can be checked before the run's folder is touched. Arguments as in `loop.train`.

    Raises:
        UserError: a setting, the data or a folder cannot be used.
    """
    with contextlib.ExitStack() as resources:
        ranks = resources.enter_context(join())
        begun = Resumed(Config(), None, Progress(), {})
        if ranks.first:
            with contextlib.ExitStack() as locks:
                begun = open_run(settings, file, resume, overwrite, locks, display)
                if not dry_run:  # a dry run changes nothing, and must leave no folder however it ends
                    resources.enter_context(locks.pop_all())
        config: Config = build(Config, ranks.broadcast(flat(begun.config)))
        config = dataclasses.replace(config, training=share_out(config.training, ranks.size))
        here = device().share_host(ranks.number_here, ranks.here)
        here.prepare()

        corpus = ranks.in_turns(lambda: open_data(config, display))
        if hub.is_hub_name(config.init_from) and ranks.broadcast(begun.source is None):  # the other hosts lack it
            downloading = display.progress("Downloading")
            ranks.in_turns(lambda: hub.model(config.init_from, echo=display.line, progress=downloading))
        base = fine_tuning.base_of(config, resumes=bool(resume))
        weights = begun.source or fine_tuning.start_of(config, base)
        known = ranks.broadcast(begun.progress.base)
        fingerprint = ranks.in_turns(lambda: fine_tuning.fingerprint(base, known))
        base_of_rank_0 = ranks.broadcast(fingerprint)
        ranks.in_turns(lambda: check_same_base(base, fingerprint, base_of_rank_0))
        chosen = choose_tokenizer(config, weights, corpus, display) if ranks.first else None
        tokenizer = receive_tokenizer(ranks, chosen)
        objective, training = OBJECTIVES[corpus.kind], config.training
        encoding = display.progress("Encoding")
        tokens = ranks.in_turns(lambda: objective.encode(corpus, tokenizer, training, encoding, display.line))
        context = config.model.n_positions if config.init_from else 0
        windows = objective.windows(tokens, "train", training.seq_len, training.seed, context)
        val_windows = objective.windows(tokens, "val", training.seq_len, context=context)
        lost = lost_text([tokens.train, tokens.val], tokenizer)
        for line in [*lost, *windows.warnings, *val_windows.warnings]:
            display.line(line)
        check_fingerprint(config, tokens, begun.progress)
        of_rank_0 = ranks.broadcast(tokens.fingerprint)
        ranks.in_turns(lambda: check_same_text(config, tokens, of_rank_0))

        model = make_model(config, weights, tokenizer, base, here, ranks)
        # The tokenizer may have fewer entries than were asked for; run.toml keeps the number that was asked for.
        shape = dataclasses.replace(config.model, vocab_size=models.vocab_size(model))
        progress = Progress(**ranks.broadcast(dataclasses.asdict(begun.progress)))
        return Run(
            settings=config,
            config=dataclasses.replace(config, model=shape),
            device=here,
            tokenizer=tokenizer,
            tokens=tokens,
            windows=windows,
            val_windows=val_windows,
            model=here.accelerate(model),
            objective=here.accelerate(objective()),
            progress=dataclasses.replace(progress, fingerprint=tokens.fingerprint, base=fingerprint),
            source=begun.source,
            damaged=begun.damaged,
            resumes=bool(resume),
            resources=resources.pop_all(),
            ranks=ranks,
        )


def open_run(
    settings: Mapping[str, Any],
    file: str | Path | None,
    resume: str | None,
    overwrite: bool,
    resources: contextlib.ExitStack,
    display: Display,
) -> Resumed:
    """Resolve the settings, choose the folder and keep it locked with `resources`.

    Raises:
        UserError: a setting is wrong, the folder is taken, or there is no checkpoint to resume from.
    """
    in_file = run_settings.read_config(file) if file else {}
    if not resume:
        config = resolve(settings, in_file)
        reporters.check(config.training.report_to)
        resources.enter_context(run_folder.claim(Path(config.out), overwrite))
        if hub.is_hub_name(config.init_from):
            open_data(config, display)  # so that a mistake there is found before a long download
            # run.toml names the commit, so that the run can be repeated.
            pinned = hub.model(config.init_from, echo=display.line, progress=display.progress("Downloading"))[1]
            config = dataclasses.replace(config, init_from=pinned)
        if config.init_from:
            config = fine_tuning.settle(config, in_file | dict(settings))
            for needed in (run_folder.model_directory(Path(config.init_from)), fine_tuning.base_of(config, False)):
                if needed:
                    run_folder.check_kept(needed, Path(config.out))
        return Resumed(config, None, Progress(), {})
    given = in_file | dict(settings)
    folder, chosen = run_folder.run_to_resume(resume, given)
    config = run_settings.resumed_config(folder, given)
    reporters.check(config.training.report_to)
    resources.enter_context(Lock(folder))
    if overwrite and not chosen:
        raise UserError("--overwrite works with --resume only if --resume names a checkpoint to go back to.")
    return Resumed(config, *find_checkpoint(folder, chosen, overwrite))


def share_out(training: TrainingConfig, ranks: int) -> TrainingConfig:
    """Return the settings for this many ranks, which share the windows of each step.

    Raises:
        UserError: the ranks can't share the windows evenly.
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
    """Return the checkpoint to resume from, its progress, and the newer ones that are damaged, each with its fault.

    The checkpoint is None if the run was stopped before its first one, so that nothing it learned was saved.

    Raises:
        UserError: the chosen one is damaged or, without `overwrite`, not the newest; or none of them is intact; or
            there are weights, which a run that starts from the beginning would replace.
    """
    if chosen:
        progress = checkpoint.read_progress(chosen)
        later = checkpoint.later_than(folder, progress.step)
        if later and not overwrite:
            raise UserError(
                f"{folder} reaches step {checkpoint.step_of(later[-1]):,}: --overwrite drops everything after step "
                f"{progress.step:,}; to keep it, copy the run's folder and go back in the copy."
            )
        return chosen, progress, {}
    found, damaged = checkpoint.newest_sound(folder)
    if found:
        return *found, damaged
    weights = checkpoint.trained_weights(folder)
    if damaged or weights:
        settings = "train", "--config", folder / run_folder.SETTINGS
        again = f"replace it with `{typed(*settings, '--overwrite')}`"
        if weights:
            named = folder if folder.name else folder.resolve()  # "." has no name
            other = typed(*settings, "--from", weights[0], "--out", named.with_name(f"{named.name}-2"))
            again = f"start another run from its weights with `{other}`, or {again}"
        sentence = f"{folder} has {'no intact' if damaged else 'no'} checkpoint, so it can't be resumed: {again}."
        raise UserError("\n".join([*damaged.values(), sentence]))
    return None, Progress(), {}


def open_data(config: Config, display: Display) -> Corpus:
    """Return the corpus that the settings name, and prepare it first if necessary.

    Raises:
        UserError: the text can't be read or is missing, or the corpus holds preferences.
    """
    data = config.data
    corpus = open_corpus(
        data.data,
        column=data.column,
        documents=data.documents,
        val_fraction=data.val_fraction,
        echo=display.line,
        progress=display.progress("Preparing"),
    )
    if corpus.kind == "preferences":
        raise UserError(
            f"{data.data} holds preferences, and mlx-gpt does not train on preferences: name other data with --data, "
            "or prepare one column of your files as documents, with --column."
        )
    return corpus


def choose_tokenizer(config: Config, weights: Path | None, corpus: Corpus, display: Display) -> Tokenizer:
    """The tokenizer in the model directory `weights`, or else the one that the settings name.

    For conversations it has a chat template: the template of `weights`, or ChatML.

    Raises:
        UserError: the file is missing, is not a tokenizer, or differs from the one that `weights` were trained with.
    """
    if weights:
        tokenizer = read_tokenizer(weights)
    else:
        progress = display.progress("Training a tokenizer")
        tokenizer = get_tokenizer(config.data.tokenizer, config.model.vocab_size, corpus, display.line, progress)
    if corpus.kind == "conversations" and not tokenizer.chat:
        tokenizer.converse(chatml(tokenizer))
        if weights and tokenizer.added:
            display.line(
                f"{weights} has no chat template: it gets ChatML and the tokens {START_OF_TURN}, {END_OF_TURN}."
            )
    return tokenizer


def receive_tokenizer(ranks: Ranks, tokenizer: Tokenizer | None) -> Tokenizer:
    """Return rank 0's tokenizer on every rank."""
    state: Any = ranks.broadcast(tokenizer.state() if tokenizer else None)
    return tokenizer or Tokenizer.from_state(state)


def check_fingerprint(config: Config, tokens: Tokens, progress: Progress) -> None:
    """Make sure that the text is the one that the run was trained on.

    Raises:
        UserError: it is a different text.
    """
    if progress.fingerprint and progress.fingerprint != tokens.fingerprint:
        raise UserError(
            f"The text in {config.data.data} is not what {config.out} was trained on: name that text with --data, or "
            "start another run with another --out."
        )


def check_same_text(config: Config, tokens: Tokens, of_rank_0: str) -> None:
    """Make sure that this rank has the text of rank 0.

    Raises:
        UserError: it has a different text.
    """
    if tokens.fingerprint != of_rank_0:
        raise UserError(f"The text in {config.data.data} on this host differs from rank 0's: copy rank 0's text here.")


def check_same_base(base: Path | None, fingerprint: str, of_rank_0: str) -> None:
    """Make sure that this rank has the frozen weights of rank 0, because ranks share only the trained parameters.

    Raises:
        UserError: the weights differ.
    """
    if fingerprint != of_rank_0:
        raise UserError(f"The weights in {base} on this host differ from rank 0's: copy rank 0's weights here.")


def take_folder(run: Run, display: Display) -> None:
    """Make the run's folder ready for training and begin its logs. From here on, files change."""
    if run.ranks.first:
        _clear_and_write(run, display)
        _open_logs(run, display)
    else:
        run.monitor = Monitor(None, Lines())
    run.best_loss = run.ranks.broadcast(run.best_loss)


def _clear_and_write(run: Run, display: Display) -> None:
    out, step = run.folder, run.progress.step
    if run.resumes and not run.source:
        display.line(f"{out} has no checkpoint yet: training starts from the beginning.")
    if not run.source:
        run_folder.clear(out, keep_base=run.resumes)
    checkpoint.remove_unfinished(out)
    for folder, why in run.damaged.items():
        aside = checkpoint.set_aside(folder)
        display.line(f"{why} It is set aside as {aside.name}, and an earlier one is used.")
    if checkpoint.later_than(out, step):  # with --overwrite
        checkpoint.remove_after(out, step)
    checkpoint.remove_older(out, step, run.training.keep_checkpoints)  # which a kill may have prevented
    run_settings.write_settings(run.settings)
    if run.config.lora.lora_rank:
        run.model.base = run_folder.keep_base(out, Path(run.model.base))
    best = checkpoint.best_model(out)
    run.best_loss = best[1] if best else None


def _open_logs(run: Run, display: Display) -> None:
    resumed_at = run.progress.step if run.source else None
    run.monitor = monitor = Monitor(run.folder, display, run.progress.seconds, resumed_at)
    run.resources.callback(monitor.close)
    listeners = reporters.Reporters(run.config, resumed_at, monitor.line)
    monitor.listen(run.resources.enter_context(contextlib.closing(listeners)).record)
    if run.source:
        monitor.line(f"Resuming from {run.source}, after step {run.progress.step}.")
    for line in run.plan.lines():
        monitor.line(line)
