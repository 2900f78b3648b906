"""Stage 1: caption pool + metadata -> matched pool and counts."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mc2_hpc.curation import csr
from mc2_hpc.curation.counts import count_votes, write_votes
from mc2_hpc.curation.language_id import FastLangdetect, LanguageIdentifier
from mc2_hpc.curation.matched import matched_table, write_matched
from mc2_hpc.curation.matcher import Matcher, is_saved
from mc2_hpc.curation.pools import PoolShard, list_pool, read_captions
from mc2_hpc.curation.shards import Progress, open_stage, run_shards, stats_path
from mc2_hpc.curation.text import check_mode
from mc2_hpc.errors import UserError
from mc2_hpc.metadata.files import metadata_files, read_entries
from mc2_hpc.storage import file_sha256, read_json, write_json

SETTINGS = "match.json"


def match(
    pool: str | Path,
    metadata: str | Path,
    out: str | Path,
    mode: str = "fixed",
    *,
    identifier: LanguageIdentifier | None = None,
    workers: int = 1,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Match every caption of a pool with the metadata of its language.

    Writes ``<shard>.parquet`` (rows that matched, with ``lang`` and ``entries``), ``counts/<shard>.npz``,
    ``stats/<shard>.json``, the matcher tables under ``matchers/`` and ``match.json``. Shards already finished are
    skipped.

    Args:
        mode: matching rules, see :mod:`mc2_hpc.curation.text`.
        identifier: tells the language of shards without a ``lang`` column; :class:`FastLangdetect` by default.
        workers: processes.

    Returns:
        counters over all shards: ``rows``, ``matched``, ``images``, ``drops`` by reason, ``languages``

    Raises:
        UserError: bad pool, metadata or settings; or shards that could not be read (every other one is done).
    """
    out = Path(out)
    check_mode(mode)
    shards = {shard.name: shard for shard in list_pool(pool)}
    languages = metadata_files(metadata)
    identifier = identifier or FastLangdetect()
    settings = {
        "mode": mode,
        "metadata": {lang: file_sha256(path) for lang, path in languages.items()},
        "language_id": identifier.name,
    }
    open_stage(out, SETTINGS, settings, list(shards))
    run_shards(
        languages,
        _BuildTables(out, mode),
        lambda lang: is_saved(tables_folder(out, lang)),
        stage="matcher tables",
        workers=workers,
        progress=progress,
    )
    run_shards(
        shards,
        _MatchShard(out, frozenset(languages), identifier),
        lambda name: is_matched(out, name),
        stage="match",
        workers=workers,
        progress=progress,
    )
    return sum_stats([read_json(stats_path(out, name)) for name in shards])


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


def sum_stats(stats: list[dict[str, Any]]) -> dict[str, Any]:
    """Add up the counters of shards, nested dictionaries key by key, keys sorted."""
    total: dict[str, Any] = {}
    for shard in stats:
        _add(total, shard)
    return total


def _add(total: dict[str, Any], more: dict[str, Any]) -> None:
    for key in sorted(more):
        if isinstance(more[key], dict):
            _add(total.setdefault(key, {}), more[key])
        else:
            total[key] = total.get(key, 0) + more[key]


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


@dataclass(frozen=True)
class _MatchShard:
    """Matches one shard; picklable."""

    out: Path
    languages: frozenset[str]
    identifier: LanguageIdentifier

    def __call__(self, name: str, shard: PoolShard) -> None:
        rows, drops = read_captions(shard)
        num_rows = len(rows) + drops.total()
        rows = self._with_language(rows)
        rows = self._known(rows, drops)
        offsets, ids = self._match(rows)
        has_match = np.diff(offsets) > 0
        if not has_match.all():
            drops["no_match"] += int((~has_match).sum())
        kept = np.flatnonzero(has_match)
        rows = rows.take(pa.array(kept))
        offsets, ids = csr.take(offsets, ids, kept)
        votes, languages = self._count(rows, offsets, ids)
        write_votes(counts_path(self.out, name), votes)
        write_matched(self.out / f"{name}.parquet", matched_table(rows, offsets, ids))
        stats = {
            "rows": num_rows,
            "matched": len(rows),
            "images": pc.count_distinct(rows["key"]).as_py(),
            "drops": dict(drops),
            "languages": languages,
        }
        write_json(stats_path(self.out, name), stats)

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
        order: list[npt.NDArray[np.int64]] = []
        lengths, ids = [np.zeros(0, np.int64)], [np.zeros(0, np.uint32)]
        for lang, members in rows_by_language(rows):
            found = _matcher(tables_folder(self.out, lang)).match(texts.take(pa.array(members)))
            order.append(members)
            lengths.append(np.diff(found[0]))
            ids.append(found[1])
        offsets = np.concatenate(([0], np.cumsum(np.concatenate(lengths)))).astype(np.int64)
        back = np.argsort(np.concatenate(order)) if order else np.zeros(0, np.int64)
        return csr.take(offsets, np.concatenate(ids), back)

    @staticmethod
    def _count(
        rows: pa.Table, offsets: npt.NDArray[np.int64], ids: npt.NDArray[np.uint32]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Votes of each language, and its numbers of texts, images and matches."""
        votes, languages = {}, {}
        for lang, members in rows_by_language(rows):
            _, of_lang = csr.take(offsets, ids, members)
            votes[lang] = count_votes(of_lang)
            images = pc.count_distinct(rows["key"].take(pa.array(members))).as_py()
            languages[lang] = {"texts": len(members), "images": images, "matches": len(of_lang)}
        return votes, languages


def rows_by_language(rows: pa.Table) -> list[tuple[str, npt.NDArray[np.int64]]]:
    """Row numbers of each language in ``rows["lang"]`` (no nulls), languages and rows ascending."""
    encoded = rows["lang"].combine_chunks().dictionary_encode()
    codes = np.asarray(encoded.indices, np.int64)
    order = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[order], np.arange(len(encoded.dictionary) + 1))
    names = encoded.dictionary.to_pylist()
    return sorted((name, order[bounds[code] : bounds[code + 1]]) for code, name in enumerate(names))
