"""Unigrams and bigrams of a text corpus, ranked as metadata candidates.

Bigrams are ranked by the corrected score of the Meta CLIP 2 paper's NeurIPS version (appendix A.2)::

    score = (c12 + 1) ** 0.7 * (PMI - PMI_30)          PMI = log(c12 * N / (c1 * c2))

where c12, c1, c2 are the counts of the bigram and its words, N is the number of words, and PMI_30 is the 30th
percentile of PMI over the corpus's distinct bigrams. A raw threshold on PMI, as in MetaCLIP 1, admits only words seen a
handful of times (PMI is at most log(N / c)); the power of c12 fixes that. The base of the logarithm scales every score
equally and so cannot change the rank.

Counts are exact: nothing is pruned. A distinct bigram takes 16 bytes, and about four times that while tables are
merged.
"""

import gzip
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mc2_hpc.errors import UserError
from mc2_hpc.metadata.scripts import is_punctuation, is_pure_punctuation, is_release_unspaced
from mc2_hpc.reading.files import check_regular

Segmenter = Callable[[str], Sequence[str]]
"""Splits a line of text into non-empty words without surrounding white space; punctuation marks are separate words."""


class Spacing(dict[int, int | str]):
    """Table for ``str.translate`` that puts a space on both sides of characters that are separate words."""

    def __init__(self, is_word: Callable[[str], bool]) -> None:
        super().__init__()
        self._is_word = is_word

    def __missing__(self, code: int) -> int | str:
        char = chr(code)
        self[code] = f" {char} " if self._is_word(char) else code
        return self[code]


_WORD_SPACING = Spacing(lambda char: is_punctuation(char) or is_release_unspaced(char))
_TAG = re.compile(r"&lt;.*?&gt;|<.*?>")
_BREAK = -1
"""Stands for anything that a bigram must not span."""
_LONGEST_LINE = 64 << 20
"""In bytes."""
_SHIFT, _LOW = np.uint64(32), np.uint64(0xFFFFFFFF)
_DECIMALS = 6
"""Scores are rounded before comparison: the last bits of a logarithm depend on the processor."""


def split_words(text: str) -> list[str]:
    """Split at white space, and around every punctuation mark and every character of a script without spaces.

    This is the recipe's tokenizer for languages without a segmenter; kana and hangul are not split.
    """
    return text.translate(_WORD_SPACING).split()


