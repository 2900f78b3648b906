"""Captions of a pool, drawn by language: what a tokenizer is trained on and inspected with."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from mc2_hpc.caption_tables import KEY, LANG, TEXT
from mc2_hpc.curation.pool.captions import PoolShard, iter_captions, list_pool
from mc2_hpc.draw_kernels import hash_column
from mc2_hpc.draws import uniform
from mc2_hpc.errors import UserError
from mc2_hpc.shard_paths import Names

NO_LANGUAGE = "(none)"
"""Language of the captions of a pool that does not tell it."""

_NUL = pa.scalar("\0", pa.large_string())

Quotas = Callable[[Mapping[str, int]], Mapping[str, float]]
"""Maps the number of captions in each language to the number to draw, which may be larger."""


@dataclass(frozen=True, kw_only=True)
class DrawnCaptions:
    """Captions of each language, in an order that depends on the captions and the seed alone."""

    texts: dict[str, list[str]]
    available: Counter[str]
    """Captions of each language in the pool."""
    drops: Counter[str]
    """Captions that cannot be used, by reason (:data:`mc2_hpc.drops.MEANINGS`)."""


def draw_captions(
    pool: Names, quotas: Quotas, *, seed: int = 0, progress: Callable[[int, int], None] | None = None
) -> DrawnCaptions:
    """Draw captions at random, about ``quotas`` of each language.

    A first pass counts the captions of each language. In a second pass each is kept if its counter-based hash falls
    below quota / count. So the number kept is the quota up to its binomial spread, and the choice does not depend on
    shards or their order.

    Args:
        pool: see :func:`mc2_hpc.curation.pool.captions.list_pool`; the column ``lang`` is optional.
        progress: called as ``progress(shards read, shards to read)``, each shard counted twice.

    Raises:
        UserError: no such pool, a shard cannot be read, or no caption in it can be used.
    """
    shards = list_pool(pool)
    available, drops = Counter[str](), Counter[str]()
    for done, shard in enumerate(shards, start=1):
        for table, dropped in iter_captions(shard):
            drops += dropped
            for row in _languages(table).value_counts().to_pylist():
                available[row["values"]] += row["counts"]
        if progress:
            progress(done, 2 * len(shards))
    if not available:
        reasons = ", ".join(f"{reason} {count}" for reason, count in drops.most_common())
        raise UserError(f"{pool}: no caption that can be used" + (f" ({reasons})" if reasons else ""))
    wanted = quotas(available)
    shares = {lang: min(1.0, wanted[lang] / count) for lang, count in available.items()}
    found: dict[str, list[tuple[float, str]]] = {lang: [] for lang in sorted(available)}
    for done, shard in enumerate(shards, start=len(shards) + 1):
        _draw(shard, shares, seed, found)
        if progress:
            progress(done, 2 * len(shards))
    texts = {lang: [text for _, text in sorted(drawn)] for lang, drawn in found.items()}
    return DrawnCaptions(texts=texts, available=available, drops=drops)


def _languages(table: pa.Table) -> pa.Array:
    if LANG not in table.column_names:
        return pa.repeat(pa.scalar(NO_LANGUAGE, pa.large_string()), len(table))
    return table[LANG].fill_null(NO_LANGUAGE).combine_chunks()


def _draw(shard: PoolShard, shares: Mapping[str, float], seed: int, found: dict[str, list[tuple[float, str]]]) -> None:
    for table, _ in iter_captions(shard):
        encoded = _languages(table).dictionary_encode()
        languages = encoded.dictionary.to_pylist()
        language_ids = encoded.indices.to_numpy()
        names = pc.binary_join_element_wise(table[KEY], table[TEXT], _NUL).combine_chunks()
        draws = uniform(hash_column(names), seed=seed, epoch=0, purpose="vocabulary")
        share_of: npt.NDArray[np.float64] = np.array([shares[lang] for lang in languages], np.float64)
        kept = np.flatnonzero(draws < share_of[language_ids])
        texts = table[TEXT].take(pa.array(kept)).to_pylist()
        for row, text in zip(kept, texts, strict=True):
            found[languages[language_ids[row]]].append((float(draws[row]), text))


def tempered(total: int, alpha: float) -> Quotas:
    """Quotas that sum to ``total``, proportional to ``count ** alpha``.

    With ``alpha`` below 1, rare languages get more than their share; 0.3 is the value of XLM-R (Conneau et al. 2020,
    arXiv 1911.02116). What a language has too little of for its quota is divided among the others.
    """

    def quotas(available: Mapping[str, int]) -> Mapping[str, float]:
        wanted: dict[str, float] = {}
        # Languages that fall short are filled first: the rarer a language, the larger its quota beside them.
        rest, weights = float(total), sum(count**alpha for count in available.values())
        for lang, count in sorted(available.items(), key=lambda item: item[1] ** (1 - alpha)):
            weight = count**alpha
            wanted[lang] = min(float(count), rest * weight / weights)
            rest -= wanted[lang]
            weights -= weight
        return wanted

    return quotas


def up_to(most: int) -> Quotas:
    """Quotas of ``most`` captions per language."""
    return lambda available: dict.fromkeys(available, float(most))
