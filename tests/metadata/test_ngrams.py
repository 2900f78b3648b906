"""Words, word pairs and their ranks."""

import gzip
import math

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.metadata.ngrams import count_ngrams, rank_bigrams, rank_unigrams, read_lines, split_words


def test_split_words():
    assert split_words("A dog, don't bark!") == ["A", "dog", ",", "don", "'", "t", "bark", "!"]
    assert split_words("東京tower ไทย") == ["東", "京", "tower", "ไ", "ท", "ย"]
    assert split_words("ひらがな 한국어") == ["ひらがな", "한국어"]
    assert split_words(" \t") == []


def test_count_ngrams_strips_tags_and_breaks_pairs_at_punctuation_and_lines():
    counts = count_ngrams(["a <b>b</b>, c &lt;i&gt;d", "e"])
    assert counts.unigrams == {"a": 1, "b": 1, "c": 1, "d": 1, "e": 1}
    assert counts.bigrams == {("a", "b"): 1, ("c", "d"): 1}


def test_rank_unigrams_by_count_then_code_point():
    counts = count_ngrams(["b a c b", "c x"])
    assert rank_unigrams(counts, 1) == ["b", "c", "a", "x"]
    assert rank_unigrams(counts, 2) == ["b", "c"]


def test_rank_bigrams_is_the_papers_score():
    counts = count_ngrams(["new york is new", "new york is big", "is new york big", "big big"])
    n = counts.unigrams.total()
    pmi = {
        pair: math.log(c * n / (counts.unigrams[pair[0]] * counts.unigrams[pair[1]]))
        for pair, c in counts.bigrams.items()
    }
    ordered = sorted(pmi.values())
    place = 0.3 * (len(ordered) - 1)
    low = ordered[math.floor(place)]
    p30 = low + (place - math.floor(place)) * (ordered[math.floor(place) + 1] - low)
    score = {pair: (counts.bigrams[pair] + 1) ** 0.7 * (pmi[pair] - p30) for pair in pmi}
    expected = sorted((pair for pair in score if score[pair] > 1e-12), key=lambda pair: (-round(score[pair], 9), pair))
    assert rank_bigrams(counts) == expected
    assert rank_bigrams(counts)[0] == ("new", "york")
    assert rank_bigrams(count_ngrams(["one"])) == []


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
        (gzip.compress(b"x" * 1000)[:20], "b.txt.gz", "b.txt.gz: cannot be read"),
        (None, "none.txt", "none.txt: no such file"),
    ],
)
def test_read_lines_names_a_bad_file(tmp_path, content, name, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(read_lines(tmp_path / name))
