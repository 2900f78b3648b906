"""The sources of a language's metadata, and the layout of a folder of sources.

::

    sources/
      sw/                                a Wikipedia's code (sw, zh_yue or zh-yue); each file may be missing
        wordnet.txt                      lemmas, one per line
        wn-data-swa.tab[.gz]             Open Multilingual Wordnet
        *.xml[.gz]                       a wordnet in WN-LMF
        wordnet/data.{noun,verb,adj,adv} Princeton's WNDB
        corpus*.txt[.gz]                 text, one sentence or paragraph per line
        *-pages-articles*.xml.bz2        Wikipedia dumps
        titles.txt                       titles, one per line, as `title` or `title<TAB>views`
        metadata.json                    entries to use unchanged; then no other source may be present
      **/wn-data-<code>.tab[.gz]         wordnets of any language, for languages without one in their own folder
      pageviews/pageviews-*.gz           hourly page views, for every folder without titles.txt
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from mc2_hpc.errors import UserError
from mc2_hpc.metadata.languages import code_of_folder, curation_code
from mc2_hpc.metadata.wordnet import WNDB_FILES, owner_of, wordnet_files

PAGEVIEWS, WORDNET, READY = "pageviews", "wordnet", "metadata.json"


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a language's entries come from; each is optional."""

    numbers: bool = True
    """The numbers 0-99 in digits."""
    number_names: bool = False
    """Their names too (needs num2words; languages it lacks get no names)."""
    wordnet: tuple[Path, ...] = ()
    """Files and folders of :func:`mc2_hpc.metadata.wordnet.read_lemmas`."""
    corpus: tuple[Path, ...] = ()
    """UTF-8 text files and Wikipedia dumps (``.xml.bz2``), in which unigrams and bigrams are counted."""
    titles: Path | None = None
    """Titles, one per line, as ``title`` (the best first) or ``title<TAB>views``; ``_`` stands for a space."""
    pageviews: tuple[Path, ...] = ()
    """Hourly page views, read if there are no ``titles``."""
    ready: Path | None = None
    """A metadata file whose entries are used unchanged, in place of everything else."""

    def lacks(self, *, views: bool = False) -> list[str]:
        """The kinds of source that are missing; ``views`` says that the page views have titles of this language."""
        if self.ready is not None:
            return []
        have = {"wordnet": self.wordnet, "corpus": self.corpus, "titles": self.titles or views}
        return [kind for kind, there in have.items() if not there]

    def files(self) -> list[Path]:
        """Every file that is read only for this language."""
        if self.ready is not None:
            return [self.ready]
        wordnets = [file for path in self.wordnet for file in wordnet_files(path)]
        return [*wordnets, *self.corpus, *([self.titles] if self.titles else [])]


def find_sources(folder: str | Path, *, number_names: bool = False) -> dict[str, Sources]:
    """Sources of every Wikipedia in ``folder`` by code; see the module for the layout.

    Raises:
        UserError: no such folder, no language in it, or a language's sources conflict.
    """
    folder = Path(folder)
    names = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    languages = [path for path in names if path.name not in (PAGEVIEWS, WORDNET) and not path.name.startswith(".")]
    pageviews = tuple(sorted((folder / PAGEVIEWS).glob("pageviews-*.gz")))
    shared: dict[str, list[Path]] = {}
    tabs = [path for path in sorted(folder.rglob("wn-data-*.tab*")) if not _is_hidden(path.relative_to(folder))]
    for path in tabs:
        if code := owner_of(path):
            shared.setdefault(code, []).append(path)
    found: dict[str, Sources] = {}
    for path in languages:
        code = code_of_folder(path.name)
        sources = _sources_in(path, code)
        if not sources.files() and any(tab.is_relative_to(path) for tab in tabs):
            continue  # a folder of wordnets
        if code in found:
            raise UserError(f"{path}: a second folder for {code!r}; merge the two")
        found[code] = sources
    for code, wordnets in shared.items():
        sources = found.setdefault(code, Sources())
        if not sources.wordnet and sources.ready is None:
            found[code] = replace(sources, wordnet=tuple(wordnets))
    if not found:
        raise UserError(f"{folder}: no language folders; expected <lang>/corpus.txt, wordnet.txt, titles.txt")
    return {code: replace(found[code], number_names=number_names, pageviews=pageviews) for code in sorted(found)}


def _is_hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _sources_in(folder: Path, code: str) -> Sources:
    def optional(path: Path) -> Path | None:
        return path if path.is_file() else None

    names = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    wordnet = [p for p in names if p.name == "wordnet.txt" or p.name.removesuffix(".gz").endswith((".tab", ".xml"))]
    wordnet = [p for p in wordnet if owner_of(p) in (None, code)]  # a tab file's name gives its language
    if (folder / WORDNET).is_dir():
        missing = [name for name in WNDB_FILES if not (folder / WORDNET / name).is_file()]
        if missing:
            raise UserError(f"{folder / WORDNET}: missing files of WNDB: {', '.join(missing)}")
        wordnet.append(folder / WORDNET)
    corpus = [p for p in names if p.name.startswith("corpus") and p.name.endswith((".txt", ".txt.gz"))]
    dumps = [p for p in names if "-pages-articles" in p.name and p.name.endswith(".xml.bz2")]
    multistream = {p for p in dumps if "multistream" in p.name}
    if multistream and len(multistream) < len(dumps):
        raise UserError(f"{folder}: the same dump as multistream and as one stream; remove one")
    sources = Sources(
        wordnet=tuple(wordnet),
        corpus=(*corpus, *dumps),
        titles=optional(folder / "titles.txt"),
        ready=optional(folder / READY),
    )
    if sources.ready and (wordnet or sources.corpus or sources.titles):
        raise UserError(f"{sources.ready}: used unchanged, but there are other sources beside it; remove it or them")
    return sources


def choose_languages(sources: Mapping[str, Sources], wanted: Collection[str]) -> dict[str, Sources]:
    """The sources of the ``wanted`` languages, named by their own code or the one they are merged into.

    Raises:
        UserError: a language has no sources.
    """
    codes = {code_of_folder(name) for name in wanted}
    missing = codes - set(sources) - {curation_code(code) for code in sources}
    if missing:
        raise UserError(f"no sources for {', '.join(sorted(missing))}; there are {', '.join(sorted(sources))}")
    return {code: value for code, value in sources.items() if {code, curation_code(code)} & codes}


def group_by_curation(codes: Collection[str], *, merge_unknown: bool = False) -> dict[str, list[str]]:
    """``{curation language: codes merged into it}`` in a fixed order: the language's own Wikipedia comes first."""
    groups: dict[str, list[str]] = {}
    for code in sorted(codes):
        groups.setdefault(curation_code(code, merge_unknown=merge_unknown), []).append(code)
    return {name: sorted(group, key=lambda code: (code != name, code)) for name, group in sorted(groups.items())}
