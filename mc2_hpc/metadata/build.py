"""Build a language's metadata from its sources, with the recipe's filters, caps and order.

Order: the numbers 0-99, the wordnet, unigrams, bigrams, titles. The first source that has an entry owns it; a cap
counts new entries only. Same inputs give the same bytes.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mc2_hpc.errors import UserError
from mc2_hpc.metadata.files import CARD, check_entries, metadata_files, write_entries
from mc2_hpc.metadata.languages import is_spaced
from mc2_hpc.metadata.ngrams import Segmenter, count_ngrams, rank_bigrams, rank_unigrams, read_lines, split_words
from mc2_hpc.metadata.scripts import is_pure_punctuation
from mc2_hpc.storage import file_sha256, read_json, write_json

_MAX_CHARS = 256
_PLUS_IN_WORDNET = ("zh", "ja", "fr")
"""Languages whose wordnet joins the parts of a lemma with "+"."""


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Where a language's entries come from; each may be left out."""

    numbers: bool = True
    """The numbers 0-99 in digits."""
    number_names: bool = False
    """Their names as well (needs num2words; a language it lacks contributes none)."""
    wordnet: Path | None = None
    """A word list, one lemma a line; ``_`` stands for a space."""
    corpus: tuple[Path, ...] = ()
    """UTF-8 ``.txt`` or ``.txt.gz``: unigrams and bigrams are counted in it."""
    titles: Path | None = None
    """Titles, one a line, as ``title`` (the best first) or ``title<TAB>views``; ``_`` stands for a space."""

    def files(self) -> list[Path]:
        """Every file that is read."""
        return [path for path in (self.wordnet, *self.corpus, self.titles) if path is not None]


def find_sources(folder: str | Path, *, number_names: bool = False) -> dict[str, Sources]:
    """Sources laid out as ``<folder>/<lang>/``: ``wordnet.txt``, ``corpus*.txt`` or ``.txt.gz``, ``titles.txt``.

    Each file may be missing; a language is a subfolder, and has at least the numbers.

    Raises:
        UserError: no such folder, or no subfolder in it.
    """
    folder = Path(folder)
    languages = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    if not languages:
        raise UserError(f"{folder}: no language folders there; expected <lang>/corpus.txt, wordnet.txt, titles.txt")

    def optional(path: Path) -> Path | None:
        return path if path.is_file() else None

    return {
        path.name: Sources(
            number_names=number_names,
            wordnet=optional(path / "wordnet.txt"),
            corpus=tuple(sorted(p for p in path.glob("corpus*") if p.name.endswith((".txt", ".txt.gz")))),
            titles=optional(path / "titles.txt"),
        )
        for path in languages
    }


@dataclass(frozen=True, kw_only=True)
class Caps:
    """How many entries a source may add: the smaller of a number and a share of its candidates (the recipe's)."""

    unigrams: int = 251_465
    unigram_share: float = 0.10
    """Of the distinct words that pass the filters."""
    unigram_min_count: int = 1
    """MetaCLIP 1's English list asks for 100."""
    bigrams: int = 100_646
    bigram_share: float = 0.40
    """Of the unigrams that may be added."""
    titles: int = 61_235
    title_share: float = 0.76
    """Of the distinct titles that pass the filters."""

    def __post_init__(self) -> None:
        for name in ("unigrams", "bigrams", "titles", "unigram_min_count"):
            if getattr(self, name) < 0:
                raise UserError(f"caps.{name}={getattr(self, name)}: must be at least 0")
        for name in ("unigram_share", "bigram_share", "title_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"caps.{name}={getattr(self, name)}: must lie in [0, 1]")


@dataclass
class _Entries:
    """Distinct entries in order of arrival, and how many each source brought."""

    entries: dict[str, None] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, source: str, candidates: Iterable[str], cap: int | None = None) -> None:
        """Append the candidates not seen before, at most ``cap`` of them."""
        before = len(self.entries)
        for candidate in candidates:
            if cap is not None and len(self.entries) - before >= cap:
                break
            self.entries.setdefault(candidate)
        self.counts[source] = len(self.entries) - before


