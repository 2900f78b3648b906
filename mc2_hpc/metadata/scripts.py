"""Character classes shared by metadata building and caption matching.

The code-point ranges of the released rules ("compat") and of ours are side by side here.
"""

import re
import string
import unicodedata
from functools import lru_cache

_Ranges = tuple[tuple[int, int], ...]

_RELEASE_UNSPACED: _Ranges = (
    (0x4E00, 0x9FFF),  # CJK unified ideographs
    (0x3400, 0x4DBF),  # extension A
    (0x20000, 0x2A6DF),  # extension B
    (0x2A700, 0x2B73F),  # extension C
    (0x2B740, 0x2B81F),  # extension D
    (0x2B820, 0x2CEAF),  # extension E
    (0x2CEB0, 0x2EBEF),  # extension F
    (0xF900, 0xFAFF),  # compatibility ideographs
    (0x2E80, 0x2EFF),  # radicals supplement
    (0x2F00, 0x2FDF),  # Kangxi radicals
    (0x2FF0, 0x2FFF),  # ideographic description
    (0x0E00, 0x0E7F),  # Thai
    (0x0E80, 0x0EFF),  # Lao
    (0x1000, 0x109F),  # Myanmar
    (0x1780, 0x17FF),  # Khmer
    (0x0F00, 0x0FFF),  # Tibetan
)
_ALSO_UNSPACED: _Ranges = (
    (0x3005, 0x3007),  # ideographic iteration mark, closing mark, zero
    (0x3021, 0x3029),  # Hangzhou numerals
    (0x3031, 0x3035),  # vertical kana repeat marks
    (0x3040, 0x30FF),  # hiragana, katakana
    (0x3100, 0x312F),  # bopomofo
    (0x3130, 0x318F),  # hangul compatibility jamo
    (0x31A0, 0x31BF),  # bopomofo extended
    (0x31F0, 0x31FF),  # katakana phonetic extensions
    (0xFF66, 0xFF9F),  # half-width katakana
    (0xFFA0, 0xFFDC),  # half-width hangul
    (0x1100, 0x11FF),  # hangul jamo
    (0xA960, 0xA97F),  # hangul jamo extended A
    (0xAC00, 0xD7FF),  # hangul syllables, jamo extended B
    (0x1B000, 0x1B16F),  # kana supplement, extended A, small kana extension
    (0xAA60, 0xAA7F),  # Myanmar extended A
    (0xA9E0, 0xA9FF),  # Myanmar extended B
    (0x2F800, 0x2FA1F),  # compatibility ideographs supplement
    (0x30000, 0x323AF),  # extensions G, H
)
_INVISIBLE: _Ranges = (
    (0x00AD, 0x00AD),  # soft hyphen
    (0x034F, 0x034F),  # combining grapheme joiner
    (0x061C, 0x061C),  # Arabic letter mark
    (0x17B4, 0x17B5),  # Khmer inherent vowels, which no font shows
    (0x180B, 0x180F),  # Mongolian variation selectors and vowel separator
    (0x200B, 0x200F),  # zero-width space, non-joiner, joiner; direction marks
    (0x202A, 0x202E),  # direction embeddings and overrides
    (0x2060, 0x206F),  # word joiner, invisible operators, direction isolates
    (0xFE00, 0xFE0F),  # variation selectors
    (0xFEFF, 0xFEFF),  # byte-order mark
    (0xFFF0, 0xFFFB),  # interlinear annotation
    (0x1BCA0, 0x1BCA3),  # shorthand controls
    (0x1D173, 0x1D17A),  # musical controls
    (0xE0000, 0xE0FFF),  # tags, variation selectors of ideographs
)
_OPTIONAL: _Ranges = (
    (0x0591, 0x05BD),  # Hebrew cantillation and points; the maqaf, U+05BE, is a hyphen
    (0x05BF, 0x05BF),  # rafe
    (0x05C1, 0x05C2),  # shin and sin dots
    (0x05C4, 0x05C5),  # manuscript dots
    (0x05C7, 0x05C7),  # qamats qatan
    (0xFB1E, 0xFB1E),  # varika
    (0x0610, 0x061A),  # Arabic honorifics, small vowels of the Quran
    (0x0640, 0x0640),  # tatweel
    (0x064B, 0x065F),  # harakat; hamza and madda that NFC has not joined to a letter (Persian ezafe)
    (0x0670, 0x0670),  # superscript alef
    (0x06D6, 0x06DC),  # marks of the Quran, in four ranges
    (0x06DF, 0x06E8),
    (0x06EA, 0x06ED),
    (0x08D3, 0x08E1),
    (0x0898, 0x089F),  # Arabic vowels and marks from later versions of Unicode
    (0x08CA, 0x08D2),
    (0x08E3, 0x08FF),
    (0x10EFD, 0x10EFF),
    (0x0711, 0x0711),  # Syriac superscript alaph
    (0x0730, 0x074A),  # Syriac points
    (0x07FA, 0x07FA),  # lajanyalan, the tatweel of N'Ko (its tones are parts of letters)
    (0x135D, 0x135F),  # Ethiopic gemination and length
)
_PICTOGRAPHS: _Ranges = (
    (0x2139, 0x2139),  # the information sign, a letter according to Unicode
    (0x1F000, 0x1FAFF),  # the emoji blocks, including code points not assigned yet
)
_BLANK_SYMBOLS = frozenset("\u2800\u3164")
"""Braille and hangul characters that look like a space and are used as one."""
_BRAILLE: _Ranges = ((0x2801, 0x28FF),)
_RELEASE_PUNCTUATION = frozenset(string.punctuation + "，。、；：？！“”‘’（）【】《》〈〉「」『』～—")


