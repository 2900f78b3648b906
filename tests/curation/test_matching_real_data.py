"""Matching real captions equals an independent automaton of the released rules, in four languages."""

import gzip
import json
import unicodedata

import numpy as np
import pytest

from mc2_hpc.curation.matching.matcher import Matcher
from mc2_hpc.curation.matching.rules import entry_pattern, spaced_text

ahocorasick = pytest.importorskip("ahocorasick", reason="pyahocorasick is not installed")


def captions(shared_data, lang: str) -> list[str]:
    with gzip.open(shared_data / "multi30k" / f"train.{lang}.gz", "rt", encoding="utf-8") as stream:
        return [line.strip() for line in stream][:6000]


@pytest.mark.parametrize("mode", ["compat", "fixed"])
@pytest.mark.parametrize("lang", ["en", "de", "fr", "cs"])
def test_equals_ahocorasick(shared_data, lang, mode):
    texts = captions(shared_data, lang)
    grams = {
        " ".join(words[i : i + n]): None
        for words in map(str.split, texts[:2000])
        for n in (1, 2, 3)
        for i in range(len(words) - n + 1)
    }
    entries = list(grams)[::3]
    automaton = ahocorasick.Automaton()
    for number, entry in enumerate(entries):
        pattern = entry_pattern(entry, mode)
        if pattern not in automaton:
            automaton.add_word(pattern, number)
    automaton.make_automaton()
    expected = [sorted({number for _, number in automaton.iter(spaced_text(text, mode))}) for text in texts]
    offsets, ids = Matcher.build(entries, mode).match(texts)
    assert np.diff(offsets).tolist() == [len(row) for row in expected]
    assert ids.tolist() == [number for row in expected for number in row]
    assert offsets[-1] > 5 * len(texts)


def plain(label: str) -> str:
    """A label as captions write it: without points, stress and direction marks, and with spaces for Persian joiners."""
    kept = ""
    for char in unicodedata.normalize("NFC", label):
        name = unicodedata.name(char, "")
        pointed = unicodedata.category(char) == "Mn" and name.startswith(("HEBREW", "ARABIC"))
        if char == "\u200c":
            kept += " "
        elif not (pointed or unicodedata.category(char) == "Cf" or char in "\u0300\u0301"):
            kept += char
    return kept


@pytest.mark.parametrize(
    "lang, num_marked", [("HE", 112), ("AR", 129), ("FA", 152), ("UR", 56), ("YI", 88), ("RU", 190), ("UK", 96)]
)
def test_dictionary_spellings_are_found_in_captions(shared_data, lang, num_marked):
    labels = json.loads((shared_data / "babel_imagenet-298.json").read_text(encoding="utf-8"))[lang][1]
    marked = [name for name in dict.fromkeys(labels) if plain(name) != unicodedata.normalize("NFC", name)]
    captions = [f"x {plain(name)} y" for name in marked]
    for mode, all_found in (("fixed", True), ("compat", False)):
        offsets, ids = Matcher.build(marked, mode).match(captions)
        rows = [ids[a:b].tolist() for a, b in zip(offsets, offsets[1:], strict=False)]
        found = [any(plain(marked[n]) == plain(marked[own]) for n in row) for own, row in enumerate(rows)]
        assert all(found) if all_found else not any(found)
    assert len(marked) == num_marked