def build_metadata(
    lang: str, sources: Sources, caps: Caps | None = None, *, segment: Segmenter = split_words
) -> tuple[list[str], dict[str, int]]:
    """Entries of ``lang`` in id order, and how many each source added.

    Args:
        lang: language code; decides whether bigrams are joined by a space.
        segment: splits the corpus into words.

    Raises:
        UserError: a source cannot be read, or nothing at all came of them.
    """
    caps = caps or Caps()
    merged = _Entries()
    merged.add("numbers", (str(number) for number in range(100)) if sources.numbers else ())
    merged.add("number_names", _clean(_number_names(lang)) if sources.number_names else ())
    merged.add("wordnet", _clean(_lemmas(lang, sources.wordnet)) if sources.wordnet else ())
    if sources.corpus:
        counts = count_ngrams((line for path in sources.corpus for line in read_lines(path)), segment)
        unigrams = _clean(rank_unigrams(counts, caps.unigram_min_count))
        unigram_cap = min(caps.unigrams, _share(caps.unigram_share, len(unigrams)))
        merged.add("unigrams", unigrams, unigram_cap)
        joiner = " " if is_spaced(lang) else ""
        bigrams = _clean(joiner.join(pair) for pair in rank_bigrams(counts))
        merged.add("bigrams", bigrams, min(caps.bigrams, _share(caps.bigram_share, unigram_cap)))
    if sources.titles:
        titles = _clean(_titles(sources.titles))
        merged.add("titles", titles, min(caps.titles, _share(caps.title_share, len(titles))))
    entries = list(merged.entries)
    check_entries(entries, f"metadata of {lang!r}")
    return entries, merged.counts


def build_folder(
    requests: Mapping[str, Sources],
    out: str | Path,
    caps: Caps | None = None,
    *,
    progress: Callable[[str, int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Write ``out/<lang>.json`` for every requested language and ``out/card.json``, and return the card.

    Languages that the folder already has and that are not requested stay, in the card too.

    Args:
        progress: called with ("metadata", languages done, languages in all, the language just finished).

    Raises:
        UserError: see :func:`build_metadata`.
    """
    out = Path(out)
    caps = caps or Caps()
    card: dict[str, Any] = {"languages": {}}
    if (out / CARD).is_file():
        present = metadata_files(out)
        card["languages"] = {k: v for k, v in read_json(out / CARD)["languages"].items() if k in present}
    for done, (lang, sources) in enumerate(requests.items(), start=1):
        if "/" in lang or lang.startswith(".") or f"{lang}.json" == CARD:
            raise UserError(f"language {lang!r}: not a name for a file; use a code such as 'en'")
        entries, counts = build_metadata(lang, sources, caps)
        path = out / f"{lang}.json"
        write_entries(path, entries)
        card["languages"][lang] = {
            "entries": len(entries),
            "by_source": counts,
            "caps": asdict(caps),
            "files": [{"name": file.name, "sha256": file_sha256(file)} for file in sources.files()],
            "sha256": file_sha256(path),
        }
        if progress:
            progress("metadata", done, len(requests), lang)
    write_json(out / CARD, card)
    return card


def _share(share: float, count: int) -> int:
    """Whole part of ``share * count``; the tiny term keeps 0.29 * 100 at 29 in binary floating point."""
    return int(share * count + 1e-9)


def _clean(candidates: Iterable[str]) -> list[str]:
    """Distinct candidates, stripped, without the empty, the over-long and the purely punctuational."""
    stripped = (candidate.strip() for candidate in candidates)
    return list(dict.fromkeys(c for c in stripped if c and len(c) <= _MAX_CHARS and not is_pure_punctuation(c)))


def _number_names(lang: str) -> list[str]:
    try:
        from num2words import CONVERTER_CLASSES, num2words
    except ImportError:
        raise UserError("number names need the package num2words: pip install num2words, or leave them out") from None
    if lang not in CONVERTER_CLASSES:  # asked here because num2words itself takes "ceb" for "ce", another language
        return []
    return [num2words(number, lang=lang) for number in range(100)]


def _lemmas(lang: str, path: Path) -> Iterator[str]:
    for line in read_lines(path):
        lemma = line.replace("_", " ")
        yield lemma.replace("+", "") if lang in _PLUS_IN_WORDNET else lemma


def _titles(path: Path) -> Sequence[str]:
    """Titles outside of namespaces (no ``:``), most viewed first; those without a number of views keep their order."""
    ranked: list[tuple[int, int, str]] = []
    for number, line in enumerate(read_lines(path), start=1):
        title, tab, views = line.partition("\t")
        if tab and not views.strip().isdecimal():
            raise UserError(f"{path}: line {number}: {views!r} is not a number of views; write title<TAB>views")
        if ":" not in title:
            ranked.append((-int(views) if tab else 0, number, title.replace("_", " ")))
    return [title for _, _, title in sorted(ranked)]
