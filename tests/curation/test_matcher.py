"""The matcher equals a naive scan by the rules, in both modes, built or loaded."""

import itertools
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc2_hpc.curation.matching.matcher import Matcher, is_saved
from mc2_hpc.curation.matching.rules import MODES, entry_pattern, spaced_text
from mc2_hpc.errors import UserError

ALPHABET = "ab .,!'-+\t\n\u00a0\u200b\u3000e\u0301é犬京カメ강지ไทก\u1100\u1161\U00020000😀«»"
ALPHABET += "\u200d\u200f\ufe0f\u05b8ש\u064b\u0654ـاа\u20e35\U000e0100"
words = st.text(alphabet=ALPHABET, min_size=1, max_size=7)


def naive(entries: list[str], texts: list[str], mode: str) -> list[list[int]]:
    """Every pattern against every text with `in`; of equal patterns, the first counts."""
    patterns: dict[str, int] = {}
    for number, entry in enumerate(entries):
        patterns.setdefault(entry_pattern(entry, mode), number)
    return [sorted(n for p, n in patterns.items() if p in spaced_text(text, mode)) for text in texts]


def rows(matches: tuple[np.ndarray, np.ndarray]) -> list[list[int]]:
    offsets, ids = matches
    assert offsets.dtype == np.int64 and ids.dtype == np.uint32 and offsets[0] == 0 and offsets[-1] == len(ids)
    return [ids[a:b].tolist() for a, b in zip(offsets, offsets[1:], strict=False)]


def usable(entry: str) -> bool:
    return bool(spaced_text(entry, "fixed").strip() and entry.strip())


@pytest.mark.parametrize("mode", MODES)
@settings(max_examples=300, deadline=None)
@given(
    entries=st.lists(words.filter(usable), min_size=1, max_size=12, unique=True),
    texts=st.lists(st.text(alphabet=ALPHABET, max_size=30), max_size=6),
    data=st.data(),
)
def test_equals_naive_scan(mode, entries, texts, data):
    # Texts made from the entries themselves match far more often than random texts.
    pieces = st.sampled_from([*entries, " ", "", ", ", "a"])
    texts = [*texts, "".join(data.draw(st.lists(pieces, max_size=8)))]
    assert rows(Matcher.build(entries, mode).match(texts)) == naive(entries, texts, mode)


@pytest.mark.parametrize("mode", MODES)
def test_overlapping_long_and_nested_patterns(mode):
    entries = [
        "a",
        "a a",
        "a a a",
        "internationalisation",
        "internationalisation b",
        "b internationalisation",
        "犬",
        "子犬",
        "犬が",
    ]
    texts = ["a a a a", "b internationalisation b", "子犬が a", "internationalisations"]
    assert rows(Matcher.build(entries, mode).match(texts)) == naive(entries, texts, mode)


def test_many_matches_in_one_text():
    entries = [f"w{n}" for n in range(500)]
    text = " ".join(f"w{n % 500}" for n in range(2000, 0, -1))
    assert rows(Matcher.build(entries).match([text, "", text])) == [list(range(500)), [], list(range(500))]


def colliding_tokens() -> tuple[str, str]:
    """Two 16-letter tokens with the same hash in the tables, found by inverting the hash's second round."""

    def first_round(chunk: bytes) -> int:
        digest = ((16 ^ int.from_bytes(chunk, "little")) * 0xBF58476D1CE4E5B9) % 2**64
        return digest ^ (digest >> 29)

    one, tail = b"abcdefgh", b"ijklmnop"
    wanted = first_round(one) ^ int.from_bytes(tail, "little")
    for letters in itertools.product(b"abcdefghijklmnopqrst", repeat=4):
        other = b"wxyz" + bytes(letters)
        end = (first_round(other) ^ wanted).to_bytes(8, "little")
        if end.isascii() and end.decode().isprintable() and not set(end) & set(b" ,.;:?!`"):
            return (one + tail).decode(), (other + end).decode()
    raise AssertionError("no collision among the candidates")


def test_tokens_with_the_same_hash_are_told_apart():
    from mc2_hpc.curation.matching.trie_kernels import _padded, token_key

    one, other = colliding_tokens()
    keys = [token_key(_padded(np.frombuffer(token.encode(), np.uint8)), 0, 16) for token in (one, other)]
    assert one != other and keys[0] == keys[1]
    assert rows(Matcher.build([one], "compat").match([other, one])) == [[], [0]]
    assert rows(Matcher.build([one, other], "compat").match([other, one])) == [[1], [0]]


def test_compiled_matching_is_kept_for_this_source_of_the_tables_alone():
    from mc2_hpc.curation.matching.match_kernels import match_texts
    from mc2_hpc.curation.matching.trie_kernels import SOURCE

    Matcher.build(["a"]).match(["a"])
    assert match_texts.signatures
    assert all(f"omitted(default={SOURCE})" in map(str, signature) for signature in match_texts.signatures)


@pytest.mark.parametrize("mode", MODES)
def test_a_caption_of_ten_megabytes(mode):
    matcher = Matcher.build(["needle", "針", "a b", "straw"], mode)
    hay = "straw " * 1_700_000
    texts = ["needle", hay + "needle 針 a b " + hay, "a b", "," * 10_000_000, "x" * 10_000_000, ""]
    assert rows(matcher.match(texts)) == [[0], [0, 1, 2, 3], [2], [], [], []]


