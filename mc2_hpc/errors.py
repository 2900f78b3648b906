"""The exception for wrong input, as opposed to a bug in the program."""


class UserError(ValueError):
    """Bad input; the one-line message says what is wrong, where, and how to fix it.

    The command line prints the message and exits with code 2; library callers may catch it as ``ValueError``.
    """
