"""Stage 1: caption pool + metadata -> matched pool and counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mc2_hpc.balancing import csr
from mc2_hpc.curation.counts import Sparse, add_sparse, count_votes, write_votes
from mc2_hpc.curation.filtering.record import pool_filters
from mc2_hpc.curation.filters import Filter, apply_filters, complete, load_filter, sources_of
from mc2_hpc.curation.matched import (
    MERGED,
    OUTPUTS,
    SETTINGS,
    MatchStats,
    counts_path,
    matched_table,
    rows_by_language,
    tables_folder,
    write_matched_batches,
)
from mc2_hpc.curation.matching.matcher import LAST_SAVED, Matcher, is_saved
from mc2_hpc.curation.matching.rules import check_mode, mode_settings
from mc2_hpc.curation.pool.captions import PoolShard, iter_captions, list_pool
from mc2_hpc.curation.pool.copying import check_elsewhere
from mc2_hpc.curation.pool.distinct import Distinct
from mc2_hpc.curation.pool.language_codes import bounded, in_known_languages
from mc2_hpc.curation.pool.language_id import (
    DEFAULT_IDENTIFIER,
    LanguageIdentifier,
    make_identifier,
    with_language,
)
from mc2_hpc.drops import Drop
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import Plan, Stage, open_folder, stats_path, sum_kept
from mc2_hpc.jobs.named import Named, to_plain
from mc2_hpc.metadata.files import metadata_files, read_entries
from mc2_hpc.shard_paths import Names
from mc2_hpc.storage import file_sha256, write_json


def plan_match(
    pool: Names,
    metadata: str | Path,
    out: str | Path,
    mode: str = "fixed",
    *,
    language_id: str | Path = DEFAULT_IDENTIFIER,
    filters: Sequence[Named] = (),
) -> Plan:
    """Match every caption of a pool against the metadata of its language.

    Writes ``<shard>.parquet`` (rows that matched, with ``lang`` and ``entries``), ``counts/<shard>.npz``,
    ``stats/<shard>.json``, the matcher tables under ``matchers/`` and ``match.json``. Finished shards are skipped.

    Args:
        mode: matching rules, see :mod:`mc2_hpc.curation.matching.rules`.
        language_id: identifies the language in shards without a ``lang`` column; see
            :func:`~mc2_hpc.curation.pool.language_id.make_identifier`.
        filters: drop captions before matching, in this order; see :mod:`mc2_hpc.curation.filters`.

    Returns:
        stages, whose result is counters over all shards: ``rows``, ``matched``, ``images``, ``drops`` by reason,
        ``unknown_languages`` (captions by their language code, a few dozen codes per shard), ``captions`` (usable
        captions, by language) and ``languages``

    Raises:
        UserError: invalid pool, metadata, settings or filters, or ``out`` is the pool's folder.
    """
    out = Path(out).absolute()
    check_mode(mode)
    if Path(language_id).is_file():
        language_id = Path(language_id).absolute()
    shards = {shard.name: shard for shard in list_pool(pool)}
    check_elsewhere(shards.values(), out)
    languages = metadata_files(Path(metadata).absolute())
    settings: dict[str, Any] = {
        **mode_settings(mode),
        "metadata": {lang: file_sha256(path) for lang, path in languages.items()},
        "language_id": make_identifier(language_id).name,
    }
    if filters:
        opened = [load_filter(named) for named in filters]
        sources = [sources_of(f"--filter {named.name}", one) for named, one in zip(filters, opened, strict=True)]
        filters = [complete(named, one) for named, one in zip(filters, opened, strict=True)]
        settings["filters"] = to_plain(filters)
        if any(sources):
            settings["filter_sources"] = sources
    if of_pool := pool_filters(list(shards.values())):
        settings["pool_filters"] = of_pool
    open_folder(out, SETTINGS, settings, list(shards))
    tables = BuildTables(out, mode)
    work = MatchShard(out, frozenset(languages), str(language_id), tuple(filters))
    return Plan(
        (
            Stage("matcher tables", out, languages, tables, (f"matchers/{{shard}}/{LAST_SAVED}",), unit="languages"),
            Stage("match", out, shards, work, OUTPUTS, invalidates=(out / MERGED,)),
        ),
        result=lambda: sum_kept(out, list(shards), "matched", MatchStats),
    )


@dataclass(frozen=True)
class BuildTables:
    """Builds and saves the matcher tables of one language."""

    out: Path
    mode: str

    def is_current(self, lang: str, value: object) -> bool:
        """Whether the tables are in this version's format."""
        return is_saved(tables_folder(self.out, lang))

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
    """Counters of a shard, summed over its pieces."""

    rows: int = 0
    matched: int = 0
    drops: Counter[str] = field(default_factory=Counter)
    captions: Counter[str] = field(default_factory=Counter)
    unknown: Counter[str] = field(default_factory=Counter)
    votes: dict[str, Sparse] = field(default_factory=dict)
    languages: dict[str, Counter[str]] = field(default_factory=dict)
    images: Distinct = field(default_factory=Distinct)
    images_of: dict[str, Distinct] = field(default_factory=dict)

    def add_matched(self, rows: pa.Table, offsets: npt.NDArray[np.int64], ids: npt.NDArray[np.uint32]) -> None:
        """Add rows that matched, with their entries in CSR form."""
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
            "unknown_languages": dict(self.unknown),
            "captions": dict(self.captions),
            "languages": {lang: {**n, "images": len(self.images_of[lang])} for lang, n in self.languages.items()},
        }


@dataclass(frozen=True)
class MatchShard:
    """Matches one shard, piece by piece."""

    out: Path
    languages: frozenset[str]
    language_id: str
    filters: tuple[Named, ...] = ()

    @cached_property
    def _identifier(self) -> LanguageIdentifier:
        return make_identifier(self.language_id)

    @cached_property
    def _filters(self) -> list[tuple[str, Filter]]:
        return [(named.name, load_filter(named)) for named in self.filters]

    def __call__(self, name: str, shard: PoolShard) -> None:
        tally = _Tally()
        write_matched_batches(self.out / f"{name}.parquet", self._matched(shard, tally))
        write_votes(counts_path(self.out, name), tally.votes)
        write_json(stats_path(self.out, name), tally.stats())

    def _matched(self, shard: PoolShard, tally: _Tally) -> Iterator[pa.Table]:
        """The matching rows of the shard, piece by piece; everything is counted in ``tally``."""
        for rows, drops in iter_captions(shard):
            tally.rows += len(rows) + drops.total()
            rows, unknown = in_known_languages(with_language(rows, self._identifier), self.languages)
            if unknown:
                drops[Drop.LANGUAGE_UNKNOWN] += unknown.total()
                tally.unknown = bounded(tally.unknown + unknown)
            rows = apply_filters(self._filters, rows, drops)
            for row in rows["lang"].value_counts().to_pylist():
                tally.captions[row["values"]] += row["counts"]
            offsets, ids = self._match(rows)
            has_match = np.diff(offsets) > 0
            if not has_match.all():
                drops[Drop.NO_MATCH] += int((~has_match).sum())
                kept = np.flatnonzero(has_match)
                rows = rows.take(pa.array(kept))
                offsets, ids = csr.take(offsets, ids, kept)
            tally.drops += drops
            tally.add_matched(rows, offsets, ids)
            yield matched_table(rows, offsets, ids)

    def _match(self, rows: pa.Table) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]:
        """The entries of every row in CSR form; each language's rows are matched together."""
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
