"""The one exception that a person's mistake raises."""


class UserError(ValueError):
    """Something the user can mend: the message is one clear sentence that says what to do.

    The command line prints it without a traceback and ends with exit code 2. In Python it is an ordinary `ValueError`.
    """
