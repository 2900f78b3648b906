"""What curation does with one caption and why: its matches, their probabilities, its odds, or why it is left out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mc2_hpc.balancing.folder import BalanceFolder
from mc2_hpc.balancing.selection import keep_probability
from mc2_hpc.curation.filters import filtered_as, recorded_filters
from mc2_hpc.curation.matched import planned_settings, tables_folder
from mc2_hpc.curation.matching.matcher import Matcher, is_saved
from mc2_hpc.curation.matching.rules import check_mode, entry_pattern, mode_settings, pattern_or_none, spaced_text
from mc2_hpc.curation.pool.language_id import FastLangdetect, LanguageIdentifier
from mc2_hpc.draws import hash_keys, uniform
from mc2_hpc.drops import Drop
from mc2_hpc.errors import UserError
from mc2_hpc.metadata.files import metadata_files, read_entries
from mc2_hpc.metadata.languages import known_code
from mc2_hpc.storage import file_sha256

_NEAR_MISSES = 5
_SHORTEST_PART = 3
"""Fewest characters of an entry that is reported inside a longer word."""
_DEFAULT_MODE = "fixed"


@dataclass(frozen=True)
class MatchedEntry:
    """An entry that occurs in the caption; what comes from balancing is None without a balance folder."""

    entry: str
    id: int
    pattern: str
    at: list[int]
    """Offsets of the pattern in the spaced text, in characters; overlapping occurrences included."""
    count: int | None = None
    """Texts in the pool that it matched."""
    probability: float | None = None
    part: str | None = None
    """``head`` if counted above the threshold, else ``tail``."""


@dataclass(frozen=True)
class NearMiss:
    """Why an entry that resembles part of the caption does not match."""

    entry: str
    id: int
    reason: str


@dataclass(frozen=True)
class Explanation:
    """See :func:`explain`."""

    caption: str
    lang: str
    lang_from: str
    """``given``, or the identifier that found it."""
    mode: str
    spaced_text: str
    matches: list[MatchedEntry]
    near_misses: list[NearMiss]
    """Searched for only if nothing matched."""
    drop_reason: str | None
    """As ``mc2 curate match`` counts it; None for a caption that matches."""
    threshold: int | None
    keep_probability: float | None
    draw: float | None
    """Of the key, in [0, 1); None without a key."""
    kept: bool | None
    """Whether an epoch that draws this caption for its image keeps it; None where that is chance or not known."""

    def to_dict(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def explain(
    caption: str,
    metadata: str | Path,
    *,
    lang: str | None = None,
    mode: str | None = None,
    matched: str | Path | None = None,
    balance: str | Path | None = None,
    key: str | None = None,
    seed: int = 0,
    epoch: int = 0,
    identifier: LanguageIdentifier | None = None,
) -> Explanation:
    """Trace one caption through matching and balancing.

    Args:
        lang: of the caption, by any code that a pool may have; identified if not given.
        mode: matching rules; by default those of ``matched``, else of ``balance``, else ``fixed``.
        matched: a matched pool of this metadata: its settings and filters apply, and its matcher tables are reused.
        balance: for counts, probabilities and the verdict; without it, only matches.
        key: of the image: decides whether (seed, epoch) keep the caption if it is drawn from the image's captions.
        identifier: :class:`FastLangdetect` by default.

    Raises:
        UserError: invalid metadata, folders with other metadata or another mode, or no language identifier is
            installed; or ``balance`` lacks the language, because no caption of the pool matched.
    """
    languages = metadata_files(metadata)
    settings = planned_settings(Path(matched)) if matched is not None else None
    probs = BalanceFolder(balance) if balance is not None else None
    report = probs.report() if probs is not None else None
    mode = mode or (settings or report or {}).get("mode", _DEFAULT_MODE)
    check_mode(mode)
    lang_from = "given"
    if lang is None:
        identifier = identifier or FastLangdetect()
        (lang,), lang_from = identifier.identify([caption]), identifier.name
    lang = known_code(lang, languages) or lang
    text = spaced_text(_encodable(caption), mode)
    unknown = None if lang in languages else Drop.LANGUAGE_UNKNOWN
    drop_reason: str | None = Drop.CAPTION_EMPTY if not caption.strip() else unknown
    if drop_reason is None and settings is not None:
        drop_reason = filtered_as(recorded_filters(settings, matched), caption, lang, key)
    matches: list[MatchedEntry] = []
    near_misses: list[NearMiss] = []
    for name, source in ((matched, settings), (balance, report)):
        _check_source(name, source, languages.get(lang), mode)
    if drop_reason is None:
        entries = read_entries(languages[lang])
        tables = tables_folder(Path(matched), lang) if matched is not None else None
        matches = _matches(caption, text, entries, mode, tables)
        if not matches:
            drop_reason, near_misses = Drop.NO_MATCH, _near_misses(caption, text, entries, mode)
    probability, draw, threshold = None, None, None
    if probs is not None and report is not None and matches:
        if lang not in report["t"]:
            raise UserError(f"{balance}: no threshold for {lang!r}: no caption of its pool matched; leave it out")
        threshold = report["t"][lang]
        matches, probability = _weigh(matches, probs, lang, threshold)
        if key is not None:
            draw = float(uniform(hash_keys([key]), seed=seed, epoch=epoch, purpose="keep")[0])
    return Explanation(
        caption=caption,
        lang=lang,
        lang_from=lang_from,
        mode=mode,
        spaced_text=text,
        matches=matches,
        near_misses=near_misses,
        drop_reason=drop_reason,
        threshold=threshold,
        keep_probability=probability,
        draw=draw,
        kept=_verdict(drop_reason, probability, draw),
    )


def _verdict(drop_reason: str | None, probability: float | None, draw: float | None) -> bool | None:
    if drop_reason is not None:
        return False
    if probability == 1.0:
        return True
    return None if probability is None or draw is None else draw < probability


def _check_source(name: str | Path | None, source: dict[str, Any] | None, path: Path | None, mode: str) -> None:
    """Raise unless the matched or balance folder ``name`` was made from this metadata file in this mode."""
    if source is None:
        return
    hashes = source["sources"]["metadata"] if "sources" in source else source["metadata"]
    if path is not None and hashes.get(path.stem) != file_sha256(path):
        raise UserError(f"{path}: not the metadata {name} was made with; give that one with --metadata")
    if source["mode"] != mode:
        raise UserError(
            f"{name}: was made in mode {source['mode']}, not {mode}; name that mode or leave this folder out"
        )
    if "sources" not in source and source.get("matching_rules") != mode_settings(mode).get("matching_rules"):
        raise UserError(
            f"{name}: was matched by an older edition of mode {mode}; match the pool again, or leave it out"
        )


def _encodable(caption: str) -> str:
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise UserError("the caption is not valid UTF-8; `mc2 curate match` drops it as invalid_utf8") from None
    return caption


def _matches(caption: str, text: str, entries: Sequence[str], mode: str, tables: Path | None) -> list[MatchedEntry]:
    matcher = Matcher.load(tables) if tables is not None and is_saved(tables) else Matcher.build(entries, mode)
    _, ids = matcher.match([caption])
    found = []
    for number in ids.tolist():
        pattern = entry_pattern(entries[number], mode)
        found.append(MatchedEntry(entries[number], number, pattern, _occurrences(pattern, text)))
    return found


def _occurrences(pattern: str, text: str) -> list[int]:
    at, places = text.find(pattern), []
    while at >= 0:
        places.append(at)
        at = text.find(pattern, at + 1)
    return places


def _weigh(
    matches: list[MatchedEntry], probs: BalanceFolder, lang: str, threshold: int
) -> tuple[list[MatchedEntry], float]:
    """The matches with their counts and probabilities, and the caption's keep probability."""
    ids = np.array([match.id for match in matches], np.uint32)
    probability = float(keep_probability(np.array([0, len(ids)]), ids, probs[lang])[0])
    counts = probs.counts(lang)
    weighed = []
    for match in matches:
        count = int(counts[match.id])
        known = {"count": count, "probability": float(probs[lang][match.id])}
        weighed.append(MatchedEntry(**{**asdict(match), **known, "part": "head" if count > threshold else "tail"}))
    return weighed, probability


