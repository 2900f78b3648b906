"""The exception for wrong input, as opposed to a bug in the program."""


class UserError(ValueError):
    """Bad input; the one-line message says what is wrong, where, and how to fix it.

    The command line prints the message and exits with code 2; library callers may catch it as ``ValueError``.
    """


def first_line(error: BaseException, *, most: int = 200) -> str:
    """The first line of an error's message, in at most ``most`` characters; its type if it has no message."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:most]
