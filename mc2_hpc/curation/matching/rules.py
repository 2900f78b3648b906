"""The matching rules: what text an entry is looked for in, and as what pattern.

An entry matches a text when :func:`entry_pattern` of the entry is a substring of :func:`spaced_text` of the text. Every
entry that occurs counts once, overlapping ones included. There are two sets of rules; a pool is matched in one of
them, and its ``match.json`` records which.

``compat``: the released rules, bit for bit.
    Text: a space is put before and after it; each of ``, . ; : ? ! ` `` is wrapped in spaces; tab, line feed and
    carriage return become a space. Nothing else: no lower-casing, no Unicode normalisation, runs of spaces stay.
    Entry: a space is put at each end, except at an end whose character is an ideograph, Thai, Lao, Myanmar, Khmer,
    Tibetan or punctuation (57 marks). The entry is not wrapped as texts are, so "U.S." never matches.

``fixed``: the default for new pools; mends four holes of the release.
    Text and entry are first written alike: Unicode NFC; every white-space character (U+3000, no-break spaces, the
    Ethiopic word space too) is a space; soft hyphen, zero-width space, word joiner and byte-order mark vanish; every
    punctuation mark (general category P) and the grave accent is wrapped in spaces, except the marks that stand inside
    words (apostrophes, hyphens, connectors, ``&``, middle dots, Hebrew geresh, gershayim and maqaf, Armenian accents);
    runs of spaces collapse to one; a space is put before and after. So "U.S." is " U . S . " on both sides and
    matches, also as "U. S."; quotes and brackets do not hide the word they touch; double spaces do not break a bigram.
    Entry: the space at an end is then dropped where the character at that end belongs to a script written without
    spaces - kana, hangul, bopomofo and the newer ideographs too - or is a mark or symbol that is not wrapped. Two
    entries that are written alike ("U.S." and "U. S.") would always match together; the one with the lower id takes
    the match, the other never matches. Case is kept, and compatibility forms (full-width letters) stay distinct.
"""

import unicodedata
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from mc2_hpc.errors import UserError
from mc2_hpc.metadata.scripts import is_punctuation, is_release_punctuation, is_release_unspaced, is_unspaced

MODES = ("fixed", "compat")

KEEP, SPACE, WRAP, DROP = 0, 1, 2, 3
"""What becomes of a character: stays, becomes a space, is wrapped in spaces, vanishes."""
ACTION_BITS = 3
NORMALISE = 4
"""Flag beside the action: the character may not be in NFC where it stands."""

_TABLE_SIZE = 0x20000
"""Planes 0 and 1; beyond lie ideographs and private use, all kept, some of them to be normalised."""
_RELEASE_WRAPPED = ",.;:?!`"
_RELEASE_SPACES = "\t\n\r"
_IN_WORDS = frozenset("'\u2019&-\u2010\u2011\u00b7\u2027\u05f3\u05f4\u05be\u055a\u055b\u055c\u055e")
_VANISHING = frozenset("\u00ad\u200b\u2060\ufeff")
_ETHIOPIC_WORD_SPACE = "\u1361"


def check_mode(mode: str) -> None:
    """Raise a :class:`UserError` unless ``mode`` is one of :data:`MODES`."""
    if mode not in MODES:
        raise UserError(f"matching mode {mode!r}: choose one of {', '.join(MODES)}")


@lru_cache(maxsize=1 << 16)
def action(char: str, mode: str) -> int:
    """What ``mode`` does to the character: :data:`KEEP`, :data:`SPACE`, :data:`WRAP` or :data:`DROP`."""
    if mode == "compat":
        return WRAP if char in _RELEASE_WRAPPED else SPACE if char in _RELEASE_SPACES else KEEP
    if char in _VANISHING:
        return DROP
    if char.isspace() or char == _ETHIOPIC_WORD_SPACE:
        return SPACE
    if char == "`":
        return WRAP
    category = unicodedata.category(char)
    return WRAP if category[0] == "P" and category != "Pc" and char not in _IN_WORDS else KEEP


def spaced_text(text: str, mode: str) -> str:
    """``text`` as patterns are looked for in it; the definition that the matcher's fast path must equal."""
    if mode == "fixed":
        text = unicodedata.normalize("NFC", text)
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
    """The substring that stands for ``entry``, not empty.

    Raises:
        UserError: nothing of the entry is left to look for.
    """
    if mode == "compat":
        body, joins = entry, _joins_compat
    else:
        body, joins = spaced_text(entry, mode)[1:-1], _joins_fixed
    if not body.strip(" "):
        raise UserError(f"metadata entry {entry!r} is blank; remove it")
    return ("" if joins(body[0]) else " ") + body + ("" if joins(body[-1]) else " ")


def can_match(pattern: str, mode: str) -> bool:
    """Whether any text has ``pattern``; ``compat`` patterns may hold what no spaced text does, as "U.S." does."""
    if mode == "fixed":
        return True
    if any(char in pattern for char in _RELEASE_SPACES):
        return False
    return all(
        (at == 0 or pattern[at - 1] == " ") and (at == len(pattern) - 1 or pattern[at + 1] == " ")
        for at, char in enumerate(pattern)
        if char in _RELEASE_WRAPPED
    )


@lru_cache(maxsize=len(MODES))
def character_table(mode: str) -> npt.NDArray[np.uint8]:
    """:func:`action` of every code point below 0x20000, with :data:`NORMALISE` set where NFC is in doubt, uint8."""
    table = np.zeros(_TABLE_SIZE, np.uint8)
    for code in range(_TABLE_SIZE):
        char = chr(code)
        table[code] = action(char, mode)
        if mode == "fixed" and code >= 0x80 and not 0xD800 <= code <= 0xDFFF and _normalisation_in_doubt(char):
            table[code] |= NORMALISE
    if mode == "fixed":
        for code in _second_of_compositions():
            table[code] |= NORMALISE
    return table


def _joins_compat(char: str) -> bool:
    return is_release_unspaced(char) or is_release_punctuation(char)


def _joins_fixed(char: str) -> bool:
    # A wrapped mark has its space in every text, so asking for it changes no match, and such patterns are found faster.
    return is_unspaced(char) or (is_punctuation(char) and action(char, "fixed") != WRAP)


def _normalisation_in_doubt(char: str) -> bool:
    return unicodedata.combining(char) != 0 or unicodedata.normalize("NFC", char) != char


def _second_of_compositions() -> list[int]:
    """Code points that NFC may fuse with the character before them."""
    seconds = set(range(0x1161, 0x1176)) | set(range(0x11A8, 0x11C3))  # hangul vowels and finals
    for code in range(_TABLE_SIZE):
        parts = unicodedata.decomposition(chr(code)).split()
        if len(parts) == 2 and not parts[0].startswith("<"):
            seconds.add(int(parts[1], 16))
    return sorted(seconds)
