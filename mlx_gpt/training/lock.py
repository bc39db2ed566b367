"""The lock that keeps a second process out of a run."""

import contextlib
import os
from pathlib import Path

from mlx_gpt.errors import UserError
from mlx_gpt.files import locked

LOCK = ".lock"


class Lock:
    """Keeps a second process out of a run. The system releases it when the process ends, however it ends.

    Some network file systems have no locks. There it keeps nobody out.

    Raises:
        UserError: another process holds it; the sentence names it.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOCK
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        self._held = contextlib.ExitStack()
        while True:
            folder.mkdir(parents=True, exist_ok=True)
            self._path.touch()
            try:
                self._held.enter_context(locked(self._path, wait=False))
                break
            except FileNotFoundError:
                continue  # the process that had locked it has removed it
            except BlockingIOError:
                holder = self._path.read_text(encoding="utf-8").strip() or "unknown"
                raise UserError(
                    f"Process {holder} is training into {folder}: wait for it, stop it, or choose another --out."
                ) from None
        self._path.write_text(f"{os.getpid()}\n", encoding="utf-8")

    def release(self) -> None:
        """Let others in. Folders that were made for the lock alone are removed."""
        if self._made and [path.name for path in self._path.parent.iterdir()] == [LOCK]:
            self._path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                for folder in self._made:
                    folder.rmdir()
        self._held.close()

    def __enter__(self) -> "Lock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()
