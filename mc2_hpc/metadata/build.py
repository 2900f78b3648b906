"""Build each language's metadata from its sources, with the recipe's filters, caps and order.

The order is the numbers 0-99, the wordnet, unigrams, bigrams, titles. The first source with an entry owns it; a cap
counts only new entries. Wikipedias of one curation language are built one by one and then joined, the language's own
first. The same inputs give the same bytes on any number of processes.
"""

import hashlib
import math
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mc2_hpc import __version__
from mc2_hpc.errors import UserError
from mc2_hpc.metadata.counting import count_corpus
from mc2_hpc.metadata.files import CARD, Card, check_entries, read_entries, write_entries
from mc2_hpc.metadata.languages import is_spaced
from mc2_hpc.metadata.lemmas import LemmaTally
from mc2_hpc.metadata.ngrams import read_lines
from mc2_hpc.metadata.pageviews import MIN_HOURLY_VIEWS, count_views, rank_titles
from mc2_hpc.metadata.scripts import is_pure_marks, is_unspaced
from mc2_hpc.metadata.segmenters import choose_segmenter, segmenter_versions
from mc2_hpc.metadata.sources import Sources, group_by_curation
from mc2_hpc.metadata.wordnet import read_lemmas
from mc2_hpc.metadata.workers import Workers
from mc2_hpc.reading.json_file import read_json
from mc2_hpc.storage import file_sha256, write_json
from mc2_hpc.terminal import Report

_MAX_CHARS = 256


@dataclass(frozen=True, kw_only=True)
class Caps:
    """How many entries a source may add: the smaller of a number and a share of its candidates, as in the recipe."""

    unigrams: int = 251_465
    unigram_share: float = 0.10
    """Of the distinct words that pass the filters."""
    unigram_min_count: int = 1
    """MetaCLIP 1's English list uses 100."""
    bigrams: int = 100_646
    bigram_share: float = 0.40
    """Of the unigrams that may be added."""
    bigram_min_pmi: float | None = None
    """In bits; pairs below it are left out. MetaCLIP 1's English list uses 30. None: only the score decides."""
    titles: int = 61_235
    title_share: float = 0.76
    """Of the distinct titles that pass the filters."""
    title_min_views: int = 0
    """In total, for titles with known views; MetaCLIP 1's English list uses 70."""

    def __post_init__(self) -> None:
        for name in ("unigrams", "bigrams", "titles", "unigram_min_count", "title_min_views"):
            if getattr(self, name) < 0:
                raise UserError(f"caps.{name}={getattr(self, name)}: must be at least 0")
        for name in ("unigram_share", "bigram_share", "title_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"caps.{name}={getattr(self, name)}: must be in [0, 1]")
        if self.bigram_min_pmi is not None and not math.isfinite(self.bigram_min_pmi):
            raise UserError(f"caps.bigram_min_pmi={self.bigram_min_pmi}: must be a finite number")


@dataclass
class _Entries:
    """Distinct entries in order of arrival, and how many each source added."""

    entries: dict[str, None] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)

    def add(self, source: str, candidates: Iterable[str], cap: int | None = None) -> None:
        """Append at most ``cap`` candidates that were not seen before."""
        before = len(self.entries)
        for candidate in candidates:
            if cap is not None and len(self.entries) - before >= cap:
                break
            self.entries.setdefault(candidate)
        self.counts[source] += len(self.entries) - before