class _Ids(dict[str, int]):
    """Numbers the words in order of arrival; pure punctuation is :data:`_BREAK`."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []

    def __missing__(self, word: str) -> int:
        self[word] = _BREAK if is_pure_punctuation(word) else len(self.words)
        if self[word] != _BREAK:
            self.words.append(word)
        return self[word]


class NgramCounts:
    """How often each word and each pair of adjacent words was seen."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._unigrams = np.zeros(0, np.int64)
        self._pairs = np.zeros(0, np.uint64)  # sorted; first word's id in the high half, second's in the low
        self._pair_counts = np.zeros(0, np.int64)
        self._pending: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]] = []

    @classmethod
    def of_lines(cls, lines: Iterable[str], segment: Segmenter = split_words) -> "NgramCounts":
        """Counts of ``lines``, held as one array: pass at most a few million words, and merge with :meth:`add`.

        Tags are stripped; no pair spans punctuation or a line break.
        """
        ids = _Ids()
        flat: list[int] = []
        for line in lines:
            flat.extend(map(ids.__getitem__, segment(_TAG.sub("", line))))
            flat.append(_BREAK)
        sequence = np.array(flat, dtype=np.int64)
        counts = cls()
        counts._ids = {word: number for number, word in enumerate(ids.words)}
        counts._unigrams = np.bincount(sequence[sequence != _BREAK], minlength=len(ids.words))
        first, second = sequence[:-1], sequence[1:]
        whole = (first != _BREAK) & (second != _BREAK)
        keys = (first[whole].astype(np.uint64) << _SHIFT) | second[whole].astype(np.uint64)
        counts._pairs, counts._pair_counts = np.unique(keys, return_counts=True)
        return counts

    def add(self, other: "NgramCounts") -> None:
        """Add the counts of ``other``; the sum does not depend on the order of additions."""
        ids = self._ids
        place = np.fromiter((ids.setdefault(word, len(ids)) for word in other._ids), np.int64, len(other._ids))
        if len(ids) > len(self._unigrams):
            grown = np.zeros(max(len(ids), 2 * len(self._unigrams)), np.int64)
            grown[: len(self._unigrams)] = self._unigrams
            self._unigrams = grown
        self._unigrams[place] += other._unigrams[: len(place)]
        pairs, pair_counts = other._merged_pairs()
        place = place.astype(np.uint64)
        self._pending.append(((place[pairs >> _SHIFT] << _SHIFT) | place[pairs & _LOW], pair_counts))
        if sum(len(keys) for keys, _ in self._pending) > max(len(self._pairs), 1 << 20):
            self._merged_pairs()

    def _merged_pairs(self) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64]]:
        """Distinct pairs, sorted by ids, and their counts."""
        if self._pending:
            keys = np.concatenate([self._pairs, *(keys for keys, _ in self._pending)])
            counts = np.concatenate([self._pair_counts, *(counts for _, counts in self._pending)])
            self._pending = []
            order = np.argsort(keys)
            keys, counts = keys[order], counts[order]
            starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])[: len(keys)])
            self._pairs, self._pair_counts = keys[starts], np.add.reduceat(counts, starts) if len(keys) else counts
        return self._pairs, self._pair_counts

    def unigrams(self) -> dict[str, int]:
        """The count of every word."""
        return dict(zip(self._ids, self._unigrams.tolist(), strict=False))

    def bigrams(self) -> dict[tuple[str, str], int]:
        """The count of every pair; for small corpora."""
        words = list(self._ids)
        pairs, counts = self._merged_pairs()
        named = ((words[pair >> 32], words[pair & 0xFFFFFFFF]) for pair in pairs.tolist())
        return dict(zip(named, counts.tolist(), strict=True))

    def rank_unigrams(self, min_count: int) -> list[str]:
        """Words seen at least ``min_count`` times, most frequent first; equal counts in code-point order."""
        return [w for _, w in sorted((-count, word) for word, count in self.unigrams().items() if count >= min_count)]

    def rank_bigrams(self, min_pmi: float | None = None) -> Iterator[tuple[str, str]]:
        """Word pairs with a positive score (module docstring), best first; equal scores in code-point order.

        Args:
            min_pmi: in bits (PMI to base 2); pairs below it are left out.
        """
        pairs, both = self._merged_pairs()
        if not len(pairs):
            return
        log_unigrams = np.log(np.maximum(self._unigrams, 1))
        pmi = np.log(both) + np.log(self._unigrams.sum())
        pmi -= log_unigrams[pairs >> _SHIFT]
        pmi -= log_unigrams[pairs & _LOW]
        score = np.round((both + 1.0) ** 0.7 * (pmi - np.percentile(pmi, 30)), _DECIMALS)
        wanted = score > 0
        if min_pmi is not None:
            wanted &= np.round(pmi / np.log(2), _DECIMALS) >= min_pmi
        best = np.flatnonzero(wanted)
        best = best[np.argsort(-score[best], kind="stable")]
        words = list(self._ids)
        for _, tied in groupby(best, key=score.__getitem__):
            yield from sorted((words[int(pairs[i]) >> 32], words[int(pairs[i]) & 0xFFFFFFFF]) for i in tied)


def read_lines(path: str | Path) -> Iterator[str]:
    """Lines of a UTF-8 file, gzipped if its name ends in ``.gz``, without line breaks.

    Raises:
        UserError: the file is missing, not UTF-8, has a line of over 64 MiB, or is named ``.gz`` but not gzip.
    """
    path = Path(path)
    check_regular(path)
    opener = gzip.open if path.suffix == ".gz" else open
    number = 0
    try:
        with opener(path, "rb") as stream:
            for number, raw in enumerate(iter(lambda: stream.readline(_LONGEST_LINE + 1), b""), start=1):
                if len(raw) > _LONGEST_LINE:
                    raise UserError(
                        f"{path}: line {number} is longer than {_LONGEST_LINE:,} bytes, so this is not text"
                    )
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: line {number} is not UTF-8 ({error.reason}); convert the file first") from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read beyond line {number} ({error})") from None
