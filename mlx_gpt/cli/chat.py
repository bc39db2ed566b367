"""The dialogue of `mlx-gpt generate --interactive`."""

import contextlib
import io
import shlex
import sys
from typing import Any

import click

from mlx_gpt.cli.generate import show
from mlx_gpt.config import GenerationConfig
from mlx_gpt.errors import UserError
from mlx_gpt.settings import build, flat, settings_of
from mlx_gpt.tokenizer import Tokenizer

HELP = """Write the beginning of a text and press Enter: the model goes on from it.
Ctrl-C stops an answer, Ctrl-D leaves, the arrow keys bring back earlier lines.
/settings      show the settings
/help          show this
/NAME VALUE    change a setting, such as /temperature 0.9; the names are:"""


def chat(model: Any, tokenizer: Tokenizer, config: GenerationConfig) -> None:
    """Ask for prompts and continue them until the input ends."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing and history
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # bytes that are no text are told of, and end nothing
    click.echo("Write the beginning of a text. /help shows the commands, Ctrl-D leaves.", err=True)
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo("\nCtrl-D leaves.", err=True)
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
    """The settings after a command such as `/temperature 0.9`.

    Raises:
        UserError: there is no such command, or its value is out of its bounds.
    """
    try:
        name, *words = shlex.split(line[1:])
    except ValueError:
        raise UserError("Nothing changed: a command is /NAME VALUE; /help shows the names.") from None
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
        kind = kinds.get(name, str)
        if name in kinds and kind is not tuple and len(words) != 1:
            raise UserError(f"/{name} wants one value, as in /temperature 0.9.")
        try:
            value = tuple(words) if kind is tuple else kind(" ".join(words))
        except ValueError:
            value = words[0]  # `build` says what it should have been
        config = build(GenerationConfig, flat(config) | {name: value})
        click.echo(f"{name} is now {value}.", err=True)
    return config
