"""Lemmas of wordnets, without the markup of the wikis and dictionaries they were made from.

Some wordnets contain links (``[[dog|dogs]]``), section headings (``[edytuj]``), table cells (``! dog``), alternatives
(``cat|kitty``) and glosses (``bank (river)``). Captions do not, so an entry with markup never matches.
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
    """Counts of the lemmas that had markup."""

    cleaned: int = 0
    refused: int = 0
    examples: list[str] = field(default_factory=list)
    """The first lemmas that were refused, unchanged."""

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
    """The words or phrases that a lemma stands for: itself, several alternatives, or none if markup is left.

    Separate glosses in brackets, before or after the word, are removed. A lemma with brackets in or touching a word
    ("colo(u)r") is ambiguous, and is refused.
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
