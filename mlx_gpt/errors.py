"""What goes wrong, in sentences."""


class UserError(ValueError):
    """Something the user can mend: the message is one clear sentence that says what to do.

    The command line prints it without a traceback and ends with exit code 2. In Python it is an ordinary `ValueError`.
    """


class RunError(RuntimeError):
    """A run that could not go on: the message is one sentence that says why, and how to go on.

    The command line prints it without a traceback and ends with exit code 1.
    """


def shown(found: object, most: int = 80) -> str:
    """What a file says, fit for a sentence: on one line, without a terminal's control characters, and no longer."""
    text = str(found)
    text = text if len(text) <= most else text[: most - 3] + "..."
    return text if text.isprintable() else ascii(text)
