"""The standard streams, made ready before a command runs so that none of them can end it."""

import io
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer


class _Lossy(io.FileIO):
    """A file that drops what cannot be written, because its reader has gone or the disk is full."""

    def write(self, data: "ReadableBuffer") -> int:
        """Write bytes, or drop them."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def prepare() -> None:
    """Replace closed streams, let no character be impossible to write, and drop messages that nobody can read.

    A failure to write the text on stdout is still an error, because that is what the user asked for.
    """
    # A new file gets the lowest free number, so a model could be opened as a closed stdin, and messages of libraries
    # could be written into it.
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    encoding = sys.stderr.encoding if sys.stderr else "utf-8"
    buffer = io.BufferedWriter(_Lossy(2, "w", closefd=False))
    sys.stderr = io.TextIOWrapper(buffer, encoding, errors="backslashreplace", line_buffering=True, write_through=True)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdin, io.TextIOWrapper):
        # As the files that are read; whoever reads the text says that it is not valid.
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")
