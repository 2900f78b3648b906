"""Whether a server asks not to use an image: the ``X-Robots-Tag`` header."""

from collections.abc import Collection, Iterable

OPT_OUT = ("noai", "noimageai", "noindex", "noimageindex", "none")
"""Directives that are obeyed by default; ``none`` means noindex and nofollow."""
_WITH_VALUES = ("unavailable_after", "max-snippet", "max-image-preview", "max-video-preview")
"""Directives that are written ``name: value``, which looks like ``agent: directive``."""


def opts_out(headers: Iterable[str], directives: Collection[str], agent: str) -> bool:
    """Whether one of the ``X-Robots-Tag`` headers has one of the directives.

    A header is ``noindex, noai``, or ``agent: noindex, noai`` for one crawler; the latter counts if ``agent`` is ours.

    Args:
        headers: values of every such header, as sent.
        directives: in lower case.
        agent: our product's name, as at the start of the User-Agent.
    """
    for header in headers:
        applies = True
        for part in header.lower().split(","):
            name, colon, directive = (word.strip() for word in part.partition(":"))
            if colon and name not in _WITH_VALUES:
                applies = name in (agent.lower(), "*")
                name = directive
            if applies and name in directives:
                return True
    return False
