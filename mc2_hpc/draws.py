"""Random draws of the data path as pure functions of (seed, epoch, key, purpose).

No draw depends on a process's random state. So curation and loading make the same choices with any number of shards,
ranks and workers, and a resumed run makes the same choices again.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WORD_STEP = 0x9E3779B97F4A7C15
LENGTH_STEP = 0xD6E8FEB86659FD93
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
_MASK = (1 << 64) - 1
_BLOCK = 1 << 15  # words; a block's temporaries fit in a core's cache


def hash_keys(keys: Sequence[str]) -> npt.NDArray[np.uint64]:
    """64-bit hashes of ``keys`` (as UTF-8; lone surrogates allowed), shape ``(len(keys),)``.

    The bytes are cut into little-endian words ``w_j``, at least one, the last padded with zeros, and

        hash = mix(length * LENGTH_STEP + sum_j mix(w_j + (j + 1) * WORD_STEP))    modulo 2**64

    where ``mix`` is the splitmix64 finaliser (Steele, Lea, Flood 2014). Not cryptographic: it is easy to construct keys
    that collide. :func:`mc2_hpc.draw_kernels.hash_column` computes the same for an Arrow column, faster.
    """
    encoded = [key.encode("utf-8", "surrogatepass") for key in keys]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(key) for key in encoded], out=offsets[1:])
    return _hash_bytes(np.frombuffer(b"".join(encoded) + bytes(8), np.uint8), offsets)


def _hash_bytes(data: npt.NDArray[np.uint8], offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Hashes of ``data[offsets[i]:offsets[i + 1]]``; 8 more bytes follow the last."""
    words = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))  # one word starts at every byte
    lengths = np.diff(offsets)
    counts = np.maximum((lengths + 7) // 8, 1)
    ends = np.cumsum(counts)
    hashes = lengths.astype(np.uint64) * np.uint64(LENGTH_STEP)
    begin = 0
    while begin < len(lengths):
        before = ends[begin] - counts[begin]
        end = max(begin + 1, int(np.searchsorted(ends, before + _BLOCK)))
        num = counts[begin:end]
        firsts = ends[begin:end] - num - before
        at = np.arange(ends[end - 1] - before) - np.repeat(firsts, num)
        block = words[np.repeat(offsets[begin:end], num) + 8 * at].astype(np.uint64)
        padding = (8 * num - lengths[begin:end]).astype(np.uint64)
        half = np.uint64(4) * padding  # an empty string's word is all padding, and a shift by 64 bits is undefined
        block[firsts + num - 1] &= (np.uint64(_MASK) >> half) >> half
        block += (at + 1).astype(np.uint64) * np.uint64(WORD_STEP)
        hashes[begin:end] += np.add.reduceat(_mix(block), firsts)
        begin = end
    return _mix(hashes)


def _mix(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The splitmix64 finaliser, in place."""
    for shift, factor in ((30, MIX_1), (27, MIX_2)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return z


def random_uint64(key_hashes: npt.NDArray[np.uint64], *, seed: int, epoch: int, purpose: str) -> npt.NDArray[np.uint64]:
    """Counter-based random bits, one 64-bit word per key.

    The splitmix64 finaliser is applied twice to the key's hash, each time offset by half of a digest of (seed, epoch,
    purpose): different purposes give independent words for the same key.
    """
    stream = int.from_bytes(hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=16).digest(), "little")
    z = _mix(key_hashes + np.uint64(stream & _MASK))
    z += np.uint64(stream >> 64)
    return _mix(z)


def uniform(key_hashes: npt.NDArray[np.uint64], *, seed: int, epoch: int, purpose: str) -> npt.NDArray[np.float64]:
    """Uniform draws in [0, 1) with 53 random bits, one per key; arguments as in :func:`random_uint64`."""
    words = random_uint64(key_hashes, seed=seed, epoch=epoch, purpose=purpose)
    return (words >> np.uint64(11)).astype(np.float64) * 2.0**-53
