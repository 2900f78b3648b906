"""The matcher equals a naive implementation of both sets of rules that shares no code with it, on real text.

The naive implementation looks up every substring of a text in a dictionary of patterns. Its rules are rewritten here as
regular expressions.
"""

import bz2
import gzip
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mc2_hpc.curation.matching.matcher import Matcher

RELEASE_UNSPACED = re.compile(
    "[\u2e80-\u2fdf\u2ff0-\u2fff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"
    "\U00020000-\U0002a6df\U0002a700-\U0002ebef!-/:-@\\[-`{-~，。、；：？！“”‘’（）【】《》〈〉「」『』～—]"
)
UNSPACED = re.compile(
    "[\u2e80-\u2fdf\u2ff0-\u2fff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\u0e00-\u0fff\u1000-\u109f\u1780-\u17ff"
    "\U00020000-\U0002a6df\U0002a700-\U0002ebef\U00030000-\U000323af\U0002f800-\U0002fa1f\u3005-\u3007\u3021-\u3029"
    "\u3031-\u3035\u3040-\u318f\u31a0-\u31bf\u31f0-\u31ff\uff66-\uff9f\uffa0-\uffdc\u1100-\u11ff\ua960-\ua97f"
    "\uac00-\ud7ff\U0001b000-\U0001b16f\uaa60-\uaa7f\ua9e0-\ua9ff]"
)
INSIDE_WORDS = "'’&+-‐‑·‧׳״־՚՛՜՞"
POINTED = ("HEBREW ", "ARABIC ", "SYRIAC ", "ETHIOPIC ")
LONE_MARKS = ("ARABIC TATWEEL", "NKO LAJANYALAN", "ARABIC SMALL WAW", "ARABIC SMALL YEH")
CHILLUS = {
    "ക്\u200d": "ൿ",
    "ണ്\u200d": "ൺ",
    "ന്\u200d": "ൻ",
    "ര്\u200d": "ർ",
    "ല്\u200d": "ൽ",
    "ള്\u200d": "ൾ",
    "ত্\u200d": "ৎ",
}
STRESSES = "\u0300\u0301\u030f\u0311"

Rules = tuple[Callable[[str], str], Callable[[str], str]]
"""The spaced text of a text, and the pattern of an entry."""


def compat_text(text: str) -> str:
    return re.sub(r"[\t\n\r]", " ", re.sub(r"([,.;:?!`])", r" \1 ", f" {text} "))


def compat_pattern(entry: str) -> str:
    left, right = (" " if not RELEASE_UNSPACED.match(end) else "" for end in (entry[0], entry[-1]))
    return left + entry + right


def is_wrapped(char: str) -> bool:
    kind = unicodedata.category(char)
    if "\U0001f000" <= char <= "\U0001faff" or char in "`ℹ":
        return True
    symbol = kind.startswith("S") and kind != "Sk" and "BRAILLE" not in unicodedata.name(char, "")
    return (symbol or (kind.startswith("P") and kind != "Pc")) and char not in INSIDE_WORDS


def is_invisible(char: str) -> bool:
    name = unicodedata.name(char, "")
    if "VARIATION SELECTOR" in name or char in "\u034f\u17b4\u17b5":
        return True
    shown = name.startswith(("ARABIC", "SYRIAC", "KAITHI", "EGYPTIAN")) and name != "ARABIC LETTER MARK"
    return unicodedata.category(char) == "Cf" and not shown


def is_left_out(char: str) -> bool:
    name = unicodedata.name(char, "")
    return (unicodedata.category(char) == "Mn" and name.startswith(POINTED)) or name in LONE_MARKS


def without_stress(text: str) -> str:
    """Stress marks after a Cyrillic vowel are removed one by one; a vowel with its own mark counts by its base."""
    kept = ""
    for char in text:
        base = unicodedata.normalize("NFD", kept[-1:])[:1].lower()
        if kept[-1:] in ("й", "Й") or not (char in STRESSES and base and base in "аеєиіоуъыэюяѣѧѫѵӕәөүұ"):
            kept += char
    return kept