def _near_misses(caption: str, text: str, entries: Sequence[str], mode: str) -> list[NearMiss]:
    """Entries that would match if one rule were different, longest first, up to a few per reason."""
    folded, folded_text = caption.casefold(), text.casefold()
    fixed = set(Matcher.build(entries, "fixed").match([caption])[1].tolist()) if mode == "compat" else set()
    by_length = sorted(range(len(entries)), key=lambda number: (-len(entries[number]), number))

    def in_fixed(number: int) -> bool:
        return number in fixed

    def in_other_case(number: int) -> bool:
        alike = entries[number].casefold()
        if alike not in folded and alike not in folded_text:
            return False  # most entries: skips making their patterns
        pattern = pattern_or_none(entries[number], mode)
        return pattern is not None and pattern.casefold() in folded_text

    def inside_a_word(number: int) -> bool:
        return len(entries[number]) >= _SHORTEST_PART and entries[number] in caption

    reasons = (
        ("matches by the rules of mode fixed", in_fixed),
        ("would match if case were ignored", in_other_case),
        ("is inside a longer word", inside_a_word),
    )
    found: dict[int, NearMiss] = {}
    for reason, holds in reasons:
        numbers = (number for number in by_length if number not in found and holds(number))
        for number in islice(numbers, _NEAR_MISSES):
            found[number] = NearMiss(entries[number], number, reason)
    return list(found.values())