def _pattern(ranges: _Ranges) -> str:
    return "[" + "".join(f"{chr(low)}-{chr(high)}" for low, high in ranges) + "]"


INVISIBLES = re.compile(_pattern(_INVISIBLE) + "+")
"""Runs of characters for which :func:`is_invisible` is true."""
VANISHING = _pattern(_INVISIBLE + _OPTIONAL)
"""Regular expression of a character for which :func:`is_invisible` or :func:`is_optional_mark` is true."""


def _within(char: str, ranges: _Ranges) -> bool:
    code = ord(char)
    return any(low <= code <= high for low, high in ranges)


def is_release_unspaced(char: str) -> bool:
    """The released rules' test for a character of a script written without spaces (excludes kana and hangul)."""
    return _within(char, _RELEASE_UNSPACED)


def is_release_punctuation(char: str) -> bool:
    """The released rules' test for punctuation: the 32 ASCII marks and 25 others."""
    return char in _RELEASE_PUNCTUATION


@lru_cache(maxsize=1 << 16)
def is_unspaced(char: str) -> bool:
    """Whether words in the character's script join other words without a space: the release's test plus kana and
    hangul.

    Hangul is written with spaces, but particles attach to the noun they follow, so no space follows the noun.
    """
    return _within(char, _RELEASE_UNSPACED) or _within(char, _ALSO_UNSPACED)


@lru_cache(maxsize=1 << 16)
def is_punctuation(char: str) -> bool:
    """Whether the character is punctuation or a symbol (Unicode general category P* or S*)."""
    return unicodedata.category(char)[0] in "PS"


def is_pure_punctuation(text: str) -> bool:
    """Whether ``text`` has only punctuation and symbols (true for the empty string)."""
    return all(is_punctuation(char) for char in text)


@lru_cache(maxsize=1 << 16)
def is_invisible(char: str) -> bool:
    """Whether the character has no width or meaning of its own: direction marks, joiners, variation selectors."""
    return _within(char, _INVISIBLE)


@lru_cache(maxsize=1 << 16)
def is_optional_mark(char: str) -> bool:
    """Whether writers usually leave out the mark, except in dictionaries and scripture: Hebrew, Arabic and Syriac
    points, tatweel, Ethiopic gemination.

    Expects text in NFC, so that hamza and madda are parts of their letters. The marks of all other scripts are parts
    of letters: vowels of Indic scripts, Thai and Thaana, tones of Vietnamese and N'Ko, dakuten.
    """
    return _within(char, _OPTIONAL)


@lru_cache(maxsize=1 << 16)
def is_blank(char: str) -> bool:
    """Whether the character looks like a space, or is a control character, which counts as one."""
    return char.isspace() or char in _BLANK_SYMBOLS or unicodedata.category(char) == "Cc"


@lru_cache(maxsize=1 << 16)
def is_symbol(char: str) -> bool:
    """Whether the character is not part of a word: emoji, arrows, ``|``, currency signs and trade marks.

    Exceptions are ``+`` ("C++", "A+"), spacing accents, which are typed as apostrophes, and Braille letters.
    """
    if _within(char, _PICTOGRAPHS):
        return True
    category = unicodedata.category(char)
    return category[0] == "S" and category != "Sk" and char != "+" and not _within(char, _BRAILLE)


def is_pure_marks(text: str) -> bool:
    """Whether ``text`` has no word: only punctuation, symbols, spaces, marks and invisible characters."""
    return all(is_punctuation(char) or is_invisible(char) or is_optional_mark(char) or is_blank(char) for char in text)
