"""The matching rules, by example and by their defining properties."""

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc2_hpc.curation.matching.rules import (
    ACTION_BITS,
    NORMALISE,
    action,
    can_match,
    character_table,
    check_mode,
    entry_pattern,
    spaced_text,
)
from mc2_hpc.errors import UserError


def found(entry: str, text: str, mode: str) -> bool:
    return entry_pattern(entry, mode) in spaced_text(text, mode)


def test_compat_text():
    assert spaced_text("a,b\tc", "compat") == " a , b c "
    assert spaced_text("Hi!  x", "compat") == " Hi !   x "
    assert spaced_text("", "compat") == "  "
    assert spaced_text("(a) 'b' c-d e\u00a0f", "compat") == " (a) 'b' c-d e\u00a0f "


@given(st.text(alphabet="ab,.;:?!`\t\n\r '-é犬\u00a0", max_size=20))
def test_compat_text_restated(text):
    wrapped = re.sub(r"([,.;:?!`])", r" \1 ", f" {text} ")
    assert spaced_text(text, "compat") == re.sub(r"[\t\n\r]", " ", wrapped)


def test_compat_pattern():
    assert entry_pattern("dog", "compat") == " dog "
    assert entry_pattern("犬", "compat") == "犬"
    assert entry_pattern("T恤", "compat") == " T恤"
    assert entry_pattern("C++", "compat") == " C++"
    assert entry_pattern("カメラ", "compat") == " カメラ "  # kana is not in the released test
    assert entry_pattern("“x", "compat") == "“x "


def test_the_releases_holes_are_there_in_compat_and_mended_in_fixed():
    for entry, text in [
        ("U.S.", "the U.S. flag"),
        ("カメラ", "新しいカメラです"),
        ("강아지", "강아지가 뛴다"),
        ("big dog", "a big  dog"),
        ("café", "a cafe\u0301 bar"),
        ("dog", 'a "dog" (brown)'),
        ("घर", "यह घर।"),
        ("a b", "a\u3000b"),
    ]:
        assert not found(entry, text, "compat"), (entry, text)
        assert found(entry, text, "fixed"), (entry, text)


def test_fixed_keeps_words_whole():
    assert spaced_text("don't well-known AT&T snake_case", "fixed") == " don't well-known AT&T snake_case "
    assert not found("dog", "dogs", "fixed") and not found("dog", "hotdog", "fixed")
    assert not found("cafe", "café", "fixed")
    assert found("dog", "Dog", "fixed") is False
    assert found("C++", "learn C++ now", "fixed")


def test_fixed_vanishing_and_spaces():
    assert spaced_text("\ufeffsoft\u00adhyphen \u00a0 x\n", "fixed") == " softhyphen x "
    assert spaced_text(" \t ", "fixed") == " "
    assert spaced_text("ሰላም፡ዓለም", "fixed") == " ሰላም ዓለም "


def test_blank_entry_and_unknown_mode():
    with pytest.raises(UserError, match="blank"):
        entry_pattern("\u200b", "fixed")
    with pytest.raises(UserError, match="blank"):
        entry_pattern(" ", "compat")
    with pytest.raises(UserError, match="mode 'loose': choose one of fixed, compat"):
        check_mode("loose")


@given(st.text(alphabet="ab .,!\t\n'", min_size=1, max_size=6).filter(str.strip), st.data())
def test_can_match_means_some_text_has_it(entry, data):
    pattern = entry_pattern(entry, "compat")
    text = data.draw(st.text(alphabet="ab .,!\t\n'", max_size=12))
    if pattern in spaced_text(text, "compat"):
        assert can_match(pattern, "compat")
    if can_match(pattern, "compat"):
        witness = pattern.strip(" ")
        for mark in ",.!":
            witness = witness.replace(f" {mark}", mark).replace(f"{mark} ", mark)
        assert any(pattern in spaced_text(" " * n + witness + " " * n, "compat") for n in range(8))


@given(st.text(max_size=20))
def test_fixed_text_is_normal(text):
    spaced = spaced_text(text, "fixed")
    assert spaced[0] == spaced[-1] == " " and "  " not in spaced
    assert all(char == " " or not char.isspace() for char in spaced)
    assert spaced_text(spaced, "fixed") == spaced or not unicodedata.is_normalized("NFC", spaced)


@pytest.mark.parametrize("mode", ["fixed", "compat"])
def test_table_is_the_action_of_every_character(mode):
    table = character_table(mode)
    sample = [*range(0x3000), *range(0x3000, len(table), 97)]
    assert all(table[code] & ACTION_BITS == action(chr(code), mode) for code in sample)


@given(st.text(alphabet=st.characters(max_codepoint=0x1FFFF, exclude_categories=["Cs"]), max_size=6))
def test_text_without_doubtful_characters_is_in_nfc(text):
    table = character_table("fixed")
    if not any(table[ord(char)] & NORMALISE for char in text):
        assert unicodedata.normalize("NFC", text) == text


def test_most_characters_need_no_normalisation():
    table = character_table("fixed")
    assert np.count_nonzero(table & NORMALISE) < 0.05 * len(table)
    assert not table[ord("é")] & NORMALISE and table[0x0301] & NORMALISE
