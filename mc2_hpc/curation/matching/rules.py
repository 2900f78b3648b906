"""The matching rules: how a text is prepared for matching, and the pattern that stands for an entry.

An entry matches a text when :func:`entry_pattern` of the entry is a substring of :func:`spaced_text` of the text. Every
entry that occurs counts once, overlapping entries included. There are two sets of rules; a pool is matched with one of
them, and its ``match.json`` records which.

``compat``: the released rules, bit for bit.
    Text: a space is added before and after it; each of ``, . ; : ? ! ` `` is wrapped in spaces; tab, line feed and
    carriage return become a space. Nothing else: no lower-casing, no Unicode normalisation, runs of spaces stay.
    Entry: a space is added at each end, except at an end whose character is an ideograph, Thai, Lao, Myanmar, Khmer,
    Tibetan or punctuation (57 marks). Marks in the entry are not wrapped as in texts, so "U.S." never matches.

``fixed``: the default for new pools; closes the release's gaps. Text and entry are first normalised in the same way:
    1. Invisible characters are removed: soft hyphen, zero-width space and joiners, direction marks, variation
       selectors, byte-order mark. But a non-joiner after an Arabic letter becomes a space, since Persian writers often
       type it for one; chillus and khanda ta spelt with a joiner become the letters that Unicode has for them.
    2. Unicode NFC.
    3. Marks that writers leave out are removed: Hebrew points and cantillation, Arabic and Syriac vowel signs, tatweel,
       Ethiopic gemination; stress marks (acute, grave, and the South Slavic accents) on Cyrillic vowels. Marks that
       make a letter stay: hamza and madda, Cyrillic й, ё, ї, ќ, and those of every other script.
    4. White space (including U+3000, no-break spaces and the Ethiopic word space) and control characters become a
       space.
    5. Punctuation (general category P), the grave accent, emoji and other symbols are wrapped in spaces, except the
       marks that stand inside words: apostrophes, hyphens, connectors, ``&``, ``+``, middle dots, Hebrew geresh,
       gershayim and maqaf, Armenian accents, spacing accents. The digit of a keycap is a word of its own.
    6. Runs of spaces collapse to one; a space is added before and after.
    So "U.S." is " U . S . " on both sides and matches, also as "U. S."; quotes, brackets and emoji do not hide the word
    they touch; double spaces do not break a bigram; a pointed entry is found in unpointed text, and vice versa.
    Entry: the space at an end is then dropped if the character at that end belongs to a script written without spaces
    (kana, hangul, bopomofo and the newer ideographs too) or is a mark or symbol that is not wrapped. Two entries that
    normalise to the same text ("U.S." and "U. S.", a word with and without points) would always match together. Only
    the entry with the lower id matches, so that one word has one vote. An entry with nothing left never matches.
    Case is kept, and compatibility forms (full-width letters) stay distinct.
"""

import re
import unicodedata
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from mc2_hpc.errors import UserError
from mc2_hpc.metadata.scripts import (
    INVISIBLES,
    VANISHING,
    is_blank,
    is_invisible,
    is_optional_mark,
    is_punctuation,
    is_release_punctuation,
    is_release_unspaced,
    is_symbol,
    is_unspaced,
)

MODES = ("fixed", "compat")
FIXED_EDITION = 2
"""Goes up with each change to mode ``fixed``, so that no pool is matched by two editions of it."""

KEEP, SPACE, WRAP, DROP = 0, 1, 2, 3
"""What happens to a character: it stays, becomes a space, is wrapped in spaces, or is removed."""
ACTION_BITS = 3
NORMALISE = 4
"""Flag beside the action: :func:`composed` may change a text with this character."""
CONTEXT = 8
"""Flag beside the action: :func:`composed` may do more than NFC to a text with this character."""

