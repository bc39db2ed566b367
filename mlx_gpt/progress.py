"""What a run is watched with: lines of text and progress bars."""

from collections.abc import Callable, Mapping
from typing import Protocol


class Bar(Protocol):
    """A progress bar."""

    def advance(self, amount: int, facts: Mapping[str, str] | None = None) -> None:
        """Move on, and show these facts beside the bar."""
        ...

    def close(self) -> None:
        """Take the bar away."""
        ...


class Display(Protocol):
    """Where a run is watched."""

    def line(self, text: str) -> None:
        """Show a line of the log."""
        ...

    def progress(self, what: str) -> Callable[[int, int], None]:
        """Something to call with (bytes done, bytes in all), which shows a bar while there is work."""
        ...

    def bar(self, what: str, total: int, done: int = 0, unit: str = "step") -> Bar:
        """Show a progress bar until it is closed."""
        ...


class Lines:
    """A display without bars: `echo`, if given, is called with each line."""

    def __init__(self, echo: Callable[[str], None] | None = None) -> None:
        self._echo = echo

    def line(self, text: str) -> None:
        """Pass a line on."""
        if self._echo:
            self._echo(text)

    def progress(self, what: str) -> Callable[[int, int], None]:
        """Show nothing."""
        return lambda done, total: None

    def bar(self, what: str, total: int, done: int = 0, unit: str = "step") -> "Lines":
        """Show nothing."""
        return self

    def advance(self, amount: int, facts: Mapping[str, str] | None = None) -> None:
        """Show nothing."""

    def close(self) -> None:
        """Show nothing."""
