"""Stage 1: caption pool + metadata -> matched pool and counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mc2_hpc.balancing import csr
from mc2_hpc.curation.counts import Sparse, add_sparse, count_votes, write_votes
from mc2_hpc.curation.matched import matched_table, write_matched_batches
from mc2_hpc.curation.matching.matcher import Matcher, is_saved
from mc2_hpc.curation.matching.rules import check_mode
from mc2_hpc.curation.pool.captions import PoolShard, iter_captions, list_pool
from mc2_hpc.curation.pool.distinct import Distinct
from mc2_hpc.curation.pool.language_id import FastLangdetect, LanguageIdentifier
from mc2_hpc.errors import UserError
from mc2_hpc.jobs.engines import Engine
from mc2_hpc.jobs.stages import Progress, Stage, open_stage, run_stages, stats_path, sum_stats
from mc2_hpc.metadata.files import metadata_files, read_entries
from mc2_hpc.reading.json_file import Count, File, Sha256, read_fields
from mc2_hpc.storage import file_sha256, write_json

SETTINGS = "match.json"


class _Sampled(File):
    """What ``sample`` of a matched pool was drawn with."""

    seed: Count
    epoch: Count
    balance: Sha256


class MatchSettings(File, omit_defaults=True):
    """``match.json``."""

    mode: Literal["fixed", "compat"]
    metadata: dict[str, Sha256]
    language_id: str
    shards: list[str]
    sample: _Sampled | None = None


class _LanguageStats(File):
    texts: Count
    images: Count
    matches: Count


class MatchStats(File):
    """``stats/<shard>.json`` of a matched pool."""

    rows: Count
    matched: Count
    images: Count
    drops: dict[str, Count]
    captions: dict[str, Count]
    languages: dict[str, _LanguageStats]


MERGED = "merged"
"""Folder of counts added up over shards, made by balancing from the counts of the shards."""


def match(
    pool: str | Path,
    metadata: str | Path,
    out: str | Path,
    mode: str = "fixed",
    *,
    identifier: LanguageIdentifier | None = None,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Match every caption of a pool with the metadata of its language.

    Writes ``<shard>.parquet`` (rows that matched, with ``lang`` and ``entries``), ``counts/<shard>.npz``,
    ``stats/<shard>.json``, the matcher tables under ``matchers/`` and ``match.json``. Shards already finished are
    skipped.

    Args:
        mode: matching rules, see :mod:`mc2_hpc.curation.matching.rules`.
        identifier: tells the language of shards without a ``lang`` column; :class:`FastLangdetect` by default.
        engine: where the work is done; one worker of this machine by default.

    Returns:
        counters over all shards: ``rows``, ``matched``, ``images``, ``drops`` by reason, ``captions`` (usable ones, by
        language) and ``languages``; None where the work was only submitted to Slurm

    Raises:
        UserError: bad pool, metadata or settings; or shards that could not be read (every other one is done).
    """
    stages = plan_match(pool, metadata, out, mode, identifier)
    if not run_stages(stages, engine, progress):
        return None
    return sum_stats(Path(out), list(stages[-1].shards), MatchStats)


def plan_match(
    pool: str | Path, metadata: str | Path, out: str | Path, mode: str, identifier: LanguageIdentifier | None
) -> list[Stage]:
    """The stages of :func:`match`; their settings are checked and recorded."""
    out = Path(out).absolute()
    check_mode(mode)
    shards = {shard.name: shard for shard in list_pool(Path(pool).absolute())}
    languages = metadata_files(Path(metadata).absolute())
    identifier = identifier or FastLangdetect()
    settings = {
        "mode": mode,
        "metadata": {lang: file_sha256(path) for lang, path in languages.items()},
        "language_id": identifier.name,
    }
    open_stage(out, SETTINGS, settings, list(shards))
    return [
        Stage("matcher tables", out, languages, _BuildTables(out, mode), partial(_has_tables, out), unit="languages"),
        Stage(
            "match",
            out,
            shards,
            _MatchShard(out, frozenset(languages), identifier),
            partial(is_matched, out),
            invalidates=(out / MERGED,),
        ),
    ]


def tables_folder(out: Path, lang: str) -> Path:
    """Where a matched pool keeps the matcher tables of a language."""
    return out / "matchers" / lang


def counts_path(out: Path, shard: str) -> Path:
    """Counts of one shard."""
    return out / "counts" / f"{shard}.npz"


def is_matched(out: Path, shard: str) -> bool:
    """Whether all outputs of the shard are there."""
    paths = (out / f"{shard}.parquet", counts_path(out, shard), stats_path(out, shard))
    return all(path.is_file() for path in paths)


def read_settings(matched: Path) -> dict[str, Any]:
    """Settings and shards of a matched pool, all of whose shards are finished.

    Raises:
        UserError: not a matched pool, or matching is not finished.
    """
    settings = planned_settings(matched)
    missing = [name for name in settings["shards"] if not is_matched(matched, name)]
    if missing:
        raise UserError(
            f"{matched}: {len(missing)} of {len(settings['shards'])} shards are not matched yet (the first is "
            f"{missing[0]!r}); run the same `mc2 curate match` again"
        )
    return settings


def planned_settings(matched: Path) -> dict[str, Any]:
    """As :func:`read_settings`, of a pool whose shards may still have to be matched."""
    if not (matched / SETTINGS).is_file():
        raise UserError(f"{matched}: not a matched pool (no {SETTINGS}); run `mc2 curate match` first")
    return read_fields(matched / SETTINGS, MatchSettings, cure="run `mc2 curate match` into another folder")