_TABLE_SIZE = 0x20000
"""Planes 0 and 1. The rest are ideographs and private use: all are kept, and some need normalisation."""
_RELEASE_WRAPPED = ",.;:?!`"
_RELEASE_SPACES = "\t\n\r"
_IN_WORDS = frozenset("'\u2019&-\u2010\u2011\u00b7\u2027\u05f3\u05f4\u05be\u055a\u055b\u055c\u055e")
_ETHIOPIC_WORD_SPACE = "\u1361"
_KEYCAP = "\u20e3"
_JOINER = "\u200d"
NON_JOINER = 0x200C
_VIRAMA_JOINED = {
    "\u0d15\u0d4d\u200d": "\u0d7f",  # chillus of Malayalam, as they were spelt before Unicode 5.1
    "\u0d23\u0d4d\u200d": "\u0d7a",
    "\u0d28\u0d4d\u200d": "\u0d7b",
    "\u0d30\u0d4d\u200d": "\u0d7c",
    "\u0d32\u0d4d\u200d": "\u0d7d",
    "\u0d33\u0d4d\u200d": "\u0d7e",
    "\u09a4\u09cd\u200d": "\u09ce",  # khanda ta of Bengali, before Unicode 4.1
}
_STRESS_MARKS = "\u0300\u0301\u030f\u0311"
_CYRILLIC_VOWELS = "аеёєиіїоуўъыэюяѐѝѣѧѫѵӑӓӕӗәӛӣӥөӧөӫӭӯӱӳүұ"
_JOINED_SPELLING = re.compile("|".join(_VIRAMA_JOINED))
_STRESSED = re.compile(f"(?<=[{_CYRILLIC_VOWELS}{_CYRILLIC_VOWELS.upper()}])[{_STRESS_MARKS}]+")
_KEYCAPPED = re.compile(f"([0-9#*]){_KEYCAP}")


def mode_settings(mode: str) -> dict[str, str | int]:
    """What a pool matched in ``mode`` records about the rules: ``compat`` never changes, ``fixed`` has editions."""
    return {"mode": mode, "matching_rules": FIXED_EDITION} if mode == "fixed" else {"mode": mode}


def check_mode(mode: str) -> None:
    """Raise a :class:`UserError` unless ``mode`` is one of :data:`MODES`."""
    if mode not in MODES:
        raise UserError(f"matching mode {mode!r}: choose one of {', '.join(MODES)}")


@lru_cache(maxsize=1 << 16)
def action(char: str, mode: str) -> int:
    """What ``mode`` does to the character: :data:`KEEP`, :data:`SPACE`, :data:`WRAP` or :data:`DROP`."""
    if mode == "compat":
        return WRAP if char in _RELEASE_WRAPPED else SPACE if char in _RELEASE_SPACES else KEEP
    if is_invisible(char) or is_optional_mark(char) or char == _KEYCAP:
        return DROP
    if is_blank(char) or char == _ETHIOPIC_WORD_SPACE:
        return SPACE
    if char == "`" or is_symbol(char):
        return WRAP
    category = unicodedata.category(char)
    return WRAP if category[0] == "P" and category != "Pc" and char not in _IN_WORDS else KEEP


def composed(text: str) -> str:
    """What ``fixed`` does to a text as a whole: steps 1 and 2, stress marks and keycaps.

    For a text without characters that :func:`character_table` flags :data:`NORMALISE`, it changes nothing that the
    table would not. Without characters flagged :data:`CONTEXT`, it is NFC.
    """
    if _JOINER in text:
        text = _JOINED_SPELLING.sub(lambda found: _VIRAMA_JOINED[found[0]], text)
    if chr(NON_JOINER) in text:
        text = _spacing_non_joiner().sub(r"\1 ", text)
    text = unicodedata.normalize("NFC", INVISIBLES.sub("", text))
    return _KEYCAPPED.sub(r" \1 ", _STRESSED.sub("", text))


