"""What rows share: curated shards and tokenizers, each made once and stored under its content address.

out/curated/<address>/shards, balance    input of ``mc2 train``
out/tokenizers/<address>.model
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from mc2_hpc import jobs
from mc2_hpc.ablation.addresses import address
from mc2_hpc.ablation.settings import CurationSettings, DataPaths, TokenizerSettings
from mc2_hpc.balancing import csr
from mc2_hpc.balancing.folder import REPORT, BalanceFolder, read_report
from mc2_hpc.balancing.selection import keep_probability
from mc2_hpc.balancing.thresholds import entry_probabilities, threshold_to_mass
from mc2_hpc.caption_tables import LANG, column_types
from mc2_hpc.curation.balance import plan_balance
from mc2_hpc.curation.match import plan_match
from mc2_hpc.curation.matched import entries_of, matched_batches, rows_by_language
from mc2_hpc.curation.pack import plan_pack
from mc2_hpc.curation.pool.captions import iter_captions, list_pool
from mc2_hpc.curation.pool.language_codes import NO_CODE, in_known_languages
from mc2_hpc.data.tokenizer import Tokenizer, train_tokenizer
from mc2_hpc.errors import UserError
from mc2_hpc.metadata.files import metadata_files, read_entries, write_entries
from mc2_hpc.metadata.languages import known_code
from mc2_hpc.reading.parquet_file import open_parquet
from mc2_hpc.shard_paths import list_shards
from mc2_hpc.storage import is_complete, mark_complete, write_array, write_json, write_table

ENGLISH = "en"


@dataclass(frozen=True)
class Prepared:
    """An input of training, and its content address."""

    address: str
    path: Path


@dataclass(frozen=True)
class PreparedTokenizer(Prepared):
    """A tokenizer, and what a text tower needs to know about it."""

    vocab_size: int
    eos_id: int


def tokenize(settings: TokenizerSettings, data: DataPaths, pool: str, out: Path) -> PreparedTokenizer:
    """The tokenizer for these settings, trained on all captions of the pool unless it already exists.

    Args:
        pool: the pool's content address.
    """
    key = address(pool=pool, tokenizer=dataclasses.asdict(settings))
    path = out / "tokenizers" / f"{key}.model"
    if path.is_file():
        tokenizer = Tokenizer(path, settings.style)
    else:
        texts = (text for shard in list_pool(data.pool) for table, _ in iter_captions(shard) for text in _texts(table))
        tokenizer = train_tokenizer(texts, path, vocab_size=settings.vocab_size, style=settings.style)
    return PreparedTokenizer(key, path, tokenizer.vocab_size, tokenizer.eos_id)


def _texts(table: pa.Table) -> list[str]:
    return table["text"].to_pylist()


def curate(settings: CurationSettings, data: DataPaths, pool: str, metadata: str, out: Path) -> Prepared:
    """The training shards and balance for these settings, made unless they already exist.

    Args:
        pool, metadata: content addresses of the two folders.

    Raises:
        UserError: see ``plan_match``, ``plan_balance`` and ``plan_pack`` of curation; a language that the pool does not
            have; a pool without a ``lang`` column if the settings need one.
    """
    key = address(pool=pool, metadata=metadata, curation=dataclasses.asdict(settings))
    folder = out / "curated" / key
    if is_complete(folder):
        return Prepared(key, folder)
    write_json(folder / "settings.json", dataclasses.asdict(settings))
    entries = _metadata_view(settings.metadata, Path(data.metadata), folder / "metadata")
    relabel = settings.metadata != "by_language"
    whole = _pool_view(Path(data.pool), folder / "pool", [], relabel)
    matched = folder / "matched"
    jobs.run(plan_match(whole, entries, matched))
    jobs.run(plan_balance(matched, entries, folder / "tail_mass", settings.t_en))
    if settings.thresholds == "same":
        _balance_alike(folder / "tail_mass", matched, folder / "balance")
    else:
        _link(folder / "tail_mass", folder / "balance")
    if settings.languages:
        whole = _pool_view(Path(data.pool), folder / "chosen", settings.languages, relabel)
        matched = folder / "matched_chosen"
        jobs.run(plan_match(whole, entries, matched))
    jobs.run(plan_pack(whole, matched, folder / "shards"))
    mark_complete(folder)
    return Prepared(key, folder)


def _metadata_view(kind: str, metadata: Path, folder: Path) -> Path:
    """The metadata folder to match captions with."""
    files = metadata_files(metadata)
    if kind == "by_language":
        return metadata
    if kind == "english":
        if ENGLISH not in files:
            raise UserError(f"{metadata}: no {ENGLISH}.json, which metadata=english needs")
        entries = read_entries(files[ENGLISH])
    else:
        entries = list(dict.fromkeys(entry for path in files.values() for entry in read_entries(path)))
    write_entries(folder / f"{ENGLISH}.json", entries)
    return folder


def _pool_view(pool: Path, folder: Path, languages: list[str], relabel: bool) -> Path:
    """The pool itself, or a copy of its rows in these languages, all labelled English if ``relabel``."""
    if not languages and not relabel:
        return pool
    found: set[str] = set()
    for shard in list_pool(pool):
        if shard.captions is None or shard.images is None:
            raise UserError(f"{pool}: {shard.name} is not a .parquet beside a .tar, so its languages are unknown")
        with open_parquet(shard.captions, {LANG: column_types()[LANG]}, what="captions with their languages") as file:
            table = file.read()
        found.update(lang or NO_CODE for lang in table[LANG].unique().to_pylist())
        if languages:
            table, _ = in_known_languages(table, languages)
        if relabel:
            place = table.column_names.index(LANG)
            table = table.set_column(place, LANG, pa.array([ENGLISH] * len(table), pa.string()))
        write_table(folder / f"{shard.name}.parquet", table)
        _link(shard.images, folder / f"{shard.name}.tar")
    missing = sorted(set(languages) - {known_code(code, languages) for code in found})
    if missing:
        raise UserError(f"{pool}: no caption in language {missing[0]!r}; there are {', '.join(sorted(found))}")
    return folder


def _link(target: Path, link: Path) -> None:
    if not link.is_symlink():
        link.symlink_to(target.absolute())


def _balance_alike(balance: Path, matched: Path, out: Path) -> None:
    """Write a balance folder in which every language has English's threshold."""
    given = BalanceFolder(balance)
    report = given.report()
    t = report["t_en"]
    for lang in given:
        counts = given.counts(lang)
        for kind, array in (("counts", counts), ("probs", entry_probabilities(counts, t))):
            write_array(out / kind / f"{lang}.npy", array)
        report["languages"][lang] |= {
            "entries_head": int((counts > t).sum()),
            "tail_mass": threshold_to_mass(counts, t),
            "expected_texts": 0.0,
        }
    report["t"] = dict.fromkeys(report["t"], t)
    probs = {lang: np.load(out / "probs" / f"{lang}.npy", allow_pickle=False) for lang in given}
    for lang, expected in _expected_texts(matched, probs):
        report["languages"][lang]["expected_texts"] += expected
    total = sum(row["expected_texts"] for row in report["languages"].values())
    report["english_share_after"] = report["languages"][ENGLISH]["expected_texts"] / total
    write_json(out / REPORT, report)  # last: it marks the folder complete


def _expected_texts(matched: Path, probs: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(language, expected number of texts kept) for every piece of the matched pool."""
    for path in list_shards(matched, ".parquet"):
        for rows in matched_batches(path, ["lang", "entries"]):
            offsets, ids = entries_of(rows)
            for lang, members in rows_by_language(rows):
                yield lang, float(keep_probability(*csr.take(offsets, ids, members), probs[lang]).sum())


def english_share(settings: CurationSettings, curated: Path) -> float | None:
    """Share of English in the texts that balancing is expected to keep; None if all texts match the same metadata."""
    if settings.metadata != "by_language":
        return None
    languages = read_report(curated / "balance")["languages"]
    expected = {lang: languages[lang]["expected_texts"] for lang in settings.languages or languages}
    return expected.get(ENGLISH, 0.0) / sum(expected.values())
