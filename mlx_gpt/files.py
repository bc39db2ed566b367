"""Files that are whole or not there."""

import os
import threading
from collections.abc import Callable
from pathlib import Path


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file beside `path`, then put it in place: readers see the old file or the new, never half.

    The temporary name is this thread's own, and keeps the suffix, which some writers look at.
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
    """`write_whole` for text, in UTF-8 with its line ends as they are."""

    def write(part: Path) -> None:
        part.write_bytes(text.encode())

    write_whole(path, write)


def sync(path: Path) -> None:
    """Have the system put a file, or a folder's list of names, on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
