"""Markup in wordnet lemmas is removed, or the lemma is refused and counted."""

import pytest

from mc2_hpc.metadata.lemmas import LemmaTally, words_of


@pytest.mark.parametrize(
    "lemma, words",
    [
        ("[[dog]]", ["dog"]),
        ("[[Canis lupus|wolf]]", ["wolf"]),
        ("hot [[dog|dogs]]", ["hot dogs"]),
        ("cat|kitty", ["cat", "kitty"]),
        ("cat | kitty|", ["cat", "kitty"]),
        ("!dog", ["dog"]),
        ("! dog", ["dog"]),
        ("* dog", ["dog"]),
        ("== dog ==", ["dog"]),
        ("pies [edytuj]", ["pies"]),
        ("pies[edytuj]", ["pies"]),
        ("bank (river)", ["bank"]),
        ("(to) run", ["run"]),
        ("bank (river) [geography]", ["bank"]),
        ("犬（動物）", ["犬"]),
        ("【犬】", []),
        ("'''dog'''", ["dog"]),
        ("<b>dog</b>", ["dog"]),
        ("dog<ref name=x>a book</ref>", ["dog"]),
        ("{{plural}} dogs", ["dogs"]),
        ("[http://example.org dog]", ["dog"]),
        ("salt &amp; pepper", ["salt & pepper"]),
        ("<!-- none -->", []),
        ("[edytuj]", []),
        ("[[dog", []),
        ("dog]]", []),
        ("{{dog", []),
        ("colo(u)r", []),
        ("poly(vinyl chloride)", []),  # the bracket is part of the word
        ("http://example.org", []),
        ("|", []),
    ],
)
def test_markup(lemma, words):
    assert words_of(lemma) == words


@pytest.mark.parametrize(
    "lemma",
    ["dog", "AT&T", "rock 'n' roll", ".22", "#1", "C#", "u.s.", "'s Gravenhage", "שָׁלוֹם", "a + b", "Jeopardy!", "=="],
)
def test_other_lemmas_are_untouched(lemma):
    assert words_of(lemma) in ([lemma], [])
    assert lemma == "==" or words_of(lemma) == [lemma]


def test_counts_and_examples():
    tally = LemmaTally()
    kept = [word for lemma in ("dog", "[[cat]]", "a|b", *["[edytuj]"] * 7) for word in tally.words(lemma)]
    assert kept == ["dog", "cat", "a", "b"]
    assert (tally.cleaned, tally.refused, tally.examples) == (2, 7, ["[edytuj]"] * 5)
