"""The one exception that means "the input is wrong", as opposed to "the program is wrong"."""


class UserError(ValueError):
    """Bad input: the message is one line that says what is wrong, where, and how to mend it.

    The command line prints the message and exits with code 2; library callers may catch it as ``ValueError``.
    """