def build_metadata(
    lang: str,
    sources: Sources,
    caps: Caps | None = None,
    *,
    segmenter: str | None = None,
    views: Mapping[str, int] | None = None,
    workers: Workers | None = None,
    told: Callable[[int, str], None] | None = None,
    lemmas: LemmaTally | None = None,
) -> tuple[list[str], dict[str, int]]:
    """Entries of ``lang`` in id order, and how many each source added.

    Args:
        lang: language code; determines how the corpus is split and how bigrams are joined.
        segmenter: name in :mod:`mc2_hpc.metadata.segmenters`; by default the language's own.
        views: of its titles, for sources without a titles file.
        told: see :func:`mc2_hpc.metadata.counting.count_corpus`.
        lemmas: counts the wordnet's lemmas that had markup.

    Raises:
        UserError: a source cannot be read, or all of them together gave no entry.
    """
    caps, workers = caps or Caps(), workers or Workers()
    if sources.ready is not None:
        entries = read_entries(sources.ready)
        return entries, {"ready": len(entries)}
    merged = _Entries()
    merged.add("numbers", (str(number) for number in range(100)) if sources.numbers else ())
    merged.add("number_names", _clean(_number_names(lang)) if sources.number_names else ())
    for path in sources.wordnet:
        merged.add("wordnet", _clean(read_lemmas(lang, path, lemmas)))
    if sources.corpus:
        counts = count_corpus(sources.corpus, lang, segmenter or choose_segmenter(lang, {}), workers, told)
        unigrams = list(_clean(counts.rank_unigrams(caps.unigram_min_count)))
        unigram_cap = min(caps.unigrams, _share(caps.unigram_share, len(unigrams)))
        merged.add("unigrams", unigrams, unigram_cap)
        bigrams = _clean(_join(lang, *pair) for pair in counts.rank_bigrams(caps.bigram_min_pmi))
        merged.add("bigrams", bigrams, min(caps.bigrams, _share(caps.bigram_share, unigram_cap)))
    if sources.titles or views:
        least = caps.title_min_views
        ranked = _titles(sources.titles, least) if sources.titles else rank_titles(views or {}, least)
        titles = list(dict.fromkeys(_clean(ranked)))
        merged.add("titles", titles, min(caps.titles, _share(caps.title_share, len(titles))))
    entries = list(merged.entries)
    check_entries(entries, f"metadata of {lang!r}")
    return entries, dict(merged.counts)


def build_folder(
    requests: Mapping[str, Sources],
    out: str | Path,
    caps: Caps | None = None,
    *,
    segmenters: Mapping[str, str] | None = None,
    min_hourly_views: int = MIN_HOURLY_VIEWS,
    merge_unknown: bool = False,
    workers: int = 1,
    progress: Report | None = None,
) -> dict[str, Any]:
    """Write ``out/<lang>.json`` for every requested language and ``out/card.json``, and return the card.

    Languages that are already in the folder and not requested stay, in the card too. A language that cannot be built
    does not affect the others.

    Args:
        requests: sources by Wikipedia code; those of one curation language become one file.
        segmenters: names of segmenters by language, to use instead of the language's own.
        min_hourly_views: see :func:`mc2_hpc.metadata.pageviews.count_views`.
        merge_unknown: put the languages that language id does not know into ``other.json``.
        workers: processes.
        progress: called with ("metadata", languages done, languages in total, the language just finished), and for the
            hourly files read ("page views") and the lines and articles handed out so far ("texts").

    Raises:
        UserError: some languages could not be built (see :func:`build_metadata`); each is named, and the rest are
            written.
    """
    out, caps, segmenters = Path(out), caps or Caps(), segmenters or {}
    for lang in requests:
        if "/" in lang or lang.startswith(".") or f"{lang}.json" == CARD:
            raise UserError(f"language {lang!r}: cannot be a file name; use a code such as 'en'")
    for lang in segmenters:
        choose_segmenter(lang, segmenters)
    card = _card_of(out)
    groups = group_by_curation(requests, merge_unknown=merge_unknown)
    failures: list[str] = []
    with Workers(workers) as pool:
        titles = _rank_pages(requests, min_hourly_views, pool, progress)
        build = _Build(caps, segmenters, *titles, pool, progress)
        for done, (lang, group) in enumerate(groups.items(), start=1):
            try:
                parts = {code: build.part(code, requests[code]) for code in group}
                entries = list(dict.fromkeys(entry for part, _ in parts.values() for entry in part))
                write_entries(out / f"{lang}.json", entries)
                card["languages"][lang] = {
                    "entries": len(entries),
                    "caps": asdict(caps),
                    "wikipedias": {code: facts for code, (_, facts) in parts.items()},
                    "versions": _versions(),
                    "sha256": file_sha256(out / f"{lang}.json"),
                }
                write_json(out / CARD, card)
            except UserError as error:
                failures.append(f"{lang}: {error}")
            if progress:
                progress("metadata", done, len(groups), lang)
    if failures:
        named = "; ".join(failures)
        raise UserError(f"{len(failures)} of {len(groups)} languages failed, the others are built: {named}")
    return card


