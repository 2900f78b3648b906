"""Checks of a setting's value that its type does not make."""

from mc2_hpc.errors import UserError


def choose(key: str, value: str, choices: tuple[str, ...]) -> None:
    """
    Raises:
        UserError: ``value`` is not one of ``choices``; the message names ``key`` and lists them.
    """
    if value not in choices:
        raise UserError(f"{key}={value!r}: choose one of {', '.join(choices)}")


def at_least(key: str, value: float, low: float) -> None:
    """
    Raises:
        UserError: ``value`` is below ``low``; the message names ``key``.
    """
    if value < low:
        raise UserError(f"{key}={value}: must be at least {low}")
