"""Lemmas of wordnets without the markup of the wikis and dictionaries that they were made from.

Some wordnets hold links (``[[dog|dogs]]``), section headings (``[edytuj]``), table cells (``! dog``), alternatives
(``cat|kitty``) and glosses (``bank (river)``). No caption has these, so such an entry never matches.
"""

import html
import re
from dataclasses import dataclass, field

_SUSPECT = re.compile(r"[\[\]{}|<>()（）［］【】〔〕]|^[!*#:;=]|''|&#?\w+;|://")
_NO_TEXT = re.compile(r"<!--.*?-->|<ref\b.*?(?:/>|</ref>)|\{\{.*?\}\}|</?[A-Za-z][^<>]*>|'{2,}")
_LINK = re.compile(r"\[\[(?:[^\[\]|]*\|)?([^\[\]|]*)\]\]")
_ADDRESS = re.compile(r"\[(?:https?:)?//\S+\s*([^\[\]]*)\]")
_LINE_START = re.compile(r"^(?:[!*:;]+|#+(?=\s)|=+(?=.*=$))\s*|(?<=.)=+$")
_INNER = r"[^\[\]()（）［］【】〔〕]*"
_GLOSS = re.compile(
    rf"^(?:\[{_INNER}\]|\({_INNER}\)(?=\s)|[（［【〔]{_INNER}[）］】〕])|(?:\[{_INNER}\]|(?<=\s)\({_INNER}\)|[（［【〔]{_INNER}[）］】〕])$"
)
_LEFT_OVER = re.compile(r"[\[\]{}<>()（）［］【】〔〕]|://")
_EXAMPLES = 5


@dataclass
class LemmaTally:
    """What became of the lemmas that had markup."""

    cleaned: int = 0
    refused: int = 0
    examples: list[str] = field(default_factory=list)
    """The first that were refused, as they stood."""

    def words(self, lemma: str) -> list[str]:
        """:func:`words_of` of the lemma, counted."""
        words = words_of(lemma)
        if not words:
            self.refused += 1
            if len(self.examples) < _EXAMPLES:
                self.examples.append(lemma)
        elif words != [lemma]:
            self.cleaned += 1
        return words


def words_of(lemma: str) -> list[str]:
    """The words or phrases that a lemma stands for: itself, several alternatives, or none where markup is left.

    Glosses in brackets go where they stand apart, before or after the word. A lemma with brackets in or at a word
    ("colo(u)r") says nothing certain of what to look for, and is refused.
    """
    if not _SUSPECT.search(lemma):
        return [lemma]
    text = _NO_TEXT.sub("", html.unescape(lemma))
    text = _ADDRESS.sub(r"\1", _LINK.sub(r"\1", text))
    words = []
    for part in text.split("|"):
        part = _LINE_START.sub("", part.strip())
        while (shorter := _GLOSS.sub("", part).strip()) != part:
            part = shorter
        if _LEFT_OVER.search(part):
            return []
        if part:
            words.append(part)
    return words
