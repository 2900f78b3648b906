"""Count the words of a language's corpora, in parallel over batches of articles or lines.

One process reads and hands out batches of about a million characters; the workers strip markup, split words and count.
Counts are summed exactly, so the result does not depend on the number of processes.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mc2_hpc.metadata.ngrams import NgramCounts, read_lines
from mc2_hpc.metadata.segmenters import load_segmenter
from mc2_hpc.metadata.wikipedia import read_articles
from mc2_hpc.metadata.wikitext import plain_text
from mc2_hpc.metadata.workers import Workers

_BATCH_CHARS = 1 << 20


@dataclass(frozen=True)
class _Batch:
    texts: list[str]
    """Lines of text, or articles in wikitext."""
    file_namespaces: frozenset[str] | None
    """Of the articles' wiki; None for lines of text."""


def count_corpus(
    paths: Iterable[Path], lang: str, segmenter: str, workers: Workers, told: Callable[[int, str], None] | None = None
) -> NgramCounts:
    """Words and pairs in text files and Wikipedia dumps (``.xml.bz2``), split by the named segmenter.

    Args:
        told: called with the number of lines or articles just handed out, and the name of their file.

    Raises:
        UserError: a file cannot be read, or the segmenter is not installed.
    """
    load_segmenter(segmenter, lang)  # fails before anything is read if it is missing
    counts = NgramCounts()

    def batches() -> Iterator[_Batch]:
        for path in paths:
            for batch in _batches(path):
                if told:
                    told(len(batch.texts), path.name)
                yield batch

    for part in workers.map(partial(_count, lang=lang, segmenter=segmenter), batches()):
        counts.add(part)
    return counts


def _batches(path: Path) -> Iterator[_Batch]:
    articles = read_articles(path) if path.name.endswith(".xml.bz2") else ((line, None) for line in read_lines(path))
    texts: list[str] = []
    chars, namespaces = 0, None
    for text, namespaces in articles:
        texts.append(text)
        chars += len(text)
        if chars >= _BATCH_CHARS:
            yield _Batch(texts, namespaces)
            texts, chars = [], 0
    if texts:
        yield _Batch(texts, namespaces)


def _count(batch: _Batch, lang: str, segmenter: str) -> NgramCounts:
    lines: Iterable[str] = batch.texts
    if batch.file_namespaces is not None:
        lines = (line for text in batch.texts for line in plain_text(text, batch.file_namespaces))
    return NgramCounts.of_lines(lines, load_segmenter(segmenter, lang))
