"""A person's entries in `generate --interactive`: texts and commands, on one line or on several."""

import contextlib
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass

import click

from mlx_gpt.errors import UserError, is_utf8

QUOTES = '"""'
QUOTED = re.compile(rf"\s*(?P<command>/\w+\s+)?{QUOTES}", re.ASCII)


@dataclass(frozen=True)
class Entry:
    """A text, whose name is None, or a command's name with the text that follows it."""

    text: str
    command: str | None = None


def read_entry(next_line: Callable[[str], str]) -> Entry:
    r'''Read an entry.

    An entry is usually one line. If the line ends with a backslash, the entry continues on the next line. If it begins
    with """, the entry ends at the next """. An entry that begins with a slash is a command, unless it is in """.

    Args:
        next_line: shows a prompt and returns a line; raises `EOFError` after the last one.

    Raises:
        EOFError: the input has ended.
        UserError: the entry is not valid Unicode.
    '''
    text = next_line("> ")
    quoted, pasted = QUOTED.match(text), "\n" in text.strip()
    with contextlib.suppress(EOFError):  # the end of the input also ends the entry
        if quoted:
            name, text = (quoted["command"] or "").strip(), text[quoted.end() :]
            while QUOTES not in text:
                text += "\n" + next_line("... ")
        else:
            while text.endswith("\\"):
                text = text[:-1] + "\n"
                text += next_line("... ")
    if not is_utf8(text):
        raise UserError("The text is not valid Unicode: enter it as UTF-8.")
    if quoted:
        text = text.replace(QUOTES, "", 1).strip("\n")
        return Entry(text, name.removeprefix("/") or None)
    text = text.strip()
    if pasted or not text.startswith("/"):
        return Entry(text)
    name, _, rest = text[1:].partition(" ")
    return Entry(rest.strip(), name)


class Keyboard:
    """Reads lines from standard input. In a terminal, it shows prompts and lets the person edit lines."""

    def __init__(self) -> None:
        self.terminal = sys.stdin.isatty()
        self._editing = self.terminal and sys.stdout.isatty()
        if self._editing:
            with contextlib.suppress(ImportError):
                import readline  # gives input() line editing and history

                # Makes several pasted lines one text. Python turns this off by default, and libedit lacks it.
                readline.parse_and_bind("set enable-bracketed-paste on")

    def next_line(self, prompt: str) -> str:
        """Return the next line, without its end.

        Raises:
            EOFError: there is none.
        """
        if self._editing:
            return input(prompt)
        if self.terminal:
            click.echo(prompt, nl=False, err=True)
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.removesuffix("\n").removesuffix("\r")
