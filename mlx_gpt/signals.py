"""Signals that stop a run between two steps, so that it can be saved."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any


class StopSignals:
    """Catch SIGINT, SIGTERM and SIGHUP, so that training stops between two steps. A second SIGINT stops at once.

    Only the main thread can catch them. In another thread this does nothing.

    Attributes:
        received: the signal that came, or 0.

    Args:
        speaks: whether to acknowledge a signal on the terminal.
    """

    def __init__(self, speaks: bool = True) -> None:
        self.received = 0
        self._speaks = speaks

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
        # The signal may interrupt a write to sys.stderr, so this bypasses Python's buffers.
        if self._speaks:
            with contextlib.suppress(OSError):
                os.write(2, b"\nStopping after this step, and saving. Press Ctrl-C again to quit at once.\n")
        # A closed terminal counts as SIGTERM.
        self.received = signal.SIGTERM if number == signal.SIGHUP else number
