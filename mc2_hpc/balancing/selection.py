"""Which rows an epoch trains on: one text per image, kept or dropped by balancing.

All rows of an image must be in the same shard as the image, because its text is chosen within a shard.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mc2_hpc.balancing import csr
from mc2_hpc.draws import hash_keys, random_uint64, uniform
from mc2_hpc.errors import UserError

StringsOrHashes = Sequence[str] | npt.NDArray[np.uint64]
"""Strings, or their :func:`~mc2_hpc.draws.hash_keys`."""


def keep_probability(
    offsets: npt.NDArray[np.integer], ids: npt.NDArray[np.uint32], probs: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Probability that a text is kept if each of its entries passes an independent draw: ``1 - prod(1 - probs[e])``.

    A text without entries has 0. Only multiplications, in the order of the ids: bit-identical on every machine.

    Args:
        offsets, ids: entries of each text in CSR form, ``(n + 1,)`` and ``(offsets[-1],)``.
        probs: float32 probability of each entry.

    Returns:
        float64 ``(n,)``

    Raises:
        UserError: an id is not in ``probs``.
    """
    first, last = int(offsets[0]), int(offsets[-1])
    used = ids[first:last]
    if len(used) and int(used.max()) >= len(probs):
        raise UserError(
            f"entry id {int(used.max())} lies beyond the {len(probs)} balancing probabilities; "
            "the shards and the balance folder come from different metadata"
        )
    starts = np.asarray(offsets[:-1], np.int64) - first
    missed = np.ones(len(starts), np.float64)
    filled = np.flatnonzero(np.diff(offsets))
    if len(filled):  # only empty rows lie between two filled ones, so the filled rows' starts bound the segments
        missed[filled] = np.multiply.reduceat(1.0 - probs[used].astype(np.float64), starts[filled])
    return 1.0 - missed


def choose_texts(keys: StringsOrHashes, texts: StringsOrHashes, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """One row per image, each of its texts with equal probability; rows with the same key belong to one image.

    Each row draws random bits from (seed, epoch, key, text) and the lowest of its image wins, so the choice depends
    neither on the order of rows nor on other images. The first row represents all identical texts of an image.

    Args:
        keys, texts: one per row: strings, or their :func:`hash_keys`.

    Returns:
        int64 row numbers, ascending, one per distinct key
    """
    key_hashes, text_hashes = _hashes(keys), _hashes(texts)
    if len(key_hashes) == 0:
        return np.zeros(0, np.int64)
    order, firsts = None, _run_starts(key_hashes)
    if len(_run_starts(np.sort(key_hashes[firsts]))) < len(firsts):  # some image's rows are not adjacent
        order = np.argsort(key_hashes, kind="stable")
        key_hashes, text_hashes = key_hashes[order], text_hashes[order]
        firsts = _run_starts(key_hashes)
    num_rows = np.diff(firsts, append=len(key_hashes))
    of_key = random_uint64(key_hashes[firsts], seed=seed, epoch=epoch, purpose="text of key")
    draws = random_uint64(text_hashes ^ np.repeat(of_key, num_rows), seed=seed, epoch=epoch, purpose="text")
    lowest = np.minimum.reduceat(draws, firsts)
    rows = np.flatnonzero(draws == np.repeat(lowest, num_rows))
    if len(rows) > len(firsts):
        rows = rows[_run_starts(key_hashes[rows])]
    return rows if order is None else np.sort(order[rows])


def _run_starts(values: npt.NDArray) -> npt.NDArray[np.int64]:
    """Where each run of equal ``values`` begins; there is at least one value."""
    return np.flatnonzero(np.concatenate(([True], values[1:] != values[:-1])))


def select(
    keys: StringsOrHashes,
    texts: StringsOrHashes,
    offsets: npt.NDArray[np.integer],
    ids: npt.NDArray[np.uint32],
    langs: Sequence[str] | npt.NDArray,
    probs: Mapping[str, npt.NDArray[np.float32]] | None,
    *,
    seed: int,
    epoch: int,
) -> npt.NDArray[np.int64]:
    """Rows that an epoch trains on: one text per image, kept or dropped by balancing.

    Args:
        keys, texts: image key and caption of each row: strings, or their :func:`hash_keys` (which a caller may reuse
            across epochs).
        offsets, ids: matched entries of each row in CSR form.
        langs: language code of each row.
        probs: float32 entry probabilities of each language; ``None`` keeps every chosen row.

    Returns:
        int64 row numbers, ascending, at most one per key

    Raises:
        UserError: ``probs`` lacks a language or an entry that the rows have.
    """
    key_hashes = _hashes(keys)
    rows = choose_texts(key_hashes, texts, seed=seed, epoch=epoch)
    if probs is None or len(rows) == 0:
        return rows
    names, codes = np.unique(np.asarray(langs)[rows], return_inverse=True)
    return rows[passes(key_hashes[rows], rows, offsets, ids, names, codes, probs, seed=seed, epoch=epoch)]


def passes(
    key_hashes: npt.NDArray[np.uint64],
    rows: npt.NDArray[np.int64],
    offsets: npt.NDArray[np.integer],
    ids: npt.NDArray[np.uint32],
    names: Sequence[str] | npt.NDArray,
    codes: npt.NDArray[np.integer],
    probs: Mapping[str, npt.NDArray[np.float32]],
    *,
    seed: int,
    epoch: int,
) -> npt.NDArray[np.bool_]:
    """Whether balancing keeps each of ``rows``, which are already chosen for their images.

    Args:
        key_hashes: hash of the image key of each of ``rows``, ``(n,)``.
        rows: row numbers, ``(n,)``.
        offsets, ids: matched entries of all rows in CSR form.
        names, codes: the language of ``rows[i]`` is ``names[codes[i]]``.

    Returns:
        bool ``(n,)``

    Raises:
        UserError: ``probs`` lacks a language or an entry that the rows have.
    """
    by_language = np.argsort(codes, kind="stable")
    bounds = np.searchsorted(codes[by_language], np.arange(len(names) + 1))
    taken, entries = csr.take(offsets, ids, rows[by_language])
    probability = np.zeros(len(rows), np.float64)
    for name, begin, end in zip(names, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        if begin == end:
            continue
        lang = str(name)
        if lang not in probs:
            raise UserError(
                f"no balancing probabilities for language {lang!r}; "
                "the shards and the balance folder come from different pools"
            )
        probability[by_language[begin:end]] = keep_probability(taken[begin : end + 1], entries, probs[lang])
    return uniform(key_hashes, seed=seed, epoch=epoch, purpose="keep") < probability


def _hashes(values: StringsOrHashes) -> npt.NDArray[np.uint64]:
    return values if isinstance(values, np.ndarray) else hash_keys(values)
