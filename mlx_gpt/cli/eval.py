"""`mlx-gpt eval`."""

from pathlib import Path
from tempfile import TemporaryDirectory

import click

from mlx_gpt.cli.fetching import fetched
from mlx_gpt.cli.options import SettingsCommand, given, settings_options
from mlx_gpt.cli.terminal import Terminal
from mlx_gpt.config import DataConfig
from mlx_gpt.errors import UserError, os_errors_explained
from mlx_gpt.settings import build

LONGEST = 1024  # tokens per window by default, for models whose context is far longer


@click.command("eval", cls=SettingsCommand)
@click.argument("file", required=False)
@click.option(
    "--model",
    metavar="PATH",
    help="A run (its best model), a model directory or hf:owner/name.  [default: the newest run]",
)
@click.option(
    "--seq-len",
    type=int,
    metavar="N",
    help="Tokens per window.  [default: as in training; a model without a run uses its context, up to 1024]",
)
@click.option("--batch-size", type=click.IntRange(min=1), default=8, show_default=True, help="Windows at a time.")
@settings_options(DataConfig, only=("documents", "column"))
def command(file: str | None, model: str | None, seq_len: int | None, batch_size: int, **settings: str) -> None:
    """Measure loss, perplexity and bits per byte on FILE, or on the whole validation text of the model's run.

    The windows of a text do not overlap, and the end-of-text token after each document counts as a token. Each
    conversation is read by itself, and only the answers count, unless the run counted all tokens.
    """
    from mlx_gpt import models
    from mlx_gpt.api import load
    from mlx_gpt.data.batches import TextWindows, Windows
    from mlx_gpt.data.chat_tokens import encode_conversations
    from mlx_gpt.data.hub import is_hub_name
    from mlx_gpt.data.packing import PackedWindows
    from mlx_gpt.data.sources import is_model, kind_in
    from mlx_gpt.data.tokens import encode_file, lost_text
    from mlx_gpt.evaluation import Evaluator
    from mlx_gpt.objectives import OBJECTIVES
    from mlx_gpt.training import run_folder, run_settings
    from mlx_gpt.training.setup import open_data

    display = Terminal()
    if file:
        with os_errors_explained(f"read {file}"):
            Path(file).stat()
        if is_model(Path(file)):
            raise UserError(f"{file} is a model, not a text: name it with --model, and a text as FILE.")
    elif is_hub_name(model):
        raise UserError(f"{model} is not a run, so it has no validation text: name a FILE.")
    path = Path(fetched(model)) if model else run_folder.newest_run(Path("weights"), with_model=True)
    network, tokenizer = load(path)
    config = run_settings.config_of(path)
    positions = models.context_length(network)
    if seq_len is None:
        seq_len = config.training.seq_len if config else min(positions, LONGEST)
    if not 1 <= seq_len <= positions:
        raise UserError(f"--seq-len must be between 1 and the model's context of {positions} tokens, not {seq_len}.")
    with TemporaryDirectory() as folder:
        if file:
            data = build(DataConfig, given(settings))
            windows: Windows
            if not data.column and kind_in(Path(file), data.documents) == "conversations":
                if not tokenizer.chat:
                    raise UserError(f"{file} holds conversations, but {path} has no chat template: name a text.")
                loss_on = config.training.loss_on if config else "assistant"
                tokens = encode_conversations(Path(file), tokenizer, Path(folder), loss_on, display.line)
                windows = PackedWindows(tokens, seq_len, name="evaluated", context=positions)
            else:
                how = {"column": data.column, "documents": data.documents, "echo": display.line}
                tokens = encode_file(Path(file), tokenizer, Path(folder), **how)
                windows = TextWindows(tokens, seq_len)
        elif config:
            corpus = open_data(config, display)
            other_text = f"{path} was not trained on the text that {config.data.data} holds now: name a FILE."
            if corpus.kind == "conversations" and not tokenizer.chat:
                raise UserError(other_text)
            objective = OBJECTIVES[corpus.kind]
            both = objective.encode(corpus, tokenizer, config.training, display.progress("Encoding"), display.line)
            if run_folder.fingerprint_of(path) not in (None, both.fingerprint):
                raise UserError(other_text)
            tokens, windows = both.val, objective.windows(both, "val", seq_len, context=positions)
        else:
            raise UserError(f"{path} is not a run, so it has no validation text: name a FILE.")
        for line in windows.warnings:
            display.line(line)
        lost = lost_text([tokens], tokenizer)
        evaluate = Evaluator(network, windows, tokenizer.byte_lengths(), batch_size=batch_size)
        bar = display.bar("Evaluating", evaluate.windows, unit="window")
        evaluation = evaluate(bar.advance)
        bar.close()
    display.line(f"Model          {path}")
    display.line(f"Tokens         {evaluation.tokens:,} ({evaluation.text_bytes:,} bytes of text)")
    display.line(f"Loss           {evaluation.loss:.4f} nats per token")
    display.line(f"Perplexity     {evaluation.perplexity:,.2f}")
    display.line(f"Bits per byte  {evaluation.bits_per_byte:.4f}")
    for line in lost:
        display.line(line)
