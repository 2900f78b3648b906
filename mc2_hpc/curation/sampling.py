"""Random draws of the data path as pure functions of (seed, epoch, key, purpose).

No draw depends on a process's random stream, so curation and loading make the same choices on any number of shards,
ranks and workers, and a resumed run repeats none of them differently.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1


def hash_keys(keys: Sequence[str]) -> npt.NDArray[np.uint64]:
    """64-bit BLAKE2b digests of ``keys`` (UTF-8; lone surrogates allowed), shape ``(len(keys),)``."""
    digests = b"".join(hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest() for key in keys)
    return np.frombuffer(digests, dtype="<u8").astype(np.uint64, copy=False)


def random_uint64(
    key_hashes: npt.NDArray[np.uint64], *, seed: int, epoch: int, purpose: str
) -> npt.NDArray[np.uint64]:
    """Counter-based random bits, one 64-bit word a key.

    The words are the splitmix64 finaliser (Steele, Lea, Flood 2014) applied to the key's hash offset by a digest of
    (seed, epoch, purpose): distinct purposes give independent words for one key.
    """
    stream = int.from_bytes(
        hashlib.blake2b(f"{seed}/{epoch}/{purpose}".encode(), digest_size=16).digest(), "little"
    )
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
