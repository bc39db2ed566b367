"""`mlx-gpt generate`."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_gpt.cli.fetching import fetched
from mlx_gpt.cli.options import SettingsCommand, given, settings_options
from mlx_gpt.config import CONVERSATION, GenerationConfig
from mlx_gpt.errors import UserError, as_utf8, os_errors_explained
from mlx_gpt.settings import build

if TYPE_CHECKING:
    from mlx_gpt.tokenizer import Tokenizer

DEMO_PROMPTS = ("The", "In this", "If you", "There is")
DIVIDER = "-" * 20


@click.command("generate", cls=SettingsCommand)
@click.option(
    "--model",
    metavar="PATH",
    help="A run (its best model), a model directory or hf:owner/name.  [default: the newest run]",
)
@click.option("--prompt", metavar="TEXT", help="The beginning of the text.")
@click.option("--prompt-file", metavar="FILE", help="File that has the beginning of the text; - is standard input.")
@click.option(
    "--interactive",
    is_flag=True,
    help="Talk to a model. If it has a chat template, it answers messages, else it continues texts. /help lists the "
    "commands. Defaults in a conversation: "
    + ", ".join(f"--{name.replace('_', '-')} {value}" for name, value in CONVERSATION.items())
    + ".",
)
@settings_options(GenerationConfig)
def command(model: str | None, prompt: str | None, prompt_file: str | None, interactive: bool, **settings: Any) -> None:
    """Continue a prompt, or talk to a model.

    With neither a prompt nor --interactive, this continues a few sample prompts. Only the text goes to stdout; speed
    and memory go to stderr.
    """
    if (prompt is not None) + (prompt_file is not None) + interactive > 1:
        raise UserError("--prompt, --prompt-file and --interactive exclude each other: give one of them.")
    settings["stop"] = tuple(map(as_utf8, settings["stop"] or ()))
    config: GenerationConfig = build(GenerationConfig, given(settings))
    if prompt is not None:
        prompt = as_utf8(prompt)
    if prompt_file is not None:
        prompt = read_prompt(prompt_file)

    from mlx_gpt.api import load
    from mlx_gpt.training.run_folder import newest_run

    if model is None:
        model = str(newest_run(Path("weights"), with_model=True))
        click.echo(f"Model: {model}, the newest run.", err=True)
    model = fetched(model)
    loaded = load(model)
    if interactive:
        from mlx_gpt.chat_template import ChatTemplate
        from mlx_gpt.cli.conversing import ConversingSession
        from mlx_gpt.cli.session import Session, interact

        if template := ChatTemplate.of(loaded[1]):
            interact(ConversingSession(*loaded, template, build(GenerationConfig, {**CONVERSATION, **given(settings)})))
        else:
            interact(Session(*loaded, config))
        return
    if loaded[1].chat:
        click.echo("This model has a chat template: with --interactive it answers messages.", err=True)
    for i, text in enumerate([prompt] if prompt is not None else DEMO_PROMPTS):
        if i:
            click.echo(DIVIDER)
        show(*loaded, text, config)


def read_prompt(file: str) -> str:
    """Return the text of a file, or of standard input for "-", without the end of its last line.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    with os_errors_explained(f"read {file}"):
        text = sys.stdin.buffer.read() if file == "-" else Path(file).read_bytes()
    try:
        return text.decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        name = "Standard input" if file == "-" else file
        raise UserError(f"{name} is not UTF-8 text (at byte {error.start:,}): convert it first.") from None


def show(
    model: Any, tokenizer: "Tokenizer", prompt: str, config: GenerationConfig, *, with_prompt: bool = True
) -> None:
    """Print a prompt and its continuations in order, each while it is generated as far as its turn has come."""
    from mlx_gpt.generation.stream import Stats, check_prompt, stream

    check_prompt(model, tokenizer, prompt)
    stats = Stats()
    before = prompt if with_prompt else ""
    shown, ended = 0, set[int]()  # the sample whose turn it is, and samples that are complete
    waiting: dict[int, str] = {}  # what later samples have so far
    click.echo(before, nl=False)
    for piece in stream(model, tokenizer, prompt, config, stats):
        if piece.sample == shown:
            click.echo(piece.text, nl=False)
        else:
            waiting[piece.sample] = waiting.get(piece.sample, "") + piece.text
        if piece.reason:
            ended.add(piece.sample)
        while shown in ended and shown < config.num_samples - 1:
            ended.remove(shown)
            shown += 1
            click.echo(f"\n{DIVIDER}\n{before}{waiting.pop(shown, '')}", nl=False)
    click.echo()
    click.echo(str(stats), err=True)
