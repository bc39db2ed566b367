"""What goes wrong, in sentences."""


class UserError(ValueError):
    """Something the user can mend: the message is one clear sentence that says what to do.

    The command line prints it without a traceback and ends with exit code 2. In Python it is an ordinary `ValueError`.
    """


class RunError(RuntimeError):
    """A run that could not go on: the message is one sentence that says why, and how to go on.

    The command line prints it without a traceback and ends with exit code 1.
    """


FORESEEN = (UserError, RunError, OSError, KeyboardInterrupt)


def in_a_sentence(error: BaseException) -> tuple[str, int]:
    """What to tell a person of an error, and the exit code: 2 for their mistake, 1 for a failure, 130 for Ctrl-C."""
    if isinstance(error, UserError | RunError):
        return str(error), 2 if isinstance(error, UserError) else 1
    if isinstance(error, KeyboardInterrupt):
        return "Interrupted.", 130
    if isinstance(error, PermissionError):
        return f"{error.filename}: no permission; choose another folder or change its permissions.", 2
    if isinstance(error, NotADirectoryError | FileExistsError):
        return f"{error.filename} can't be a folder, since a file is in its way: choose another.", 2
    if isinstance(error, OSError):
        return f"{error.filename or 'The system'}: {error.strerror or error}.", 1
    if isinstance(error.__context__, KeyboardInterrupt):  # an import that Ctrl-C broke off
        return "Interrupted.", 130
    return (
        f"Something unforeseen went wrong ({type(error).__name__}: {error}). "
        "MLX_GPT_TRACEBACK=1 shows where; please report it.",
        1,
    )


def shown(found: object, most: int = 80) -> str:
    """What a file says, fit for a sentence: on one line, without a terminal's control characters, and no longer."""
    text = str(found)
    text = text if len(text) <= most else text[: most - 3] + "..."
    return text if text.isprintable() else ascii(text)
