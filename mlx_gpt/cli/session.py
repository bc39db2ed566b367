"""The prompt of `mlx-gpt generate --interactive`, and the commands that work there with any model."""

import difflib
import shlex
from collections.abc import Callable
from typing import Any

import click

from mlx_gpt.cli.entries import Keyboard, read_entry
from mlx_gpt.cli.generate import show
from mlx_gpt.config import GenerationConfig
from mlx_gpt.errors import UserError, shown
from mlx_gpt.settings import Setting, build, flat, settings_of
from mlx_gpt.tokenizer import Tokenizer

EDITING = """\
\"""           begins and ends a text of several lines, or one that begins with a slash
\\             at the end of a line continues the text on the next one
Ctrl-C        stops a text, Ctrl-D quits, and the arrow keys bring back earlier lines
/settings     shows the settings
/help         shows this
/NAME VALUE   changes a setting, as in /temperature 0.9; the names are:"""


class Session:
    """Carries out a person's entries. In this class, the model continues each text that is entered.

    Attributes:
        config: the settings, which commands change.
        commands: a function for each command, called with the text that follows the command's name.
    """

    greeting = "Write the beginning of a text. /help shows the commands, Ctrl-D quits."
    help = "Write the beginning of a text and press Enter: the model continues it."
    fixed: tuple[str, ...] = ()  # settings that cannot be changed

    def __init__(self, model: Any, tokenizer: Tokenizer, config: GenerationConfig) -> None:
        self.config = config
        self.commands: dict[str, Callable[[str], None]] = {"settings": self._settings, "help": self._help}
        self._model, self._tokenizer = model, tokenizer
        self._by_name = {
            name: setting
            for setting in settings_of(GenerationConfig)
            for name in (setting.name, *setting.metadata["aliases"])
            if setting.name not in self.fixed
        }

    def say(self, text: str) -> None:
        """Print how the model continues a text.

        Raises:
            KeyboardInterrupt: Ctrl-C stopped the text; a line has said so.
            UserError: the text is too long.
        """
        try:
            show(self._model, self._tokenizer, text, self.config, with_prompt=False)
        except KeyboardInterrupt:
            click.echo("\n(stopped)", err=True)
            raise

    def obey(self, command: str, rest: str) -> None:
        """Carry out a command such as `/temperature 0.9`.

        Raises:
            UserError: there is no such command, or it cannot be carried out with this text.
        """
        name = command.replace("-", "_")
        if name in self.commands:
            self.commands[name](rest)
        elif name in self._by_name:
            self._set(self._by_name[name], rest)
        else:
            nearest = difflib.get_close_matches(name, [*self.commands, *self._by_name], n=1)
            hint = f"did you mean /{nearest[0]}?" if nearest else "/help lists them."
            raise UserError(f"There is no command /{shown(command)}: {hint}")

    def _set(self, setting: Setting, rest: str) -> None:
        """Change a setting to the value in this text."""
        try:
            words = shlex.split(rest)
        except ValueError:
            raise UserError(f"The second quote is missing: write /{setting.name} VALUE.") from None
        if setting.kind is not tuple and len(words) != 1:
            raise UserError(f"/{setting.name} wants one value, as in /temperature 0.9.")
        try:
            value = tuple(words) if setting.kind is tuple else setting.kind(words[0])
        except ValueError:
            value = words[0]  # `build` raises the error that says what the value should have been
        self.config = build(GenerationConfig, flat(self.config) | {setting.name: value})
        click.echo(f"{setting.name} is now {value}.", err=True)

    def _settings(self, rest: str) -> None:
        for name, value in flat(self.config).items():
            if name not in self.fixed:
                click.echo(f"{name:20} {value}", err=True)

    def _help(self, rest: str) -> None:
        names = ", ".join(dict.fromkeys(setting.name for setting in self._by_name.values()))
        click.echo(f"{self.help}\n{EDITING} {names}", err=True)


def interact(session: Session) -> None:
    """Carry out entries until the input ends.

    Raises:
        KeyboardInterrupt: Ctrl-C was pressed and the input is not a terminal. In a terminal, it only stops a text.
    """
    keyboard = Keyboard()
    if keyboard.terminal:
        click.echo(session.greeting, err=True)
    while True:
        entry = None
        try:
            entry = read_entry(keyboard.next_line)
            if entry.command is not None:
                session.obey(entry.command, entry.text)
            elif entry.text:
                session.say(entry.text)
        except EOFError:
            if keyboard.terminal:
                click.echo(err=True)
            return
        except UserError as error:
            click.echo(str(error), err=True)
        except RuntimeError as error:  # of MLX, as when the GPU's memory is full
            click.echo(
                f"\nThis failed: {shown(error, 300).rstrip('.')}. Nothing that was written before is lost.", err=True
            )
        except KeyboardInterrupt:
            if not keyboard.terminal:
                raise
            if entry is None:
                click.echo("\nCtrl-D quits.", err=True)