def without_invisible(text: str) -> str:
    """A non-joiner becomes a space if the last character kept is Arabic; all other invisibles are removed."""
    kept, last = "", ""
    for char in text:
        if char == "\u200c" and ("\u0600" <= last <= "\u06ff" or "\u0750" <= last <= "\u077f"):
            char = " "
        if not is_invisible(char):
            kept += char
            last = last if is_left_out(char) else "" if is_wrapped(char) else char
    return kept


def fixed_text(text: str) -> str:
    for spelling, letter in CHILLUS.items():
        text = text.replace(spelling, letter)
    text = unicodedata.normalize("NFC", without_invisible(text))
    text = re.sub("([0-9#*])\u20e3", r" \1 ", without_stress(text)).replace("\u20e3", "")
    text = "".join(char for char in text if not is_left_out(char))
    text = re.sub("[\u1361\u2800\u3164\x00-\x1f\x7f-\x9f]", " ", text)
    text = "".join(f" {char} " if is_wrapped(char) else char for char in text)
    return f" {' '.join(text.split())} ".replace("  ", " ")


def fixed_pattern(entry: str) -> str:
    def space(char: str) -> str:
        symbol = unicodedata.category(char)[0] in "PS" and not is_wrapped(char)
        return "" if symbol or UNSPACED.match(char) else " "

    words = fixed_text(entry).strip(" ")
    return space(words[0]) + words + space(words[-1])


RULES: dict[str, Rules] = {"compat": (compat_text, compat_pattern), "fixed": (fixed_text, fixed_pattern)}


def naive(entries: list[str], texts: list[str], mode: str) -> list[list[int]]:
    """Look up every substring of every text; of entries with equal patterns, the first gets the match."""
    spaced, pattern = RULES[mode]
    patterns: dict[str, int] = {}
    for number, entry in enumerate(entries):
        patterns.setdefault(pattern(entry), number)
    lengths = sorted({len(key) for key in patterns})
    found = []
    for text in map(spaced, texts):
        pieces = (text[at : at + size] for at in range(len(text)) for size in lengths if at + size <= len(text))
        found.append(sorted({patterns[piece] for piece in pieces if piece in patterns}))
    return found


def matched(entries: list[str], texts: list[str], mode: str) -> list[list[int]]:
    offsets, ids = Matcher.build(entries, mode).match(pa.array(texts, pa.string()))
    return [ids[start:stop].tolist() for start, stop in zip(offsets, offsets[1:], strict=False)]


def equals_naive(entries: list[str], texts: list[str], mode: str) -> int:
    """Assert equality, and return the number of matches."""
    expected = naive(entries, texts, mode)
    for text, ours, theirs in zip(texts, matched(entries, texts, mode), expected, strict=True):
        assert ours == theirs, (text, [entries[n] for n in set(ours) ^ set(theirs)])
    return sum(map(len, expected))


def multi30k(data: Path, lang: str, step: int) -> tuple[list[str], list[str]]:
    """Every ``step``-th caption of a third; as entries, every third word, pair and triple of some others."""
    with gzip.open(data / "multi30k" / f"train.{lang}.gz", "rt", encoding="utf-8") as stream:
        lines = [line.strip() for line in stream]
    grams = {
        " ".join(words[at : at + size]): None
        for words in map(str.split, lines[-2000::step])
        for size in (1, 2, 3)
        for at in range(len(words) - size + 1)
    }
    return list(grams)[::3], lines[:10_000:step]


def labels(data: Path, step: int) -> Iterator[tuple[list[str], list[str]]]:
    """Class names of every ``step``-th language, as entries and, two in a row, as captions."""
    for _, names in list(json.loads((data / "babel_imagenet-298.json").read_text(encoding="utf-8")).values())[::step]:
        entries = [name for name in dict.fromkeys(names) if any(char.isalnum() for char in name)]
        yield entries, [f"{one}, {two}" for one, two in zip(names, names[1:] + names[:1], strict=True)]


