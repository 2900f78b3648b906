"""Draws depend only on (seed, epoch, key, text), and have the probabilities they claim."""

import math

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc2_hpc.balancing.selection import choose_texts, keep_probability, select
from mc2_hpc.draw_kernels import hash_column
from mc2_hpc.draws import hash_keys, random_uint64, uniform
from mc2_hpc.errors import UserError


def csr(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return offsets, np.array([entry for row in rows for entry in row], np.uint32)


PROBS = np.array([1, 0.5, 0.25, 1e-6, 0.999], np.float32)
entry_rows = st.lists(st.lists(st.integers(0, len(PROBS) - 1), max_size=4, unique=True), max_size=8)


@given(entry_rows)
def test_keep_probability_equals_the_formula(rows):
    got = keep_probability(*csr(rows), PROBS)
    assert got.shape == (len(rows),) and got.dtype == np.float64
    for value, row in zip(got, rows, strict=True):
        assert value == pytest.approx(1 - math.prod(1 - float(PROBS[entry]) for entry in row), abs=1e-15)
        assert not row or (value == 1) == (0 in row)


def test_keep_probability_of_a_slice():
    offsets, ids = csr([[0], [1, 2], [], [3]])
    whole = keep_probability(offsets, ids, PROBS)
    assert keep_probability(offsets[1:4], ids, PROBS).tolist() == whole[1:3].tolist()
    assert keep_probability(np.array([0]), np.zeros(0, np.uint32), PROBS).tolist() == []


def test_keep_probability_of_foreign_entries():
    with pytest.raises(UserError, match="entry id 9 lies beyond the 5"):
        keep_probability(*csr([[9]]), PROBS)


def rows_of(keys: list[str], texts: list[str], rows: np.ndarray) -> set[tuple[str, str]]:
    return {(keys[row], texts[row]) for row in rows}


def example(num_keys: int = 200) -> tuple[list[str], list[str], list[list[int]], list[str]]:
    keys, texts, entries, langs = [], [], [], []
    for key in range(num_keys):
        for text in range(key % 4 + 1):
            keys.append(f"k{key}")
            texts.append(f"text {text} of {key % 7}")
            entries.append(sorted({(key + text) % 5, text % 5}))
            langs.append("de" if (key + text) % 3 == 0 else "en")
    return keys, texts, entries, langs


BOTH = {"en": PROBS, "de": PROBS[::-1].copy()}


@pytest.mark.parametrize("probs", [None, BOTH])
def test_selection_is_free_of_row_order_and_sharding(probs):
    keys, texts, entries, langs = example()

    def selected(rows: np.ndarray) -> set[tuple[str, str]]:
        k, t = [keys[r] for r in rows], [texts[r] for r in rows]
        chosen = select(k, t, *csr([entries[r] for r in rows]), [langs[r] for r in rows], probs, seed=3, epoch=1)
        assert chosen.dtype == np.int64 and (np.diff(chosen) > 0).all()
        assert len({k[r] for r in chosen}) == len(chosen)
        return rows_of(k, t, chosen)

    whole = selected(np.arange(len(keys)))
    assert selected(np.random.default_rng(0).permutation(len(keys))) == whole
    of_key = np.array([int(key[1:]) for key in keys])
    shards = [selected(np.flatnonzero(of_key % 3 == shard)) for shard in range(3)]
    assert set.union(*shards) == whole and sum(map(len, shards)) == len(whole)
    assert (len(whole) == 200) == (probs is None)


def test_a_drawn_text_is_kept_by_the_probabilities_of_its_language():
    keys, texts, entries, langs = example()
    drawn = choose_texts(keys, texts, seed=3, epoch=1).tolist()
    draws = uniform(hash_keys(keys), seed=3, epoch=1, purpose="keep")
    kept = [r for r in drawn if draws[r] < 1 - math.prod(1 - float(BOTH[langs[r]][entry]) for entry in entries[r])]
    assert select(keys, texts, *csr(entries), langs, BOTH, seed=3, epoch=1).tolist() == kept
    assert 0 < len(kept) < len(drawn) and {langs[r] for r in kept} == {"en", "de"}


def test_hashes_may_stand_for_strings():
    keys, texts, entries, langs = example()
    by_string = select(keys, texts, *csr(entries), langs, BOTH, seed=0, epoch=0)
    by_hash = select(hash_keys(keys), hash_keys(texts), *csr(entries), np.array(langs), BOTH, seed=0, epoch=0)
    assert by_string.tolist() == by_hash.tolist()


def test_seed_and_epoch_change_the_draws():
    keys, texts, _, _ = example()
    one = choose_texts(keys, texts, seed=0, epoch=0).tolist()
    assert one == choose_texts(keys, texts, seed=0, epoch=0).tolist()
    assert one != choose_texts(keys, texts, seed=0, epoch=1).tolist()
    assert one != choose_texts(keys, texts, seed=1, epoch=0).tolist()


def test_each_text_is_as_likely():
    keys = [f"k{key}" for key in range(6000) for _ in range(3)]
    texts = ["a", "b", "c"] * 6000
    chosen = choose_texts(keys, texts, seed=0, epoch=0)
    counts = np.bincount(chosen % 3, minlength=3)
    assert len(chosen) == 6000 and abs(counts - 2000).max() < 5 * math.sqrt(6000 * 2 / 9)


def test_keep_rate_is_the_probability_and_certain_texts_stay():
    n = 8000
    keys, texts = [f"k{key}" for key in range(n)], ["t"] * n
    for entry, p in enumerate(PROBS.tolist()):
        kept = select(keys, texts, *csr([[entry]] * n), ["en"] * n, {"en": PROBS}, seed=1, epoch=0)
        assert abs(len(kept) - n * p) <= 5 * math.sqrt(n * p * (1 - p))


def test_identical_texts_of_one_image_are_one_candidate():
    assert choose_texts(["a", "a"], ["t", "t"], seed=0, epoch=0).tolist() == [0]


def test_no_rows():
    assert select([], [], *csr([]), [], {"en": PROBS}, seed=0, epoch=0).tolist() == []


def test_language_without_probabilities():
    with pytest.raises(UserError, match="no balancing probabilities for language 'xx'"):
        select(["k"], ["t"], *csr([[0]]), ["xx"], {"en": PROBS}, seed=0, epoch=0)


def test_draws_of_two_purposes_are_independent():
    hashes = hash_keys([f"k{key}" for key in range(20000)])
    one, two = (uniform(hashes, seed=0, epoch=0, purpose=purpose) for purpose in ("keep", "crop"))
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.03 and 0 <= one.min() and one.max() < 1


strings = st.lists(st.one_of(st.text(max_size=40), st.text("ab", max_size=40), st.just("")), max_size=12)


def naive_hash(text: str) -> int:
    """The formula in ``hash_keys``'s docstring, in Python's integers."""
    m = 2**64

    def mix(z: int) -> int:
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % m
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % m
        return z ^ (z >> 31)

    raw = text.encode("utf-8", "surrogatepass")
    total = len(raw) * 0xD6E8FEB86659FD93
    for j in range(max(-(-len(raw) // 8), 1)):
        total += mix((int.from_bytes(raw[8 * j : 8 * j + 8], "little") + (j + 1) * 0x9E3779B97F4A7C15) % m)
    return mix(total % m)


@given(strings)
def test_hashes_follow_the_formula(texts):
    assert hash_keys(texts).tolist() == [naive_hash(text) for text in texts]


def test_hashes_of_long_strings_and_of_lone_surrogates():
    texts = ["x" * 1_000_003, "", "\ud800", "y" * 7, "z" * 8, "w" * 9] * 2
    assert hash_keys(texts).tolist() == [naive_hash(text) for text in texts]


@settings(deadline=None)  # the first example loads compiled code
@given(strings, st.sampled_from([pa.string(), pa.large_string()]), st.integers(0, 5), st.integers(0, 5))
def test_compiled_hashes_are_the_same(texts, kind, before, after):
    column = pa.array(["x"] * before + texts + ["y"] * after, kind).slice(before, len(texts))
    assert hash_column(column).tolist() == hash_keys(texts).tolist()


def test_hashes_of_structured_keys_are_distinct_and_even():
    """Digits swapped between words, numbered names and growing runs of one letter."""
    keys = [f"{a:08d}{b:08d}" for a in range(400) for b in range(400)]
    keys += [f"https://example.org/images/{n}.jpg" for n in range(100_000)] + ["a" * n for n in range(500)]
    hashes = hash_keys(keys)
    assert len(np.unique(hashes)) == len(keys)
    bits = (hashes[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    assert abs(bits.mean(axis=0) - 0.5).max() < 5 * 0.5 / math.sqrt(len(keys))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("stuv")), max_size=14))
def test_the_lowest_draw_of_an_image_wins(rows):
    """Images in any order, an image's rows apart, texts repeated."""
    keys, texts = hash_keys([key for key, _ in rows]), hash_keys([text for _, text in rows])
    of_key = random_uint64(keys, seed=4, epoch=2, purpose="text of key")
    draws = random_uint64(texts ^ of_key, seed=4, epoch=2, purpose="text").tolist()
    expected = [min((n for n, row in enumerate(rows) if row[0] == key), key=lambda n: draws[n]) for key, _ in rows]
    assert choose_texts(keys, texts, seed=4, epoch=2).tolist() == sorted(set(expected))
