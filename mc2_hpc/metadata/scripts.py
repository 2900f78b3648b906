"""Character classes that metadata building and caption matching share.

The code-point ranges of the released rules ("compat") and of ours are both here, side by side.
"""

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
_RELEASE_PUNCTUATION = frozenset(string.punctuation + "，。、；：？！“”‘’（）【】《》〈〉「」『』～—")


def _within(char: str, ranges: _Ranges) -> bool:
    code = ord(char)
    return any(low <= code <= high for low, high in ranges)


def is_release_unspaced(char: str) -> bool:
    """The released rules' test for a character of a script written without spaces (kana and hangul are not in it)."""
    return _within(char, _RELEASE_UNSPACED)


def is_release_punctuation(char: str) -> bool:
    """The released rules' punctuation: the 32 ASCII marks and 25 others."""
    return char in _RELEASE_PUNCTUATION


@lru_cache(maxsize=1 << 16)
def is_unspaced(char: str) -> bool:
    """Whether words of the character's script meet other words without a space: the release's test, kana and hangul
    too.

    Hangul is written with spaces, but particles are glued to the noun they follow, so a noun's end is not a space.
    """
    return _within(char, _RELEASE_UNSPACED) or _within(char, _ALSO_UNSPACED)


@lru_cache(maxsize=1 << 16)
def is_punctuation(char: str) -> bool:
    """Whether the character is punctuation or a symbol (Unicode general category P* or S*)."""
    return unicodedata.category(char)[0] in "PS"


def is_pure_punctuation(text: str) -> bool:
    """Whether nothing but punctuation and symbols is in ``text`` (true for the empty string)."""
    return all(is_punctuation(char) for char in text)
