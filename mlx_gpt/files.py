"""Writing files so that a reader finds the whole file or none."""

import os
import threading
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file so that readers see the old content or the new, never half of it.

    `write` fills a temporary file beside `path`, which is then renamed to `path`. The temporary name belongs to this
    thread alone, and keeps the suffix because some writers choose the format by it.
    """
    part = path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}.part{path.suffix}")
    try:
        write(part)
        sync(part)
        part.replace(path)
        sync(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_text_whole(path: Path, text: str) -> None:
    """Write text as `write_whole` does, in UTF-8 and with its line endings unchanged."""

    def write(part: Path) -> None:
        part.write_bytes(text.encode())

    write_whole(path, write)


def size_in_words(count: float) -> str:
    """Return a number of bytes in words, such as "1.50 GB", to three digits as a disk's size is given."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            number = count / size
            return f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f} {unit}"
    return f"{count:.0f} bytes"


def sync(path: Path) -> None:
    """Have the operating system write a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
