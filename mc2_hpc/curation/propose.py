"""What different English thresholds would keep of a matched pool, to choose one for a pool of any size."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mc2_hpc.balancing import csr
from mc2_hpc.balancing.selection import keep_probability
from mc2_hpc.balancing.thresholds import (
    RECIPE_TAIL_MASS,
    entry_probabilities,
    proposed_threshold,
    threshold_to_mass,
)
from mc2_hpc.curation.balance import ENGLISH
from mc2_hpc.curation.counts import VotesFile, dense
from mc2_hpc.curation.matched import counts_path, entries_of, matched_batches, read_settings, rows_by_language
from mc2_hpc.errors import UserError
from mc2_hpc.metadata.files import metadata_files, read_entries
from mc2_hpc.storage import file_sha256

TAIL_MASSES = (RECIPE_TAIL_MASS, 0.12, 0.25, 0.5)
"""The recipe's share of matches in the tail, which is proposed, and larger ones, which keep more."""


@dataclass(frozen=True)
class Outcome:
    """What a threshold would do to the English captions."""

    t_en: int
    tail_mass: float
    """Share of matches with entries below the threshold; the other languages get the same."""
    entries_head: int
    entries_matched: int
    texts: int
    """English captions that match an entry."""
    expected_texts: float
    """How many of them an epoch would keep, if each were the one drawn for its image."""
    metadata_sha256: str
    """Of English's ``en.json``, whose entries were counted."""

    def to_dict(self) -> dict[str, Any]:
        """The figures by name, for JSON."""
        return asdict(self)


def propose(matched: str | Path, metadata: str | Path, tail_masses: Sequence[float] = TAIL_MASSES) -> list[Outcome]:
    """The outcomes of the thresholds that come closest to ``tail_masses``, each threshold once, ascending.

    Reads every shard's counts, and then the entries of its English captions; one shard is in memory at a time.

    Raises:
        UserError: unfinished or foreign input, or no English caption matched.
    """
    matched, files = Path(matched), metadata_files(Path(metadata))
    settings = read_settings(matched)
    shards = settings["shards"]
    if ENGLISH not in files:
        raise UserError(f"{metadata}: no {ENGLISH}.json; the threshold is that of English")
    digest = file_sha256(files[ENGLISH])
    if settings["metadata"].get(ENGLISH) != digest:
        raise UserError(f"{metadata}: not the metadata {matched} was matched with; name that one, or match again")
    counts = np.zeros(len(read_entries(files[ENGLISH])), np.uint64)
    for shard in shards:
        with VotesFile(counts_path(matched, shard)) as votes:
            if ENGLISH in votes.langs:
                counts += dense(votes[ENGLISH], len(counts))
    if not counts.any():
        raise UserError(f"{matched}: no English caption matched; add English captions and metadata")
    thresholds = sorted({proposed_threshold(counts, mass) for mass in tail_masses})
    texts, expected = _expected(matched, shards, [entry_probabilities(counts, t) for t in thresholds])
    return [
        Outcome(
            t_en=t,
            tail_mass=threshold_to_mass(counts, t),
            entries_head=int((counts > t).sum()),
            entries_matched=int((counts > 0).sum()),
            texts=texts,
            expected_texts=kept,
            metadata_sha256=digest,
        )
        for t, kept in zip(thresholds, expected, strict=True)
    ]


def _expected(
    matched: Path, shards: Sequence[str], probabilities: Sequence[npt.NDArray[np.float32]]
) -> tuple[int, list[float]]:
    """The number of English captions, and the sum of their keep probabilities for each set of entry probabilities."""
    texts, expected = 0, [0.0] * len(probabilities)
    for shard in shards:
        for rows in matched_batches(matched / f"{shard}.parquet", ["lang", "entries"]):
            offsets, ids = entries_of(rows)
            members = dict(rows_by_language(rows)).get(ENGLISH)
            if members is None:
                continue
            texts += len(members)
            taken = csr.take(offsets, ids, members)
            for number, probs in enumerate(probabilities):
                expected[number] += float(keep_probability(*taken, probs).sum())
    return texts, expected
