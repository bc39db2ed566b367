"""The lines and progress bars that show a person how the work proceeds."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Protocol

Echo = Callable[[str], object]
"""Called with each line for the person, without a line end."""

ByteProgress = Callable[[int, int], object]
"""Called now and then with the number of bytes done and the total number."""


def ignore_line(line: str) -> None:
    """Show nothing: an `Echo` for callers who want no lines."""


def ignore_progress(done: int, total: int) -> None:
    """Show nothing: a `ByteProgress` for callers who want no bar."""


class Bar(Protocol):
    """A progress bar."""

    def advance(self, amount: int, facts: Mapping[str, str] | None = None) -> None:
        """Advance the bar by `amount` units, and show these facts beside it."""
        ...

    def close(self) -> None:
        """Remove the bar."""
        ...


class Display(Protocol):
    """The place where a run shows what it does."""

    def line(self, text: str) -> None:
        """Show one line of the log. For a run, it drops a line that can't be shown, so that the run continues."""
        ...

    def progress(self, what: str) -> ByteProgress:
        """Return a function that shows a bar, labelled `what`, until all bytes are done."""
        ...

    def bar(self, what: str, total: int, done: int = 0, unit: str = "step") -> Bar:
        """Show a progress bar, labelled `what`, until it is closed."""
        ...


class Lines:
    """A display without bars. It calls `echo`, if there is one, with each line."""

    def __init__(self, echo: Echo | None = None) -> None:
        self._echo = echo or ignore_line

    def line(self, text: str) -> None:
        """Show one line. It is dropped if `echo` raises `OSError`, because its reader may have gone."""
        with contextlib.suppress(OSError):
            self._echo(text)

    def progress(self, what: str) -> ByteProgress:
        """Return a function that shows nothing."""
        return ignore_progress

    def bar(self, what: str, total: int, done: int = 0, unit: str = "step") -> "Lines":
        """Return a bar that shows nothing."""
        return self

    def advance(self, amount: int, facts: Mapping[str, str] | None = None) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Show nothing."""
