"""Metadata and captions for the curation benchmarks, the same in every call.

Real text is read from the test data folder beside the checkout if there is one. The rest, or everything if there is
none, is generated: words of random letters with Zipf frequencies. The proportions follow English MetaCLIP (half
unigrams, a fifth bigrams, the rest longer phrases).
"""

import bz2
import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LETTERS = "etaoinshrdlucmfwypvbgkjqxz"
IDEOGRAPHS = "".join(chr(code) for code in range(0x4E00, 0x4E00 + 3500))
_MARKS = (" ", " ", " ", " ", ", ", " - ", ": ", ". ", "! ")


@dataclass(frozen=True)
class Corpus:
    """Entries of one language and captions to match with them."""

    entries: list[str]
    captions: list[str]
    source: str
    """Where the text is from: ``real`` (as far as available, the rest generated) or ``generated``."""


def english(num_entries: int, num_captions: int, data: Path = SHARED_DATA) -> Corpus:
    """English-like corpus: real sentences with their words and phrases first, followed by generated ones."""
    rng = np.random.default_rng(0)
    sentences = _real_sentences(data) if data.is_dir() else []
    words, bigrams, trigrams = _grams(sentences)
    made = generated_words(rng, num_entries, LETTERS, 3, 13)
    half, fifth = num_entries // 2, num_entries // 5
    entries = dict.fromkeys([*words, *made][:half])
    entries |= dict.fromkeys([*bigrams, *_phrases(rng, made, num_entries, 2)][:fifth])
    longer = [*_titles(data), *trigrams, *_phrases(rng, made, num_entries, 3), *made]
    fill = iter(longer)
    while len(entries) < num_entries:
        entries[next(fill)] = None
    captions = [sentences[n] for n in rng.permutation(len(sentences))[: num_captions * 3 // 4]]
    captions += _drawn_captions(rng, list(entries), num_captions - len(captions))
    order = rng.permutation(num_captions)
    return Corpus(list(entries), [captions[n] for n in order], "real" if sentences else "generated")


def spaceless(num_entries: int, num_captions: int) -> Corpus:
    """Chinese-like corpus: words of one to four ideographs, captions without a space, all generated."""
    rng = np.random.default_rng(1)
    entries = generated_words(rng, num_entries, IDEOGRAPHS, 1, 4)
    ranks = _zipf(rng, (num_captions, 12), len(entries))
    captions = ["".join(entries[rank] for rank in row) for row in ranks.tolist()]
    return Corpus(entries, captions, "generated")


def generated_words(rng: np.random.Generator, count: int, letters: str, shortest: int, longest: int) -> list[str]:
    """``count`` distinct words; letters are drawn with Zipf frequencies in the given order."""
    words: dict[str, None] = {}
    alphabet = np.array(list(letters))
    while len(words) < count:
        lengths = rng.integers(shortest, longest + 1, count)
        drawn = alphabet[_zipf(rng, int(lengths.sum()), len(letters), 0.6)]
        flat, ends = "".join(drawn.tolist()), np.cumsum(lengths).tolist()
        words |= dict.fromkeys(flat[start:end] for start, end in zip([0, *ends], ends, strict=False))
    return list(words)[:count]


def _zipf(
    rng: np.random.Generator, shape: int | tuple[int, ...], num_ranks: int, exponent: float = 1.0
) -> npt.NDArray[np.int64]:
    weights = 1.0 / np.arange(1, num_ranks + 1) ** exponent
    cumulative = np.cumsum(weights)
    return np.searchsorted(cumulative / cumulative[-1], rng.random(shape))


def _phrases(rng: np.random.Generator, words: list[str], count: int, length: int) -> list[str]:
    ranks = _zipf(rng, (count, length), len(words))
    return [" ".join(words[rank] for rank in row) for row in ranks.tolist()]


def _drawn_captions(rng: np.random.Generator, entries: list[str], count: int) -> list[str]:
    ranks = _zipf(rng, (count, 5), len(entries))
    marks = rng.integers(0, len(_MARKS), (count, 5))
    return [
        "".join(entries[rank] + _MARKS[mark] for rank, mark in zip(row, row_marks, strict=True)).strip()
        for row, row_marks in zip(ranks.tolist(), marks.tolist(), strict=True)
    ]


def _real_sentences(data: Path) -> list[str]:
    with gzip.open(data / "multi30k" / "train.en.gz", "rt", encoding="utf-8") as stream:
        sentences = [line.strip() for line in stream]
    return sentences + list(dump_sentences(data))


def dump_sentences(data: Path) -> Iterable[str]:
    """Pieces of caption length (20 to 120 characters) of the shortened English Wikipedia dump, without most markup."""
    with bz2.open(_dump(data), "rt", encoding="utf-8") as stream:
        for line in stream:
            line = re.sub(r"&lt;.*?&gt;|<.*?>|\{\{.*?\}\}|\[https?:\S*|&\w+;|'{2,}|[\[\]{}|=*#]", " ", line)
            for clause in re.split(r"(?<=[.,;:])\s", " ".join(line.split())):
                yield from re.findall(r"\S.{18,118}(?=\s|$)", clause)


def _grams(sentences: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Words, pairs and triples between punctuation, most frequent first."""
    words: Counter[str] = Counter()
    bigrams: Counter[str] = Counter()
    trigrams: Counter[str] = Counter()
    for sentence in sentences:
        for run in re.split(r"[^\w\s'-]+", sentence):
            tokens = re.findall(r"\w+(?:['-]\w+)*", run)
            words.update(tokens)
            bigrams.update(f"{a} {b}" for a, b in pairwise(tokens))
            trigrams.update(" ".join(tokens[at : at + 3]) for at in range(len(tokens) - 2))
    return tuple([gram for gram, _ in counter.most_common()] for counter in (words, bigrams, trigrams))  # type: ignore[return-value]


def _titles(data: Path) -> list[str]:
    """English class names from Babel-ImageNet and page titles from the dump, some ending in a bracket."""
    if not data.is_dir():
        return []
    with bz2.open(_dump(data), "rt", encoding="utf-8") as stream:
        titles = re.findall(r"<title>([^<:&]+)</title>", stream.read())
    return json.loads((data / "babel_imagenet-298.json").read_text(encoding="utf-8"))["EN"][1] + titles


def _dump(data: Path) -> Path:
    return data / "wikipedia" / "enwiki-pages-articles-shortened.xml.bz2"