def test_more_matches_than_were_given_room():
    # Nested phrases have a number of matches quadratic in the length of the text, far more than 8 per text.
    entries = [" ".join(["a"] * size) for size in range(1, 61)]
    nested = [*(" ".join(["a"] * size) for size in range(50, 60)), "犬"]
    assert rows(Matcher.build(entries, "fixed").match(nested)) == naive(entries, nested, "fixed")
    characters = ["犬" * size for size in range(1, 61)]
    assert rows(Matcher.build(characters, "fixed").match(["犬" * 60, "犬"])) == [list(range(60)), [0]]


@pytest.mark.parametrize("mode", MODES)
def test_texts_of_nothing_but_spaces_and_punctuation(mode):
    texts = ["", " ", "\t\n", ",", ".,.", "...", "!!! ?", "«»", " - ", "\u200b", "``"]
    entries = ["dog", ",", ".", "!", "-", "...", "?", "«"]
    assert rows(Matcher.build(entries, mode).match(texts)) == naive(entries, texts, mode)
    assert rows(Matcher.build(["dog"], mode).match(texts)) == [[]] * len(texts)


def test_blocks_of_many_and_of_long_texts():
    entries = ["one", "two", "one two", "犬"]
    texts = ["one", "", "two 犬", "one two " * 40] * 700 + ["two " * 9000] + ["one", "two"] * 300
    assert rows(Matcher.build(entries).match(texts)) == naive(entries, texts, "fixed")


def test_lone_surrogates_are_refused():
    with pytest.raises(UserError, match="drop texts that are not UTF-8"):
        Matcher.build(["dog"]).match(["dog", "a \ud800 dog"])
    with pytest.raises(UserError, match="lone surrogate"):
        Matcher.build(["dog", "\udfff"])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("entries", [["dog", "big dog"], ["犬"], ["dog", "犬", "C++", "internationalisation"]])
def test_saved_tables_match_alike_and_are_the_same_bytes(tmp_path, mode, entries):
    texts = ["big dog, 子犬 C++ internationalisation", ""]
    matcher = Matcher.build(entries, mode)
    assert not is_saved(tmp_path / "a")
    matcher.save(tmp_path / "a")
    Matcher.build(entries, mode).save(tmp_path / "b")
    loaded = Matcher.load(tmp_path / "a")
    assert is_saved(tmp_path / "a") and loaded.mode == mode and loaded.num_entries == len(entries)
    assert rows(loaded.match(texts)) == rows(matcher.match(texts)) == naive(entries, texts, mode)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_arrow_input_slices_chunks_and_nulls():
    matcher = Matcher.build(["dog", "é"])
    array = pa.array(["x", "dog", None, "e\u0301 dog", "dog"])
    assert rows(matcher.match(array)) == [[], [0], [], [0, 1], [0]]
    assert rows(matcher.match(array[1:4])) == [[0], [], [0, 1]]
    assert rows(matcher.match(pa.chunked_array([array[:1], array[3:]]))) == [[], [0, 1], [0]]
    assert rows(matcher.match(pa.array([], pa.string()))) == rows(matcher.match([])) == []


def test_invalid_utf8_is_refused_not_read_past():
    broken = pa.array([b"dog \xe4\xb8", b"dog"]).view(pa.string())
    with pytest.raises(UserError, match="drop texts that are not UTF-8"):
        Matcher.build(["dog"]).match(broken)


def test_bad_entries():
    with pytest.raises(UserError, match="entries 0 and 2 are both 'dog'"):
        Matcher.build(["dog", "cat", "dog"])
    with pytest.raises(UserError, match="entry 1 is blank"):
        Matcher.build(["dog", ""])
    with pytest.raises(UserError, match="no entries"):
        Matcher.build([])
    with pytest.raises(UserError, match="mode 'x'"):
        Matcher.build(["dog"], "x")


def test_entries_written_alike_give_the_match_to_the_first():
    assert rows(Matcher.build(["U. S.", "U.S."]).match(["U.S."])) == [[0]]
    assert rows(Matcher.build(["e\u0301", "é"]).match(["é"])) == [[0]]


def test_a_word_with_points_and_without_has_one_vote():
    matcher = Matcher.build(["שָׁלוֹם", "שלום", "كِتاب"])
    assert rows(matcher.match(["שלום", "שָׁלוֹם עולם", "كتاب", "كـتـاب", "كِتَاب"])) == [[0], [0], [2], [2], [2]]
    assert rows(Matcher.build(["שָׁלוֹם", "שלום"], "compat").match(["שלום", "שָׁלוֹם"])) == [[1], [0]]


def test_an_entry_of_which_nothing_is_left_never_matches():
    marks = ["\u0640", "\u200f", "\u05b8"]
    assert rows(Matcher.build([*marks, "dog"]).match(["a dog", *marks, ""])) == [[3], [], [], [], []]


def test_tables_of_another_version_count_as_unsaved(tmp_path):
    Matcher.build(["dog"]).save(tmp_path)
    assert is_saved(tmp_path)
    info = json.loads((tmp_path / "matcher.json").read_text())
    (tmp_path / "matcher.json").write_text(json.dumps({**info, "format": info["format"] - 1}))
    assert not is_saved(tmp_path)


def test_damaged_tables(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Matcher.load(tmp_path)
    Matcher.build(["dog"]).save(tmp_path)
    (tmp_path / "vocabulary.npy").write_bytes(b"")
    with pytest.raises(UserError, match="vocabulary.npy: .*damaged matcher table"):
        Matcher.load(tmp_path)
    np.save(tmp_path / "vocabulary.npy", np.zeros(8, np.float32))
    with pytest.raises(UserError, match="vocabulary.npy: .*damaged matcher table"):
        Matcher.load(tmp_path)
    (tmp_path / "matcher.json").write_text('{"format": 0}')
    with pytest.raises(UserError, match="another format"):
        Matcher.load(tmp_path)
