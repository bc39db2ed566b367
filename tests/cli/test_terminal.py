"""Lines that can't be written are an error only where they are the command's result."""

import contextlib
import errno
import io

import pytest

from mlx_gpt.cli.terminal import Terminal


class Broken(io.StringIO):
    """A stream that can't be written to."""

    def __init__(self, number, terminal=False):
        super().__init__()
        self._number, self._terminal = number, terminal

    def isatty(self):
        return self._terminal

    def write(self, text):
        self._terminal = False  # as when a terminal has closed
        raise OSError(self._number, "broken")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_does_not_take_a_line(number):
    with contextlib.redirect_stdout(Broken(number)):
        Terminal(lossy=True).line("a line")
        with pytest.raises(OSError, match="broken"):
            Terminal().line("a line")


@pytest.mark.parametrize("stream", [Broken(errno.EPIPE), Broken(errno.EIO, terminal=True)], ids=["pipe", "terminal"])
def test_a_reader_that_has_gone(stream):
    with contextlib.redirect_stdout(stream):
        Terminal().line("a line")