@dataclass
class _Build:
    """What the Wikipedias of one call have in common."""

    caps: Caps
    segmenters: Mapping[str, str]
    views: Mapping[str, Mapping[str, int]]
    views_facts: Mapping[str, Any]
    workers: Workers
    progress: Report | None
    texts: int = 0

    def part(self, code: str, sources: Sources) -> tuple[list[str], dict[str, Any]]:
        """A Wikipedia's entries, and its part of the card."""
        facts: dict[str, Any] = {}
        segmenter, views = None, self.views.get(code)
        if sources.corpus:
            segmenter = choose_segmenter(code, self.segmenters)
            facts["segmenter"] = {"name": segmenter, "versions": segmenter_versions(segmenter)}
        if views is not None:
            facts["pageviews"] = self.views_facts
        lemmas = LemmaTally()
        entries, facts["by_source"] = build_metadata(
            code,
            sources,
            self.caps,
            segmenter=segmenter,
            views=views,
            workers=self.workers,
            told=self._count_texts,
            lemmas=lemmas,
        )
        facts["lacks"] = sources.lacks(views=bool(views))
        if sources.wordnet:
            facts["lemmas"] = asdict(lemmas)
        facts["files"] = _hashes(sources.files())
        return entries, facts

    def _count_texts(self, texts: int, file: str) -> None:
        self.texts += texts
        if self.progress:
            self.progress("texts", self.texts, 0, file)


def _rank_pages(
    requests: Mapping[str, Sources], min_hourly_views: int, workers: Workers, progress: Report | None
) -> tuple[Mapping[str, Mapping[str, int]], dict[str, Any]]:
    """Views by Wikipedia and title, for those whose titles come from page views, and their part of the card."""
    wanted = {code: s for code, s in requests.items() if s.pageviews and s.titles is None and s.ready is None}
    files = sorted({path for sources in wanted.values() for path in sources.pageviews})
    if not files:
        return {}, {}
    views = count_views(files, list(wanted), min_views=min_hourly_views, workers=workers, progress=progress)
    lines = "".join(f"{file['sha256']}  {file['name']}\n" for file in _hashes(files))
    digest = hashlib.sha256(lines.encode()).hexdigest()
    return views, {"min_hourly_views": min_hourly_views, "files": len(files), "sha256sums_sha256": digest}


def _card_of(out: Path) -> dict[str, Any]:
    """The existing card, without the languages whose files are gone."""
    if not (out / CARD).is_file():
        return {"languages": {}}
    present = {path.stem for path in out.glob("*.json")}
    return {"languages": {k: v for k, v in read_json(out / CARD, Card).languages.items() if k in present}}


def _versions() -> dict[str, str]:
    """Of what determines the entries besides the segmenters: our rules and Python's Unicode tables."""
    return {"mc2_hpc": __version__, "unicode": unicodedata.unidata_version}


def _hashes(files: Iterable[Path]) -> list[dict[str, str]]:
    return [{"name": file.name, "sha256": file_sha256(file)} for file in files]


def _share(share: float, count: int) -> int:
    """The integer part of ``share * count``; the tiny term keeps 0.29 * 100 at 29 in binary floating point."""
    return int(share * count + 1e-9)


def _clean(candidates: Iterable[str]) -> Iterator[str]:
    """The candidates, stripped, without those that are empty, too long or only marks."""
    stripped = (candidate.strip() for candidate in candidates)
    return (c for c in stripped if c and len(c) <= _MAX_CHARS and not is_pure_marks(c))


def _join(lang: str, first: str, second: str) -> str:
    """A bigram as texts write it: no space in languages without spaces, except between words of other scripts."""
    glued = not is_spaced(lang) and (is_unspaced(first[-1]) or is_unspaced(second[0]))
    return first + second if glued else f"{first} {second}"


def _number_names(lang: str) -> list[str]:
    try:
        from num2words import CONVERTER_CLASSES, num2words
    except ImportError:
        raise UserError("number names need the num2words package: pip install num2words, or leave them out") from None
    if lang not in CONVERTER_CLASSES:  # checked here because num2words treats "ceb" as "ce", another language
        return []
    return [num2words(number, lang=lang) for number in range(100)]


def _titles(path: Path, min_views: int) -> Sequence[str]:
    """Titles outside namespaces (no ``:``), most viewed first; titles without a view count keep their order."""
    ranked: list[tuple[int, int, str]] = []
    for number, line in enumerate(read_lines(path), start=1):
        title, tab, views = line.partition("\t")
        if tab and not views.strip().isdecimal():
            raise UserError(f"{path}: line {number}: {views!r} is not a number of views; write title<TAB>views")
        if ":" not in title and not (tab and int(views) < min_views):
            ranked.append((-int(views) if tab else 0, number, title.replace("_", " ")))
    return [title for _, _, title in sorted(ranked)]
