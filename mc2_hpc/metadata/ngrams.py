"""Unigrams and bigrams of a text corpus, ranked as metadata candidates.

Bigrams are ranked by the corrected score of the Meta CLIP 2 paper's NeurIPS version (appendix A.2)::

    score = (c12 + 1) ** 0.7 * (PMI - PMI_30)          PMI = log(c12 * N / (c1 * c2))

with c12, c1, c2 the counts of the bigram and its words, N the number of words, and PMI_30 the 30th percentile of PMI
over the corpus' distinct bigrams. A raw threshold on PMI, as in MetaCLIP 1, admits only words seen a handful of times
(PMI is at most log(N / c)); the power of c12 mends that. The logarithm's base scales every score alike and so cannot
change the rank.
"""

import gzip
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mc2_hpc.errors import UserError
from mc2_hpc.metadata.scripts import is_punctuation, is_pure_punctuation, is_release_unspaced

Segmenter = Callable[[str], Sequence[str]]
"""Splits one line of text into words; punctuation marks are words of their own."""

_TAG = re.compile(r"&lt;.*?&gt;|<.*?>")


@dataclass
class NgramCounts:
    """How often each word and each pair of neighbouring words was seen."""

    unigrams: Counter[str] = field(default_factory=Counter)
    bigrams: Counter[tuple[str, str]] = field(default_factory=Counter)


def split_words(text: str) -> list[str]:
    """Split at white space, and around every punctuation mark and every character of a script without spaces.

    The recipe's tokenizer for languages without a segmenter; kana and hangul are not split.
    """
    words: list[str] = []
    start = -1
    for position, char in enumerate(text):
        alone = is_punctuation(char) or is_release_unspaced(char)
        if alone or char.isspace():
            if start >= 0:
                words.append(text[start:position])
                start = -1
            if alone:
                words.append(char)
        elif start < 0:
            start = position
    if start >= 0:
        words.append(text[start:])
    return words


def count_ngrams(lines: Iterable[str], segment: Segmenter = split_words) -> NgramCounts:
    """Count the words and word pairs of ``lines``; tags are stripped, and no pair spans punctuation or a line's end."""
    counts = NgramCounts()
    for line in lines:
        words = [word.strip() for word in segment(_TAG.sub("", line))]
        words = ["" if is_pure_punctuation(word) else word for word in words]
        counts.unigrams.update(word for word in words if word)
        counts.bigrams.update(pair for pair in zip(words, words[1:], strict=False) if pair[0] and pair[1])
    return counts


def rank_unigrams(counts: NgramCounts, min_count: int) -> list[str]:
    """Words seen at least ``min_count`` times, most frequent first; equal counts in code-point order."""
    kept = [(-count, word) for word, count in counts.unigrams.items() if count >= min_count]
    return [word for _, word in sorted(kept)]


def rank_bigrams(counts: NgramCounts) -> list[tuple[str, str]]:
    """Word pairs with a positive score (module docstring), best first; equal scores in code-point order."""
    if not counts.bigrams:
        return []
    pairs = list(counts.bigrams)
    both = np.array([counts.bigrams[pair] for pair in pairs], dtype=np.float64)
    first = np.array([counts.unigrams[pair[0]] for pair in pairs], dtype=np.float64)
    second = np.array([counts.unigrams[pair[1]] for pair in pairs], dtype=np.float64)
    pmi = np.log(both) + np.log(counts.unigrams.total()) - np.log(first) - np.log(second)
    score = (both + 1) ** 0.7 * (pmi - np.percentile(pmi, 30))
    kept = [(-value, pair) for value, pair in zip(score.tolist(), pairs, strict=True) if value > 0]
    return [pair for _, pair in sorted(kept)]


def read_lines(path: str | Path) -> Iterator[str]:
    """Lines of a UTF-8 ``.txt`` or ``.txt.gz`` file, without their ends.

    Raises:
        UserError: missing, not gzip although named so, or not UTF-8.
    """
    path = Path(path)
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as stream:
            for number, raw in enumerate(stream, start=1):
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {number} is not UTF-8 ({error.reason}); convert the file first") from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
