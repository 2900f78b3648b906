"""Random draws of the data path as pure functions of (seed, epoch, key, purpose).

No draw depends on a process's random stream, so curation and loading make the same choices on any number of shards,
ranks and workers, and a resumed run repeats none of them differently.
"""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

from mc2_hpc.curation import csr
from mc2_hpc.errors import UserError

StringsOrHashes = Sequence[str] | npt.NDArray[np.uint64]
"""Strings, or their :func:`hash_keys`."""

_MASK = (1 << 64) - 1


def hash_keys(keys: Sequence[str]) -> npt.NDArray[np.uint64]:
    """64-bit BLAKE2b digests of ``keys`` (UTF-8; lone surrogates allowed), shape ``(len(keys),)``."""
    digests = b"".join(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64, copy=False)


def random_uint64(key_hashes: npt.NDArray[np.uint64], *, seed: int, epoch: int, purpose: str) -> npt.NDArray[np.uint64]:
    """Counter-based random bits, one 64-bit word a key.

    The words are the splitmix64 finaliser (Steele, Lea, Flood 2014) applied to the key's hash offset by a digest of
    (seed, epoch, purpose): distinct purposes give independent words for one key.
    """
    stream = int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=16).digest(), "little")
    with np.errstate(over="ignore"):
        z = key_hashes + np.uint64(stream & _MASK)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = (z ^ (z >> np.uint64(31))) + np.uint64(stream >> 64)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def uniform(key_hashes: npt.NDArray[np.uint64], *, seed: int, epoch: int, purpose: str) -> npt.NDArray[np.float64]:
    """Uniform draws in [0, 1) with 53 random bits, one a key; arguments as :func:`random_uint64`."""
    words = random_uint64(key_hashes, seed=seed, epoch=epoch, purpose=purpose)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53


def keep_probability(
    offsets: npt.NDArray[np.integer], ids: npt.NDArray[np.uint32], probs: npt.NDArray[np.float32]
) -> npt.NDArray[np.float64]:
    """Probability that a text is kept if each of its entries passes an independent draw: ``1 - prod(1 - probs[e])``.

    A text without entries has 0. Multiplications only, in the order of the ids: the same bits on every machine.

    Args:
        offsets, ids: entries of each text in CSR form, ``(n + 1,)`` and ``(offsets[-1],)``.
        probs: float32 probability of each entry.

    Returns:
        float64 ``(n,)``

    Raises:
        UserError: an id that ``probs`` does not have.
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
    if len(filled):  # between two filled rows there are only empty ones, so their starts bound the segments
        missed[filled] = np.multiply.reduceat(1.0 - probs[used].astype(np.float64), starts[filled])
    return 1.0 - missed


def choose_texts(keys: StringsOrHashes, texts: StringsOrHashes, *, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """One row of each image, every one of its texts being as likely; rows sharing a key are one image.

    Each row draws random bits from (seed, epoch, key, text) and the lowest of its image wins, so the choice depends
    neither on the order of rows nor on other images. Of identical texts of one image the first row stands for all.

    Args:
        keys, texts: one a row: strings, or their :func:`hash_keys`.

    Returns:
        int64 row numbers, ascending, one a distinct key
    """
    key_hashes, text_hashes = _hashes(keys), _hashes(texts)
    if len(key_hashes) == 0:
        return np.zeros(0, np.int64)
    of_key = random_uint64(key_hashes, seed=seed, epoch=epoch, purpose="text of key")
    draws = random_uint64(text_hashes ^ of_key, seed=seed, epoch=epoch, purpose="text")
    order = np.lexsort((draws, key_hashes))
    ordered = key_hashes[order]
    is_first = np.concatenate(([True], ordered[1:] != ordered[:-1]))
    return np.sort(order[is_first])


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
    """Rows that an epoch trains on: one text of each image, kept or not by balancing.

    Args:
        keys, texts: image key and caption of each row: strings, or their :func:`hash_keys` (which a caller may keep
            over epochs).
        offsets, ids: matched entries of each row in CSR form.
        langs: language code of each row.
        probs: float32 entry probabilities of each language; ``None`` keeps every chosen row.

    Returns:
        int64 row numbers, ascending, at most one a key

    Raises:
        UserError: ``probs`` lacks a language or an entry that the rows have.
    """
    key_hashes = _hashes(keys)
    rows = choose_texts(key_hashes, texts, seed=seed, epoch=epoch)
    if probs is None or len(rows) == 0:
        return rows
    probability = np.zeros(len(rows), np.float64)
    chosen = np.asarray(langs)[rows]
    for lang in np.unique(chosen).tolist():
        if lang not in probs:
            raise UserError(
                f"no balancing probabilities for language {lang!r}; "
                "the shards and the balance folder come from different pools"
            )
        of_lang = np.flatnonzero(chosen == lang)
        probability[of_lang] = keep_probability(*csr.take(offsets, ids, rows[of_lang]), probs[lang])
    return rows[uniform(key_hashes[rows], seed=seed, epoch=epoch, purpose="keep") < probability]


def _hashes(values: StringsOrHashes) -> npt.NDArray[np.uint64]:
    return values if isinstance(values, np.ndarray) else hash_keys(values)