def dump(data: Path, step: int) -> tuple[list[str], list[str]]:
    """Lines of the English dump in pieces of caption size, markup included; its page titles as entries."""
    path = data / "wikipedia" / "enwiki-pages-articles-shortened.xml.bz2"
    with bz2.open(path, "rt", encoding="utf-8") as stream:
        text = stream.read()
    titles = dict.fromkeys(re.findall(r"<title>(.*?)</title>", text))
    words = dict.fromkeys(re.findall(r"[A-Za-z'.&()-]+", text)[:20_000])
    pieces = [line[at : at + 70] for line in text.splitlines() for at in range(0, len(line), 70)]
    return [*titles, *(word for word in words if word not in titles)], pieces[:20_000:step]


def all_equal(data: Path, mode: str, step: int) -> tuple[int, int]:
    """The number of texts compared, and of matches."""
    corpora = [multi30k(data, lang, step) for lang in ("en", "de", "fr", "cs")]
    corpora += [*labels(data, step), dump(data, step)]
    return sum(len(texts) for _, texts in corpora), sum(equals_naive(*corpus, mode) for corpus in corpora)


@pytest.mark.parametrize("mode", RULES)
def test_real_text_sample(shared_data, mode):
    texts, matches = all_equal(shared_data, mode, step=20)
    assert texts > 5000 and matches > texts


@pytest.mark.slow
@pytest.mark.parametrize("mode", RULES)
def test_real_text(shared_data, mode):
    texts, matches = all_equal(shared_data, mode, step=1)
    assert texts > 100_000 and matches > 3 * texts


ALPHABET = (
    "ab cdA,.!?:;`'’-·&()«»\"…–_+#$^~ \t\n\r\u00a0\u3000\u2028\u1361\u00ad\u200b\u200d\ufe0f\ufeff"
    "e\u0301é\u0323ñΐб\u0308йא״ב־عرבह्िน้ำไລາမြန်កម្ព\u17d2བོད་犬京々〇ァカガ\u3099ーひㄅ강지\u1100\u1161\u11a8각ﾊﾟ"
    "\U00020000\U0002a700\U00030000\U0002f800\U0001b000😀👩🏽🇩🇪𝐀"
    "\u200c\u200e\u200f\u202b\u2067\u2069\u061c\u034f\U000e0067\U000e0100\x00\x92\u2800\u3164⠁"
    "\u05b8\u05c1\u0591ש\u064e\u0651\u0654\u0655\u0670ـاويیهݐ۱،ܐ\u0711\u0730\u135f\u07fa\u0308\u0327"
    "ъа\u0301\u0300\u030f\u0311еёїѐгЕЮവന്രത্5#\u20e3|$©™★ℹ\U0001fae8´"
)


@pytest.mark.parametrize("mode", RULES)
@settings(max_examples=300, deadline=None)
@given(
    entries=st.lists(st.text(ALPHABET, min_size=1, max_size=6), min_size=1, max_size=15, unique=True),
    texts=st.lists(st.text(ALPHABET, max_size=25), max_size=4),
    data=st.data(),
)
@example(
    entries=["U.S.", "a  b", "カメラ", "강아지", "\U00020000"],
    texts=["U.S., a  b 新しいカメラ 강아지가\U00020000"],
    data=None,
)
def test_any_text(mode, entries, texts, data):
    entries = [entry for entry in entries if entry.strip() and fixed_text(entry).strip()]
    texts = [*texts, "".join(entries)]
    if not entries:
        return
    if data is not None:  # texts made from entries match far more often than random texts
        pieces = st.sampled_from([*entries, " ", "", ", ", "a"])
        texts = [*texts, "".join(data.draw(st.lists(pieces, max_size=8)))]
    equals_naive(entries, texts, mode)
