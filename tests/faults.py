"""Interrupts a program at any one of the changes that it makes to the files of a folder.

    for _ in at_each_change(folder, lambda: prepare(...), by=raising(KeyboardInterrupt)):
        ...  # look at what the interruption left

A change is a file opened for writing, a write to it, a new folder, a renaming or a removal. Python's audit hooks and
profiler report them, so nothing is replaced and the real operations run. Writes by other languages go unseen.
"""

import contextlib
import errno
import fcntl
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

Strike = Callable[[], object]
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CALLS = {"write", "writelines", "truncate", "close", "fsync", "fcntl"}  # which audit hooks don't report

_watcher: Callable[[str, tuple[Any, ...]], None] | None = None


def raising(error: type[BaseException] | BaseException) -> Strike:
    """Return a strike that raises an error."""

    def strike() -> NoReturn:
        raise error

    return strike


def disk_full() -> NoReturn:
    """Fail as a write to a full disk does."""
    raise OSError(errno.ENOSPC, "No space left on device")


def kill() -> None:
    """End this process at once. Use it in a child process."""
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def strike_at(folder: Path, at: int = 0, by: Strike = kill) -> Iterator[list[str]]:
    """Call `by` just before change number `at` under `folder`, counted from 1; 0 only counts.

    Yields:
        The changes so far, such as "os.rename a b"; the length of the list is their number.
    """
    changes: list[str] = []

    def note(change: str) -> None:
        changes.append(change)
        if len(changes) == at:
            by()

    def audited(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            paths = arguments[:1] if arguments[2] & WRITES else ()
        elif event in ("os.rename", "os.link"):
            paths = arguments[:2]
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.truncate"):
            paths = arguments[:1]
        else:
            return
        # A path that is relative to an open folder, as in shutil.rmtree, is counted wherever that folder is.
        relative = event in ("os.remove", "os.rmdir") and arguments[1] != -1
        if relative or any(_is_under(path, folder) for path in paths):
            note(" ".join([event, *map(str, paths)]))

    def called(frame: FrameType, event: str, function: Any) -> None:
        if event == "c_call" and getattr(function, "__name__", "") in CALLS:
            name = getattr(getattr(function, "__self__", None), "name", None)
            if function in (os.fsync, fcntl.fcntl) or (_writable(function) and _is_under(name, folder)):
                note(f"{function.__name__} {name or ''}".strip())

    global _watcher
    before, profiler = _watcher, sys.getprofile()
    _watcher = audited
    sys.setprofile(called)
    try:
        yield changes
    finally:
        sys.setprofile(profiler)
        _watcher = before


def at_each_change(folder: Path, act: Callable[[], object], by: Strike) -> Iterator[str]:
    """Call `act` again and again, struck at its first change, then at its second, and so on until it is spared.

    Yields:
        The change that was struck, after each struck call. `act` may have raised what `by` raises, or recovered.
    """
    for at in itertools.count(1):
        with strike_at(folder, at, by) as changes:
            try:
                act()
            except BaseException:
                if len(changes) < at:
                    raise
        if len(changes) < at:
            return
        yield f"change {at}, {changes[at - 1]}"


def killed_at_each_change(folder: Path, act: Callable[[], object]) -> Iterator[str]:
    """Do the same with SIGKILL, in a child of this process for each call.

    The children are forks, which are quick, and safe because this process has not loaded MLX.
    """
    assert "mlx.core" not in sys.modules, "MLX does not work in a fork"
    for at in itertools.count(1):
        child = os.fork()
        if not child:
            code = 1
            with contextlib.suppress(BaseException), strike_at(folder, at, kill):
                act()
                code = 0
            os._exit(code)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            assert status == 0, f"the call that was to be killed at change {at} failed by itself"
            return
        yield f"change {at}"


def _is_under(path: object, folder: Path) -> bool:
    return isinstance(path, str | os.PathLike) and Path(path).absolute().is_relative_to(folder.absolute())


def _writable(function: Any) -> bool:
    with contextlib.suppress(Exception):
        return bool(function.__self__.writable())
    return False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if _watcher:
        _watcher(event, arguments)


sys.addaudithook(_audit)  # Python can't remove it again
