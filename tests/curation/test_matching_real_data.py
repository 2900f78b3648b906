"""Matching real captions equals an independent automaton of the released rules, in four languages."""

import gzip

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
