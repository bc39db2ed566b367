"""Writing files so that a reader finds the whole file or none, and nothing is left of a process that died.

Whatever is unfinished stands in a hidden file or folder that its process has locked. The system releases the lock when
the process ends, however it ends, so the next writer in the same folder knows which of them to remove.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

UNFINISHED = re.compile(r"\..*\.\d+-\d+\.part(\.\w+)?")  # named by `_unfinished`
READY = ".ready"


class DiskFullError(OSError):
    """The disk has too little room for what is to be written.

    Attributes:
        needed: bytes to be written.
        free: bytes that the disk has left.
    """

    def __init__(self, needed: int, free: int) -> None:
        """Make the error, with the number of a full disk."""
        sizes = f"it takes {size_in_words(needed)} and the disk has {size_in_words(free)} left"
        super().__init__(errno.ENOSPC, sizes)
        self.needed, self.free = needed, free


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file so that readers see the old content or the new, never half of it.

    `write` fills a temporary file beside `path`, which is then renamed to `path`. The temporary name keeps the suffix
    because some writers choose the format by it.

    Raises:
        OSError: the file cannot be written. The error names `path`.
    """
    part = _part(path)
    try:
        with _unfinished(part, Path.touch):
            write(part)
            sync(part)
            part.replace(path)
            sync(path.parent)
    except OSError as error:
        if error.filename == str(part):
            error.filename = str(path)  # the name that a person knows
        raise


def write_text_whole(path: Path, text: str) -> None:
    """Write text as `write_whole` does, in UTF-8 and with its line endings unchanged."""

    def write(part: Path) -> None:
        part.write_bytes(text.encode())

    write_whole(path, write)


def append_line(path: Path, line: str, instead_of: str = "") -> bool:
    """Add a line to a file, either the whole line or nothing. The file is created if it is missing.

    Args:
        instead_of: replace the last line if it is this one. A power cut may then lose both.

    Returns:
        Whether the last line was replaced.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        old = b"\n" + instead_of.encode() + b"\n"
        file.seek(max(0, size - len(old)))
        tail = file.read()
        replaces = bool(instead_of) and (tail == old or (len(tail) == size and tail == old[1:]))
        if replaces:
            size -= len(old) - 1
        else:
            old = b"\n"
        separator = b"" if replaces or tail[-1:] in (b"", b"\n") else b"\n"  # or it would continue the last line
        data = separator + line.encode() + b"\n"
        try:
            if replaces:
                file.truncate(size)
            if file.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            flush(file.fileno())
        except BaseException:
            file.truncate(size)
            file.write(old[1:])
            raise
    return replaces


@contextlib.contextmanager
def temporary_folder(folder: Path) -> Iterator[Path]:
    """Make a folder inside `folder`, on the same disk, and remove it at the end with everything in it.

    If `folder` is missing, this makes it, and removes it at the end if it is empty.
    """
    part = _part(folder / "folder")
    with _unwinding_on_signals():
        missing = not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with _unfinished(part, Path.mkdir):
                yield part
        finally:
            if missing:
                with contextlib.suppress(OSError):  # it is not empty
                    folder.rmdir()


def publish(staged: Path, folder: Path) -> None:
    """Move all files of `staged`, a `temporary_folder` of `folder`, to `folder`, as if at one moment.

    If the process dies before that moment, `folder` is as it was. If it dies after it, `finish_publishing` does the
    rest.
    """
    finish_publishing(folder)
    for path in sorted(staged.iterdir()):
        sync(path)
    sync(staged)
    ready = staged.rename(folder / READY)
    sync(folder)
    _move_all(ready, folder)


def finish_publishing(folder: Path) -> None:
    """Move the files that a process which died had published, but not all moved. Call this before reading `folder`."""
    ready = folder / READY
    if ready.is_dir():
        with contextlib.suppress(FileNotFoundError), locked(ready):  # another process has moved them
            _move_all(ready, folder)


def remove_leftovers(folder: Path) -> bool:
    """Remove the unfinished files and folders in `folder` whose process has ended; return whether there were any."""
    removed = False
    for path in folder.glob(".*.part*"):
        if UNFINISHED.fullmatch(path.name):
            with contextlib.suppress(OSError), locked(path, wait=False, required=True):
                remove(path)
                removed = True
    return removed


@contextlib.contextmanager
def locked(path: Path, wait: bool = True, required: bool = False) -> Iterator[None]:
    """Hold the lock of a file or folder.

    Args:
        wait: wait until another process releases it.
        required: fail on a disk that has no locks, as some network file systems, instead of doing without.

    Raises:
        BlockingIOError: another process holds it, and `wait` is false.
        FileNotFoundError: it is gone.
        OSError: the disk has no locks, and `required` is true.
    """
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # NFS locks only what may be written
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:
            if required:
                raise
        if not os.path.samestat(os.fstat(handle), path.stat()):
            raise FileNotFoundError
        yield
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    """Remove a file, a folder with everything in it, or a link but not what it points to, if there is one."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def expanded(path: str) -> Path:
    """Return a path with its `~` or `~name` replaced by that home folder; unchanged if there is no such folder.

    `Path.expanduser` raises a RuntimeError if there is none.
    """
    return Path(os.path.expanduser(path))  # noqa: PTH111


