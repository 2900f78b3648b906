"""Lemmas of wordnets: Open Multilingual Wordnet tab files, WN-LMF XML, Princeton's WNDB, plain word lists.

Princeton's WordNet (English) contributes what MetaCLIP took from it: the name of every synset, which is its first word,
in lower case. WordNet 3.0 has 86,571 distinct names; the recipe's 86,654 are these truncated at their first full stop
("u.s." becomes "u"), and the numbers 0-99. Here they are not truncated. The other formats contribute every lemma, with
its case kept.
"""

import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast
from xml.etree import ElementTree

from mc2_hpc.errors import UserError
from mc2_hpc.metadata.languages import LANGUAGES, code_of_wordnet
from mc2_hpc.metadata.lemmas import LemmaTally
from mc2_hpc.metadata.ngrams import read_lines
from mc2_hpc.reading.files import check_regular

TAB_FILE = re.compile(r"wn-(?:data|wikt|cldr|nodia)-([a-z]{3})\.tab(?:\.gz)?")
WNDB_FILES = ("data.noun", "data.verb", "data.adj", "data.adv")
_PLUS_JOINS = ("zh", "ja", "fr")
"""Languages whose wordnet joins the parts of a lemma with "+"."""
_ADJECTIVE_POSITION = re.compile(r"\((?:a|p|ip)\)$")


def read_lemmas(lang: str, path: str | Path, tally: LemmaTally | None = None) -> Iterator[str]:
    """Lemmas of a wordnet file or folder in its order, duplicates included, with ``_`` replaced by a space.

    The name gives the format: ``*.tab[.gz]``, ``*.xml[.gz]``, a folder of WNDB's ``data.*``, otherwise a word list.
    Markup is removed, see :mod:`mc2_hpc.metadata.lemmas`.

    Args:
        tally: counts the lemmas that had markup.

    Raises:
        UserError: the file cannot be read, a line is not in its format (it is named), or it is another language's.
    """
    path = Path(path)
    name = path.name.removesuffix(".gz")
    if path.is_dir():
        lemmas = _wndb(path)
    elif name.endswith(".tab"):
        lemmas = _tab(lang, path)
    elif name.endswith(".xml"):
        lemmas = _lmf(path)
    else:
        lemmas = read_lines(path)
    tally = LemmaTally() if tally is None else tally
    for lemma in lemmas:
        lemma = lemma.replace("_", " ")
        yield from tally.words(lemma.replace("+", "") if lang in _PLUS_JOINS else lemma)


def owner_of(path: Path) -> str | None:
    """Our language code for the name of an Open Multilingual Wordnet file; None for other names."""
    match = TAB_FILE.fullmatch(path.name)
    return code_of_wordnet(match[1]) if match else None


def wordnet_files(path: Path) -> list[Path]:
    """The files that :func:`read_lemmas` reads for ``path``."""
    return [path / name for name in WNDB_FILES] if path.is_dir() else [path]


def _tab(lang: str, path: Path) -> Iterator[str]:
    """Third field of the lines ``<synset> TAB [<code>:]lemma TAB <lemma>``; definitions and roots are left out.

    OMW has its own codes. A file of another language is refused: ``wn-data-als.tab`` is Albanian, not Alemannic.
    """
    owner = owner_of(path)
    if owner is not None and owner != lang:
        raise UserError(f"{path}: the wordnet of {LANGUAGES[owner].name}; move it to the folder {owner}/")
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.split("\t")
        if len(fields) < 3:
            raise UserError(f"{path}: line {number}: {line[:60]!r} is not <synset> TAB <type> TAB <lemma>")
        if fields[1] == "lemma" or re.fullmatch(r"[\w-]+:lemma", fields[1]):
            yield fields[2].strip()


def _lmf(path: Path) -> Iterator[str]:
    """``writtenForm`` of every Lemma in a WN-LMF file, streamed."""
    check_regular(path)
    opener = gzip.open if path.suffix == ".gz" else open
    found = False
    try:
        with opener(path, "rb") as stream:
            events = ElementTree.iterparse(cast(IO[bytes], stream), ("start", "end"))
            _, root = next(events)
            for event, element in events:
                if event == "end" and element.tag in ("LexicalEntry", "Synset"):
                    lemma = element.find("Lemma")
                    if lemma is not None:
                        found = True
                        yield lemma.get("writtenForm", "")
                    element.clear()
                elif event == "start" and element.tag == "Lexicon":
                    root = element
                if event == "end" and len(root) > 1024:
                    root.clear()
    except ElementTree.ParseError as error:
        raise UserError(f"{path}: line {error.position[0]} is not XML ({error})") from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if not found:
        raise UserError(f"{path}: no Lemma in it; expected a wordnet in WN-LMF")


def _wndb(folder: Path) -> Iterator[str]:
    """First word of every synset in ``data.*``, in lower case, without the position mark of adjectives."""
    for name in WNDB_FILES:
        path = folder / name
        for number, line in enumerate(read_lines(path), start=1):
            if line.startswith("  ") or not line:  # the licence
                continue
            fields = line.split(" ", 5)  # offset, file, part of speech, number of words in hex, first word
            if len(fields) < 6 or not fields[0].isdecimal():
                raise UserError(f"{path}: line {number} is not a synset: {line[:60]!r}")
            yield _ADJECTIVE_POSITION.sub("", fields[4]).lower()
