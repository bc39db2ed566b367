"""`mlx-gpt generate`."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_gpt.cli.options import SettingsCommand, given, settings_options
from mlx_gpt.config import GenerationConfig
from mlx_gpt.errors import UserError
from mlx_gpt.settings import build

if TYPE_CHECKING:
    from mlx_gpt.tokenizer import Tokenizer

DEMO_PROMPTS = ("The", "In this", "If you", "There is")
DIVIDER = "-" * 20


@click.command("generate", cls=SettingsCommand)
@click.option("--model", metavar="PATH", help="A run (its best model) or a model directory.  [default: the newest run]")
@click.option("--prompt", metavar="TEXT", help="The beginning of the text.")
@click.option("--interactive", is_flag=True, help="Ask for prompts until Ctrl-D. /help there lists the commands.")
@settings_options(GenerationConfig)
def command(model: str | None, prompt: str | None, interactive: bool, **settings: Any) -> None:
    """Continue a prompt, or talk to a model.

    Without --prompt and --interactive, this continues a few sample prompts. Only the text goes to stdout; the speed and
    the memory go to stderr.
    """
    if prompt is not None and interactive:
        raise UserError("--prompt and --interactive can't go together: give one of them.")
    config: GenerationConfig = build(GenerationConfig, given(settings))

    from mlx_gpt.api import load
    from mlx_gpt.training.run_folder import newest_run

    loaded = load(Path(model) if model else newest_run(Path("weights"), with_model=True))
    if interactive:
        from mlx_gpt.cli.chat import chat

        chat(*loaded, config)
        return
    for i, text in enumerate([prompt] if prompt is not None else DEMO_PROMPTS):
        if i:
            click.echo(DIVIDER)
        show(*loaded, text, config)


def show(
    model: Any, tokenizer: "Tokenizer", prompt: str, config: GenerationConfig, *, with_prompt: bool = True
) -> None:
    """Print a prompt and its continuations: the first while it is generated, the others afterwards."""
    from mlx_gpt.generation.stream import Stats, check_prompt, stream

    check_prompt(model, tokenizer, prompt)
    stats = Stats()
    texts = [""] * config.num_samples
    if with_prompt:
        click.echo(prompt, nl=False)
    for piece in stream(model, tokenizer, prompt, config, stats):
        texts[piece.sample] += piece.text
        if piece.sample == 0:
            click.echo(piece.text, nl=False)
    click.echo()
    for text in texts[1:]:
        click.echo(f"{DIVIDER}\n{prompt if with_prompt else ''}{text}")
    click.echo(str(stats), err=True)