def nearest_existing(path: Path) -> Path:
    """Return `path`, or the nearest folder above it that exists."""
    return next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())


def free_space(folder: Path) -> int:
    """Return the bytes that are free on the disk of `folder`, which need not exist yet."""
    return shutil.disk_usage(nearest_existing(folder)).free


def check_free_space(folder: Path, needed: int) -> None:
    """Check that the disk of `folder`, which need not exist yet, has room for `needed` bytes.

    Raises:
        DiskFullError: it has less.
    """
    if needed > (free := free_space(folder)):
        raise DiskFullError(needed, free)


def size_in_words(count: float) -> str:
    """Return a number of bytes in words, such as "1.50 GB", to three digits as a disk's size is given."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if count >= size:
            number = count / size
            return f"{number:,.{2 if number < 10 else 1 if number < 100 else 0}f} {unit}"
    return f"{count:.0f} bytes"


def sync(path: Path) -> None:
    """Have a file, or a folder's list of names, written to the disk, as `flush` does."""
    handle = os.open(path, os.O_RDONLY)
    try:
        flush(handle)
    finally:
        os.close(handle)


def flush(handle: int) -> None:
    """Have an open file or folder written to the disk, so that a power cut does not lose it.

    On macOS fsync leaves the data in the drive's own cache, and F_FULLFSYNC empties that, too.
    """
    if full := getattr(fcntl, "F_FULLFSYNC", None):
        with contextlib.suppress(OSError):  # network drives may not have it
            fcntl.fcntl(handle, full)
            return
    os.fsync(handle)


def _part(path: Path) -> Path:
    """Return a name beside `path` that belongs to this thread alone."""
    return path.with_name(f".{path.stem}.{os.getpid()}-{threading.get_ident()}.part{path.suffix}")


@contextlib.contextmanager
def _unfinished(part: Path, make: Callable[[Path], None]) -> Iterator[None]:
    """Make `part`, lock it, and remove what is left of it at the end, also when a signal ends the process."""
    remove_leftovers(part.parent)
    with _unwinding_on_signals(), contextlib.ExitStack() as lock:
        try:
            while True:
                make(part)
                # Another process may have removed it before it was locked.
                with contextlib.suppress(FileNotFoundError):
                    lock.enter_context(locked(part))
                    break
            yield
        finally:
            remove(part)


@contextlib.contextmanager
def _unwinding_on_signals() -> Iterator[None]:
    """Let SIGTERM, or SIGHUP when the terminal closes, end the process only after it has cleaned up.

    A signal that the program handles or ignores itself stays as it is.
    """
    default = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread() or not default:
        yield
        return

    received = 0

    def unwind(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = number
        raise KeyboardInterrupt

    for number in default:
        signal.signal(number, unwind)
    try:
        yield
    finally:
        for number in default:
            signal.signal(number, signal.SIG_DFL)
        if received:
            os.kill(os.getpid(), received)


def _move_all(ready: Path, folder: Path) -> None:
    for path in sorted(ready.iterdir()):
        path.replace(folder / path.name)
    sync(folder)
    ready.rmdir()
