"""Errors, and the sentences that explain them to people."""

import contextlib
import errno
import os
import shlex
from collections.abc import Iterator


class UserError(ValueError):
    """A mistake that the user can fix: the message is one clear sentence that says what to do.

    The command line prints it without a traceback and exits with code 2. In Python it is an ordinary `ValueError`.
    """

    def __init__(self, message: str = "") -> None:
        """Make an error with this sentence."""
        super().__init__(printable(message))


class RunError(RuntimeError):
    """A run that cannot continue: the message is one sentence that says why, and how to continue it.

    The command line prints it without a traceback and exits with code 1.
    """


FORESEEN = (UserError, RunError, OSError, KeyboardInterrupt)
MISPLACED = (PermissionError, NotADirectoryError, FileExistsError)  # the user can choose another path


def in_a_sentence(error: BaseException) -> tuple[str, int]:
    """Return the sentence that a person reads about an error, and the exit code.

    The code is 2 for a user's mistake, 1 for a failure and 130 for Ctrl-C.
    """
    if isinstance(error, UserError | RunError):
        return str(error), 2 if isinstance(error, UserError) else 1
    if isinstance(error, OSError):
        return explain_os_error(error), 2 if isinstance(error, MISPLACED) else 1
    # Ctrl-C during an import can arrive as another error.
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__context__, KeyboardInterrupt):
        return "Interrupted.", 130
    return (
        f"An unexpected error occurred ({type(error).__name__}: {error}). "
        "MLX_GPT_TRACEBACK=1 shows where; please report it.",
        1,
    )


def explain_os_error(error: OSError, task: str = "") -> str:
    """Return one sentence that says what the operating system refused, and what to do about it.

    Args:
        error: the error as it was raised.
        task: what failed, to be read after "cannot", such as "read a.csv"; "" if that is unknown.
    """
    path, therefore = error.filename, f", so this program cannot {task}" if task else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"The disk is full{therefore}: make room, then run the command again."
    if path and isinstance(error, FileNotFoundError):
        return f"There is no file or folder {path}: check the name."
    if path and isinstance(error, PermissionError):
        return f"You have no permission to use {path}{therefore}: change its permissions or choose another."
    if path and error.errno == errno.EROFS:
        return f"{path} is on a read-only disk{therefore}: choose another path."
    if path and isinstance(error, IsADirectoryError):
        return f"{path} is a folder: name a file."
    if path and isinstance(error, NotADirectoryError | FileExistsError):
        return f"A file is in the way of the folder {path}{therefore}: move it away or choose another path."
    reason = str(error.strerror or error or type(error).__name__)
    if not (path or task):
        return f"Cannot continue ({reason}): try another disk."
    if path and str(path) not in task:
        reason += f": {path}"
    return f"Cannot {task or 'continue'} ({reason}): check that it is readable and writable."


@contextlib.contextmanager
def os_errors_explained(task: str) -> Iterator[None]:
    """Turn an `OSError` inside into a `UserError`; `task` is that of `explain_os_error`.

    Raises:
        UserError: the operating system refused something.
    """
    try:
        yield
    except OSError as error:
        raise UserError(explain_os_error(error, task)) from error


def printable(text: str) -> str:
    """Return `text` so that UTF-8 can hold it: Python reads file names in other encodings as lone surrogates."""
    return text.encode(errors="backslashreplace").decode()


def shown(found: object, most: int = 80) -> str:
    """Return text from a file so that it fits into a sentence.

    The result is one line of at most `most` characters, in which a terminal's control characters are escaped.
    """
    text = str(found)
    text = text if len(text) <= most else text[: most - 3] + "..."
    return text if text.isprintable() else ascii(text)


def is_utf8(text: str) -> bool:
    """Return whether text can be written as UTF-8, as the name of a file that has other bytes cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def as_utf8(text: str) -> str:
    """Return an argument of the command line as the UTF-8 that it is, even where Python expects ASCII.

    Paths must stay as they are, because Python encodes them in the same way again. So does text that is not UTF-8.
    """
    try:
        return os.fsencode(text).decode()
    except UnicodeError:
        return text


def typed(*words: object) -> str:
    """Return a command of mlx-gpt that can be pasted into a shell, such as `mlx-gpt generate --model 'my run'`.

    Args:
        words: what follows `mlx-gpt`: the command, and each flag and value by itself.
    """
    return " ".join(_quoted(str(word)) for word in ("mlx-gpt", *words))


def _quoted(word: str) -> str:
    """Quote a word for a shell, if it needs that."""
    if word.isprintable():
        return shlex.quote(word)
    # Control characters, and bytes of a name that is not UTF-8. bash and zsh read them in this form.
    escaped = "".join(
        f"\\{character}"
        if character in "\\'"
        else character
        if character.isprintable()
        else "".join(f"\\x{byte:02x}" for byte in os.fsencode(character))
        for character in word
    )
    return f"$'{escaped}'"