def spaced_text(text: str, mode: str) -> str:
    """``text`` in the form that patterns are searched in; the reference that the matcher's fast path must equal."""
    if mode == "fixed":
        text = composed(text)
    parts = [" "]
    for char in text:
        what = action(char, mode)
        if what == KEEP:
            parts.append(char)
        elif what != DROP:
            parts.append(f" {char} " if what == WRAP else " ")
    spaced = "".join([*parts, " "])
    if mode == "compat":
        return spaced
    return "".join(f" {word}" for word in spaced.split(" ") if word) + " "


def entry_pattern(entry: str, mode: str) -> str:
    """The substring that stands for ``entry``; never empty.

    Raises:
        UserError: nothing of the entry is left to search for.
    """
    pattern = pattern_or_none(entry, mode)
    if pattern is None:
        raise UserError(f"metadata entry {entry!r} is blank; remove it")
    return pattern


def pattern_or_none(entry: str, mode: str) -> str | None:
    """Like :func:`entry_pattern`, but None for an entry with nothing left, such as a title that is a single mark."""
    if mode == "compat":
        body, joins = entry, _joins_compat
    else:
        body, joins = spaced_text(entry, mode)[1:-1], _joins_fixed
    if not body.strip(" "):
        return None
    return ("" if joins(body[0]) else " ") + body + ("" if joins(body[-1]) else " ")


def can_match(pattern: str, mode: str) -> bool:
    """Whether any text can contain ``pattern``; some ``compat`` patterns, such as "U.S.", occur in no spaced text."""
    if mode == "fixed":
        return True
    if any(char in pattern for char in _RELEASE_SPACES):
        return False
    marks = [at for at, char in enumerate(pattern) if char in _RELEASE_WRAPPED]
    # Each mark has its own space on either side, so two marks are never a single space apart.
    return all(
        (at == 0 or pattern[at - 1] == " ") and (at == len(pattern) - 1 or pattern[at + 1] == " ") for at in marks
    ) and not any(second - first == 2 for first, second in pairwise(marks))


@lru_cache(maxsize=1)
def _spacing_non_joiner() -> re.Pattern[str]:
    """A letter or digit in the Arabic or Arabic Supplement block, removed marks after it, and a non-joiner."""
    arabic = [chr(code) for code in (*range(0x600, 0x700), *range(0x750, 0x780))]
    letters = "".join(char for char in arabic if action(char, "fixed") == KEEP)
    return re.compile(f"([{letters}]{VANISHING}*){chr(NON_JOINER)}")


@lru_cache(maxsize=len(MODES))
def character_table(mode: str) -> npt.NDArray[np.uint8]:
    """:func:`action` of every code point below 0x20000, with the flags :data:`NORMALISE` and :data:`CONTEXT` where they
    apply, uint8. Code points beyond it are kept and have both flags."""
    table = np.zeros(_TABLE_SIZE, np.uint8)
    for code in range(_TABLE_SIZE):
        char = chr(code)
        table[code] = action(char, mode)
        if mode == "fixed" and code >= 0x80 and not 0xD800 <= code <= 0xDFFF:
            table[code] |= (NORMALISE if _composition_in_doubt(char) else 0) | (CONTEXT if _needs_context(char) else 0)
    if mode == "fixed":
        for code in _second_of_compositions():
            table[code] |= NORMALISE
    return table


def _joins_compat(char: str) -> bool:
    return is_release_unspaced(char) or is_release_punctuation(char)


def _joins_fixed(char: str) -> bool:
    # A wrapped mark has its space in every text. Requiring it changes no match, and such patterns are found faster.
    return is_unspaced(char) or (is_punctuation(char) and action(char, "fixed") != WRAP)


def _composition_in_doubt(char: str) -> bool:
    return char == _KEYCAP or unicodedata.combining(char) != 0 or unicodedata.normalize("NFC", char) != char


def _needs_context(char: str) -> bool:
    return is_invisible(char) or char in _STRESS_MARKS or char == _KEYCAP


def _second_of_compositions() -> list[int]:
    """Code points that NFC may fuse with the character before them."""
    seconds = set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))  # hangul vowels and finals
    for code in range(_TABLE_SIZE):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            seconds.add(int(parts[1], 16))
    return sorted(seconds)