def _has_tables(out: Path, lang: str) -> bool:
    return is_saved(tables_folder(out, lang))


@dataclass(frozen=True)
class _BuildTables:
    """Builds and saves the matcher tables of one language; picklable."""

    out: Path
    mode: str

    def __call__(self, lang: str, path: Path) -> None:
        entries = read_entries(path)
        try:
            matcher = Matcher.build(entries, self.mode)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        matcher.save(tables_folder(self.out, lang))


@lru_cache(maxsize=512)
def _matcher(folder: Path) -> Matcher:
    return Matcher.load(folder)


@dataclass
class _Tally:
    """Counters of a shard, over its pieces."""

    rows: int = 0
    matched: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)
    votes: dict[str, Sparse] = field(default_factory=dict)
    languages: dict[str, Counter[str]] = field(default_factory=dict)
    images: Distinct = field(default_factory=Distinct)
    images_of: dict[str, Distinct] = field(default_factory=dict)

    def add_matched(self, rows: pa.Table, offsets: npt.NDArray[np.int64], ids: npt.NDArray[np.uint32]) -> None:
        """Take in rows that matched, with their entries in CSR form."""
        self.matched += len(rows)
        keys = rows["key"].combine_chunks()
        self.images.add(keys)
        for lang, members in rows_by_language(rows):
            of_lang = ids if len(members) == len(rows) else csr.take(offsets, ids, members)[1]
            votes = count_votes(of_lang)
            self.votes[lang] = add_sparse([self.votes[lang], votes]) if lang in self.votes else votes
            self.languages.setdefault(lang, Counter()).update(texts=len(members), matches=len(of_lang))
            self.images_of.setdefault(lang, Distinct()).add(keys.take(pa.array(members)))

    def stats(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "matched": self.matched,
            "images": len(self.images),
            "drops": dict(self.drops),
            "captions": dict(self.captions),
            "languages": {lang: {**n, "images": len(self.images_of[lang])} for lang, n in self.languages.items()},
        }


@dataclass(frozen=True)
class _MatchShard:
    """Matches one shard, piece by piece; picklable."""

    out: Path
    languages: frozenset[str]
    identifier: LanguageIdentifier

    def __call__(self, name: str, shard: PoolShard) -> None:
        tally = _Tally()
        write_matched_batches(self.out / f"{name}.parquet", self._matched(shard, tally))
        write_votes(counts_path(self.out, name), tally.votes)
        write_json(stats_path(self.out, name), tally.stats())

    def _matched(self, shard: PoolShard, tally: _Tally) -> Iterator[pa.Table]:
        """Rows of the shard that match, piece by piece; everything is counted in ``tally``."""
        for rows, drops in iter_captions(shard):
            tally.rows += len(rows) + drops.total()
            rows = self._known(self._with_language(rows), drops)
            for row in rows["lang"].value_counts().to_pylist():
                tally.captions[row["values"]] += row["counts"]
            offsets, ids = self._match(rows)
            has_match = np.diff(offsets) > 0
            if not has_match.all():
                drops["no_match"] += int((~has_match).sum())
                kept = np.flatnonzero(has_match)
                rows = rows.take(pa.array(kept))
                offsets, ids = csr.take(offsets, ids, kept)
            tally.drops += drops
            tally.add_matched(rows, offsets, ids)
            yield matched_table(rows, offsets, ids)

    def _with_language(self, rows: pa.Table) -> pa.Table:
        if "lang" in rows.column_names:
            return rows
        texts = rows["text"].to_pylist()
        langs = self.identifier.identify(texts) if texts else []
        return rows.append_column("lang", pa.array(langs, pa.large_string()))

    def _known(self, rows: pa.Table, drops: Counter[str]) -> pa.Table:
        """Rows in a language that has metadata; a row whose ``lang`` is null has none."""
        known = pc.is_in(rows["lang"], pa.array(sorted(self.languages), pa.large_string()))
        unknown = len(rows) - pc.sum(known, min_count=0).as_py()
        if unknown:
            drops["unknown_language"] += unknown
        return rows.filter(known)

    def _match(self, rows: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """Entries of every row in CSR form, each language's rows matched together."""
        texts = rows["text"].combine_chunks()
        by_language = rows_by_language(rows)
        if len(by_language) == 1:
            return _matcher(tables_folder(self.out, by_language[0][0])).match(texts)
        order: list[npt.NDArray[np.int64]] = []
        lengths, ids = [np.zeros(0, np.int64)], [np.zeros(0, np.uint32)]
        for lang, members in by_language:
            found = _matcher(tables_folder(self.out, lang)).match(texts.take(pa.array(members)))
            order.append(members)
            lengths.append(np.diff(found[0]))
            ids.append(found[1])
        offsets = np.concatenate(([0], np.cumsum(np.concatenate(lengths)))).astype(np.int64)
        back = np.argsort(np.concatenate(order)) if order else np.zeros(0, np.int64)
        return csr.take(offsets, np.concatenate(ids), back)


def rows_by_language(rows: pa.Table) -> list[tuple[str, npt.NDArray[np.int64]]]:
    """Row numbers of each language in ``rows["lang"]`` (no nulls), languages and rows ascending."""
    encoded = rows["lang"].combine_chunks().dictionary_encode()
    codes = np.asarray(encoded.indices, np.int64)
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(encoded.dictionary) + 1))
    names = encoded.dictionary.to_pylist()
    return sorted((name, order[bounds[code] : bounds[code + 1]]) for code, name in enumerate(names))
