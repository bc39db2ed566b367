"""What a command shows on the terminal: lines on stdout, progress bars on stderr when that is a terminal."""

import contextlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import click
from tqdm import tqdm

# What is said beside the bar fits into 80 columns.
BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"


class Terminal:
    """The display of a run at the terminal, or of plain lines in a pipe."""

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        with tqdm.external_write_mode():
            click.echo(text)

    def bar(self, what: str, total: int, done: int = 0, unit: str = "step") -> "TerminalBar":
        """Show a bar with the time left."""
        return TerminalBar(desc=what, total=total, initial=done, unit=unit)

    def progress(self, what: str) -> Callable[[int, int], None]:
        """Show a bar of bytes from the first call until all is done."""
        shown: list[TerminalBar] = []

        def update(done: int, total: int) -> None:
            if not shown:
                shown.append(TerminalBar(desc=what, total=total, unit="B", unit_scale=True))
            shown[0].reach(done)
            if done >= total:
                shown.pop().close()

        return update


class TerminalBar:
    """A tqdm bar, absent where stderr is no terminal."""

    def __init__(self, **options: Any) -> None:
        self._bar = tqdm(
            **options, file=sys.stderr, disable=None, leave=False, dynamic_ncols=True, bar_format=BAR_FORMAT
        )

    def advance(self, amount: int, facts: Mapping[str, str] | None = None) -> None:
        """Move on, and show these facts beside the bar."""
        if facts:
            self._bar.set_postfix(facts, refresh=False)
        with contextlib.suppress(OSError):  # the terminal has gone, the work goes on
            self._bar.update(amount)

    def reach(self, done: int) -> None:
        """Move on to `done`."""
        self._bar.update(done - self._bar.n)

    def close(self) -> None:
        """Take the bar away."""
        with contextlib.suppress(OSError):
            self._bar.close()
