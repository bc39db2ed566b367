"""Signals that stop a run between two steps, so that it can be saved."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any


def say_on_stderr(sentence: str) -> None:
    """Write a sentence to stderr past Python's buffers, which a signal may find in the middle of a write."""
    os.write(2, f"\n{sentence}\n".encode())


@contextlib.contextmanager
def acknowledged(words: str) -> Iterator[None]:
    """Write `words` on stderr as soon as Ctrl-C is pressed, since Python itself notices it only when MLX returns.

    In a thread that gets no signals, or where an event loop listens for them, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    listening = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    if listening != -1:
        signal.set_wakeup_fd(listening)

    def watch() -> None:
        while number := os.read(reader, 1):
            if number[0] == signal.SIGINT:
                with contextlib.suppress(OSError):
                    say_on_stderr(words)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        if listening == -1:
            signal.set_wakeup_fd(-1)
        os.close(writer)
        thread.join()
        os.close(reader)


class StopSignals:
    """Catch SIGINT, SIGTERM and SIGHUP, so that training stops between two steps. A second SIGINT stops at once.

    Only the main thread can catch them. In another thread this does nothing.

    Attributes:
        received: the signal that came, or 0.

    Args:
        say: called in the signal handler with the sentence that acknowledges a signal. The handler may interrupt a
            write, so an error of I/O, or one that says that the writer is busy, is ignored.
    """

    def __init__(self, say: Callable[[str], object] | None = None) -> None:
        self.received = 0
        self._say = say

    def requested(self) -> bool:
        """Return whether a signal has come."""
        return self.received != 0

    def __enter__(self) -> "StopSignals":
        self._before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return self
        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # nohup ignores it
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._note) for number in numbers}
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        # When another rank has gone, MLX raises RuntimeError, and mlx.launch sends SIGTERM. The signal must not end
        # this process before it has reported the error.
        lost = kind is RuntimeError and "MLX_RANK" in os.environ
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_IGN if lost and number != signal.SIGINT else handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._say:
            with contextlib.suppress(OSError, RuntimeError):  # Python's buffers refuse a write within a write
                self._say("Stopping after this step, and saving. Press Ctrl-C again to quit at once.")
        # A closed terminal counts as SIGTERM.
        self.received = signal.SIGTERM if number == signal.SIGHUP else number
