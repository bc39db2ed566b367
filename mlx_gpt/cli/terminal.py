"""The output of a command: lines on stdout, and progress bars on stderr if that is a terminal."""

import errno
import sys
from collections.abc import Mapping
from typing import Any

import click
from tqdm import tqdm

from mlx_gpt.progress import ByteProgress

# Short enough to leave room for the facts beside the bar in 80 columns.
BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}| {elapsed}<{remaining}{postfix}"


class Terminal:
    """A display of lines and bars on a terminal, or of lines alone in a pipe or a file.

    Args:
        lossy: drop lines that can't be written, because the command has other results, such as a run.
    """

    def __init__(self, lossy: bool = False) -> None:
        self._lossy = lossy
        # A terminal that has closed no longer says that it is one.
        self._reader_gone = (errno.EPIPE, errno.EIO) if sys.stdout and sys.stdout.isatty() else (errno.EPIPE,)

    def line(self, text: str) -> None:
        """Print a line above the bar. It is dropped if its reader has gone, and the work continues.

        Raises:
            OSError: it can't be written for another reason, and the display is not `lossy`.
        """
        try:
            with tqdm.external_write_mode():
                click.echo(text)
        except OSError as error:
            if not self._lossy and error.errno not in self._reader_gone:
                raise

    def bar(self, what: str, total: int, done: int = 0, unit: str = "step") -> "TerminalBar":
        """Show a bar with the remaining time."""
        return TerminalBar(desc=what, total=total, initial=done, unit=unit)

    def progress(self, what: str) -> ByteProgress:
        """Return a function that shows a bar of bytes from its first call until everything is done."""
        shown: list[TerminalBar] = []

        def update(done: int, total: int) -> None:
            if not shown:
                shown.append(TerminalBar(desc=what, total=total, unit="B", unit_scale=True))
            shown[0].reach(done)
            if done >= total:
                shown.pop().close()

        return update


class TerminalBar:
    """A tqdm bar, which shows nothing if stderr is not a terminal."""

    def __init__(self, **options: Any) -> None:
        self._bar = tqdm(
            **options, file=sys.stderr, disable=None, leave=False, dynamic_ncols=True, bar_format=BAR_FORMAT
        )

    def advance(self, amount: int, facts: Mapping[str, str] | None = None) -> None:
        """Advance the bar by `amount` units, and show these facts beside it."""
        if facts:
            self._bar.set_postfix(facts, refresh=False)
        self._bar.update(amount)

    def reach(self, done: int) -> None:
        """Advance the bar to `done`."""
        self.advance(done - self._bar.n)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
