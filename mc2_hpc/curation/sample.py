"""Sampling offline: the rows that one epoch of online balancing would train on, written out.

A sample is itself a matched pool with the same files, and its ``match.json`` says what it is a sample of. It can be
packed, counted and explained like any other. Do not balance it again: leave ``data.balance`` unset when training on it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mc2_hpc.balancing import csr
from mc2_hpc.balancing.folder import REPORT, BalanceFolder
from mc2_hpc.balancing.selection import choose_texts, passes
from mc2_hpc.curation.counts import count_votes, write_votes
from mc2_hpc.curation.matched import (
    OUTPUTS,
    SETTINGS,
    MatchStats,
    counts_path,
    entries_of,
    read_matched,
    read_settings,
    rows_by_language,
    write_matched,
)
from mc2_hpc.drops import Drop
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import REDO, Plan, Stage, open_folder, stats_path, sum_kept
from mc2_hpc.reading.arrays import map_array
from mc2_hpc.reading.json_file import read_json
from mc2_hpc.storage import file_sha256, write_array, write_json

_CHECKED_KEYS = 1 << 20
_logger = logging.getLogger(__name__)


def plan_sample(matched: str | Path, balance: str | Path, out: str | Path, *, seed: int = 0, epoch: int = 0) -> Plan:
    """Write the rows of a matched pool that the loader would keep in ``epoch`` with this seed.

    A pure function of the rows: the same subset on any number of shards, workers and machines, provided that all rows
    of an image are in one shard. Finished shards are skipped.

    Args:
        matched: folder that :func:`~mc2_hpc.curation.match.plan_match` fills, every shard of it finished.
        balance: folder that :func:`~mc2_hpc.curation.balance.plan_balance` writes, from this metadata.

    Returns:
        stages, whose result is counters over all shards: ``rows`` (read), ``captions`` (the same by language),
        ``matched`` (rows kept), their ``images`` and ``languages``, ``drops`` by reason (``not_drawn``: another
        text of its image was drawn; ``balanced``: drawn, but thinned), and ``keys_in_several_shards``: how many of the
        ``checked`` keys break the rule above

    Raises:
        UserError: unfinished or foreign input.
    """
    matched, out = Path(matched).absolute(), Path(out).absolute()
    settings = read_settings(matched)
    probs = BalanceFolder(Path(balance).absolute())
    _check_same_pool(matched, settings, probs)
    shards = settings.pop("shards")
    images = sum(read_json(stats_path(matched, name), MatchStats, cure=REDO).images for name in shards)
    origin = {"seed": seed, "epoch": epoch, "balance": file_sha256(probs.folder / REPORT)}
    open_folder(out, SETTINGS, {**settings, "sample": origin}, shards)
    work = SampleShard(matched, out, probs.folder, seed, epoch, min(1.0, _CHECKED_KEYS / max(images, 1)))
    stage = Stage("sample", out, dict.fromkeys(shards), work, (*OUTPUTS, "keys/{shard}.npy"))
    return Plan(
        (stage,),
        lambda: {**sum_kept(out, shards, "matched", MatchStats), "keys_in_several_shards": _check_keys(out, shards)},
    )


def select_rows(
    rows: pa.Table, probs: BalanceFolder, *, seed: int, epoch: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The rows of a matched table drawn for their image, and the subset that balancing keeps.

    The subset equals :func:`~mc2_hpc.balancing.selection.select`, computed from Arrow columns.
    """
    from mc2_hpc.draw_kernels import hash_column

    if len(rows) == 0:
        return np.zeros(0, np.int64), np.zeros(0, np.int64)
    keys = hash_column(rows["key"].combine_chunks())
    chosen = choose_texts(keys, hash_column(rows["text"].combine_chunks()), seed=seed, epoch=epoch)
    langs = rows["lang"].combine_chunks().dictionary_encode()
    codes = np.asarray(langs.indices)[chosen]
    names = langs.dictionary.to_pylist()
    kept = passes(keys[chosen], chosen, *entries_of(rows), names, codes, probs, seed=seed, epoch=epoch)
    return chosen, chosen[kept]


def _check_same_pool(matched: Path, settings: dict[str, Any], probs: BalanceFolder) -> None:
    if "sample" in settings:
        raise UserError(f"{matched}: is already a sample; name the matched pool it was drawn from")
    report = probs.report()
    if report["sources"]["metadata"] != settings["metadata"] or report["mode"] != settings["mode"]:
        raise UserError(
            f"{probs.folder}: the metadata or mode it was balanced with differs from that of {matched}; "
            "run `mc2 curate balance` on this matched pool"
        )


@dataclass(frozen=True)
class SampleShard:
    """Samples one shard."""

    matched: Path
    out: Path
    balance: Path
    seed: int
    epoch: int
    checked_share: float

    @cached_property
    def _probs(self) -> BalanceFolder:
        return BalanceFolder(self.balance)

    def __call__(self, name: str, value: None) -> None:
        path = self.matched / f"{name}.parquet"
        rows = read_matched(path)
        try:
            chosen, kept = select_rows(rows, self._probs, seed=self.seed, epoch=self.epoch)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        self._write_checked_keys(name, rows["key"].take(pa.array(chosen)))
        num_rows, captions = len(rows), {lang: len(members) for lang, members in rows_by_language(rows)}
        rows = rows.take(pa.array(kept))
        offsets, ids = entries_of(rows)
        votes, languages = {}, {}
        for lang, members in rows_by_language(rows):
            _, of_lang = csr.take(offsets, ids, members)
            votes[lang] = count_votes(of_lang)
            languages[lang] = {"texts": len(members), "images": len(members), "matches": len(of_lang)}
        write_votes(counts_path(self.out, name), votes)
        write_matched(self.out / f"{name}.parquet", rows)
        stats = {
            "rows": num_rows,
            "matched": len(rows),
            "images": len(rows),
            "drops": {Drop.NOT_DRAWN: num_rows - len(chosen), Drop.BALANCED: len(chosen) - len(rows)},
            "captions": captions,
            "languages": languages,
        }
        write_json(stats_path(self.out, name), stats)

    def _write_checked_keys(self, name: str, keys: pa.ChunkedArray) -> None:
        """Write the hashes of a share of the keys; a given key is in it, or not, whatever its shard."""
        from mc2_hpc.draw_kernels import hash_column

        hashes = np.sort(hash_column(keys.combine_chunks()))
        highest = np.uint64(min(int(self.checked_share * 2**64), 2**64 - 1))
        checked = hashes[: np.searchsorted(hashes, highest, side="right")]
        write_array(_keys_path(self.out, name), checked)


def _keys_path(out: Path, shard: str) -> Path:
    return out / "keys" / f"{shard}.npy"


def _check_keys(out: Path, shards: list[str]) -> dict[str, int]:
    """Count the checked keys that are in more than one shard, and warn about them."""
    hashes = np.concatenate([map_array(_keys_path(out, name), np.uint64, cure=REDO) for name in shards])
    distinct, times = np.unique(hashes, return_counts=True)
    found = int((times > 1).sum())
    if found:
        _logger.warning(
            "%s: %d of %d checked image keys are in several shards, and each shard drew a text for its own copy; "
            "put all rows of an image in one shard, beside the image",
            *(out, found, len(distinct)),
        )
    return {"checked": len(distinct), "found": found}
