"""The dialogue of `mlx-gpt generate --interactive`."""

import contextlib
import difflib
import shlex
from typing import Any

import click

from mlx_gpt.cli.generate import show
from mlx_gpt.config import GenerationConfig
from mlx_gpt.errors import UserError
from mlx_gpt.settings import build, flat, settings_of
from mlx_gpt.tokenizer import Tokenizer

HELP = """Write the beginning of a text and press Enter: the model continues it.
Ctrl-C stops a text, Ctrl-D quits, and the arrow keys bring back earlier lines.
/settings      show the settings
/help          show this
/NAME VALUE    change a setting, such as /temperature 0.9; the names are:"""


def chat(model: Any, tokenizer: Tokenizer, config: GenerationConfig) -> None:
    """Ask for prompts and continue them until the input ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing and history
    click.echo("Write the beginning of a text. /help shows the commands, Ctrl-D quits.", err=True)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo("\nCtrl-D quits.", err=True)
            continue
        try:
            if line.startswith("/"):
                config = obey(line, config)
            elif line:
                show(model, tokenizer, line, config, with_prompt=False)
        except UserError as error:
            click.echo(str(error), err=True)
        except KeyboardInterrupt:
            click.echo("\n(stopped)", err=True)


def obey(line: str, config: GenerationConfig) -> GenerationConfig:
    """Carry out a command such as `/temperature 0.9` and return the changed settings.

    Raises:
        UserError: there is no such command, or its value is not allowed.
    """
    try:
        name, *words = shlex.split(line[1:])
    except ValueError:
        raise UserError("This is not a command: write /NAME VALUE; /help shows the names.") from None
    name = name.replace("-", "_")
    kinds: dict[str, type] = {}
    for setting in settings_of(GenerationConfig):
        kinds[setting.name] = setting.kind
        if name in setting.metadata["aliases"]:
            name = setting.name
    if name == "help":
        click.echo(f"{HELP} {', '.join(kinds)}", err=True)
    elif name == "settings":
        for known, value in flat(config).items():
            click.echo(f"{known:20} {value}", err=True)
    else:
        if name not in kinds:
            nearest = difflib.get_close_matches(name, kinds, n=1)
            hint = f"did you mean /{nearest[0]}?" if nearest else "/help lists them."
            raise UserError(f"There is no command /{name}: {hint}")
        kind = kinds[name]
        if kind is not tuple and len(words) != 1:
            raise UserError(f"/{name} wants one value, as in /temperature 0.9.")
        try:
            value = tuple(words) if kind is tuple else kind(" ".join(words))
        except ValueError:
            value = words[0]  # `build` raises the error that says what the value should have been
        config = build(GenerationConfig, flat(config) | {name: value})
        click.echo(f"{name} is now {value}.", err=True)
    return config
