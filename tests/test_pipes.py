"""A pipe in place of an input file is one line: opening it would wait for a writer that never comes."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mc2_hpc.curation.decontaminate import _images_of
from mc2_hpc.curation.pool.common_crawl import ArchiveReader
from mc2_hpc.errors import UserError
from mc2_hpc.metadata.ngrams import read_lines
from mc2_hpc.metadata.pageviews import _blocks
from mc2_hpc.metadata.wikipedia import read_articles
from mc2_hpc.metadata.wordnet import _lmf

READERS: dict[str, Callable[[Path], Any]] = {
    "b.warc": lambda path: list(ArchiveReader(path).rows()),
    "b.warc.gz": lambda path: list(ArchiveReader(path).rows()),
    "corpus.txt": lambda path: list(read_lines(path)),
    "corpus.txt.gz": lambda path: list(read_lines(path)),
    "dump.xml.bz2": lambda path: list(read_articles(path)),
    "views.gz": lambda path: list(_blocks(path)),
    "wordnet.xml": lambda path: list(_lmf(path)),
    "image.jpg": lambda path: [read() for _, read in _images_of([path])],
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", READERS)
def test_a_pipe_is_refused(tmp_path: Path, name: str) -> None:
    os.mkfifo(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: is a named pipe; name a file"):
        READERS[name](tmp_path / name)
