"""Words, word pairs and their ranks."""

import gzip
import math
from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc2_hpc.errors import UserError
from mc2_hpc.metadata import ngrams
from mc2_hpc.metadata.ngrams import NgramCounts, read_lines, split_words
from mc2_hpc.metadata.scripts import is_punctuation, is_pure_punctuation, is_release_unspaced

TEXT = st.text(st.sampled_from("ab. ,<>東ไ\u3000\u200b\U00020000\tñ"), max_size=40)


def naive_words(text):
    """The rule of :func:`split_words`, character by character."""
    words, word = [], ""
    for char in text + " ":
        alone = is_punctuation(char) or is_release_unspaced(char)
        if alone or char.isspace():
            words += [word] if word else []
            words += [char] if alone else []
            word = ""
        else:
            word += char
    return words


def naive_counts(lines):
    """Words and pairs of ``lines``, counted one by one."""
    unigrams, bigrams = Counter(), Counter()
    for line in lines:
        before = None
        for word in naive_words(line):
            if is_pure_punctuation(word):
                before = None
                continue
            unigrams[word] += 1
            if before is not None:
                bigrams[before, word] += 1
            before = word
    return unigrams, bigrams


def test_split_words():
    assert split_words("A dog, don't bark!") == ["A", "dog", ",", "don", "'", "t", "bark", "!"]
    assert split_words("東京tower ไทย") == ["東", "京", "tower", "ไ", "ท", "ย"]
    assert split_words("ひらがな 한국어") == ["ひらがな", "한국어"]
    assert split_words(" \t") == []


@given(st.text())
def test_split_words_is_the_rule_on_any_text(text):
    assert split_words(text) == naive_words(text)


def test_tags_are_stripped_and_pairs_break_at_punctuation_and_lines():
    counts = NgramCounts.of_lines(["a <b>b</b>, c &lt;i&gt;d", "e"])
    assert counts.unigrams() == {"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}
    assert counts.bigrams() == {("a", "b"): 1, ("c", "d"): 1}


@given(st.lists(st.lists(TEXT.map(lambda text: text.replace("<", "")), max_size=5), max_size=6), st.randoms())
def test_counts_are_exact_however_they_are_cut_and_added(batches, random):
    unigrams, bigrams = naive_counts(line for batch in batches for line in batch)
    random.shuffle(batches)
    counts = NgramCounts()
    for batch in batches:
        counts.add(NgramCounts.of_lines(batch))
    assert counts.unigrams() == unigrams and counts.bigrams() == bigrams


def test_many_additions_are_merged_on_the_way():
    counts, whole = NgramCounts(), NgramCounts.of_lines(["a b c"] * 50 + ["c a b"] * 50)
    for line in ["a b c"] * 50 + ["c a b"] * 50:
        counts.add(NgramCounts.of_lines([line]))
        counts.bigrams()  # merges what is pending
    assert counts.unigrams() == whole.unigrams() == {"a": 100, "b": 100, "c": 100}
    assert counts.bigrams() == whole.bigrams() == {("a", "b"): 100, ("b", "c"): 50, ("c", "a"): 50}


def test_rank_unigrams_by_count_then_code_point():
    counts = NgramCounts.of_lines(["b a c b", "c x"])
    assert counts.rank_unigrams(1) == ["b", "c", "a", "x"]
    assert counts.rank_unigrams(2) == ["b", "c"]


def test_rank_bigrams_is_the_papers_score():
    random = Random(1)
    chance = [" ".join(random.choices("abcdefghij", weights=range(1, 11), k=9)) for _ in range(40)]
    counts = NgramCounts.of_lines(["new york is new", "new york is big", "is new york big", "big big", *chance])
    unigrams, bigrams = counts.unigrams(), counts.bigrams()
    n = sum(unigrams.values())
    pmi = {pair: math.log(c * n / (unigrams[pair[0]] * unigrams[pair[1]])) for pair, c in bigrams.items()}
    ordered = sorted(pmi.values())
    place = 0.3 * (len(ordered) - 1)
    low = ordered[math.floor(place)]
    p30 = low + (place - math.floor(place)) * (ordered[math.floor(place) + 1] - low)
    score = {pair: (bigrams[pair] + 1) ** 0.7 * (pmi[pair] - p30) for pair in pmi}
    expected = sorted((pair for pair in score if score[pair] > 1e-6), key=lambda pair: (-round(score[pair], 6), pair))
    assert list(counts.rank_bigrams()) == expected
    assert expected[0] == ("new", "york") and len(expected) > 50
    assert list(NgramCounts.of_lines(["one"]).rank_bigrams()) == []


def test_rank_of_added_counts_is_that_of_the_whole():
    lines = ["the red house", "a red house", "the blue sky", "a blue sky at night", "night sky"] * 3
    forward, backward = NgramCounts(), NgramCounts()
    for line in lines:
        forward.add(NgramCounts.of_lines([line]))
    for line in reversed(lines):
        backward.add(NgramCounts.of_lines([line]))
    whole = NgramCounts.of_lines(lines)
    assert list(forward.rank_bigrams()) == list(backward.rank_bigrams()) == list(whole.rank_bigrams())
    assert forward.rank_unigrams(1) == backward.rank_unigrams(1) == whole.rank_unigrams(1)


def test_a_file_without_line_breaks_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(ngrams, "_LONGEST_LINE", 10)
    (tmp_path / "a").write_bytes(b"short\n" + bytes(11))
    lines = read_lines(tmp_path / "a")
    assert next(lines) == "short"
    with pytest.raises(UserError, match="a: line 2 is longer than 10 bytes, so this is not text"):
        next(lines)


def test_read_lines(tmp_path):
    plain, packed = tmp_path / "a.txt", tmp_path / "a.txt.gz"
    plain.write_bytes("\ufeffé\r\nb\n".encode())
    packed.write_bytes(gzip.compress("é\nb".encode()))
    assert list(read_lines(plain)) == list(read_lines(packed)) == ["é", "b"]


@pytest.mark.parametrize(
    "content, name, message",
    [
        (b"fine\n\xff\xfe\n", "a.txt", "a.txt: line 2 is not UTF-8"),
        (b"not gzip", "a.txt.gz", "a.txt.gz: cannot be read"),
        (gzip.compress(b"x" * 1000, mtime=0)[:20], "b.txt.gz", "b.txt.gz: cannot be read"),
        (None, "none.txt", "none.txt: no such file"),
    ],
)
def test_read_lines_names_a_bad_file(tmp_path, content, name, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_lines(tmp_path / name))
