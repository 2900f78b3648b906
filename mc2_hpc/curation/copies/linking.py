"""The search for images with similar codes, and their groups; compiled.

A **code** is 256 bits: a 64-bit hash, and 192 bits that confirm it. An image has one or more codes (*entries*), some of
which may be of its mirror image. Two images are linked if a code of one and a code of the other differ in at most
``max_distance`` bits of the hash and at most ``max_check`` of the rest. Links are transitive: groups are the connected
components, kept as a forest in which every root is the first image of its group.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import types
from numba.core.extending import intrinsic

from mc2_hpc.compiling import compiled

WORDS = 4
CHECK_BITS = 64 * (WORDS - 1)
ENTRY = np.dtype([("words", "<u8", (WORDS,)), ("image", "<u4"), ("mirrored", "<u4")])
"""A code, the number of its image, and whether it is of the mirror image."""

Entries = npt.NDArray[np.void]
"""Elements of type :data:`ENTRY`."""
Forest = npt.NDArray[np.int64]
"""The parent of each image; a root is its own."""

_MOST_BUCKET_BITS = 24
_CROWDED, _CROWDED_BY = 64, 8
"""A bucket is crowded if it has more codes than the first, and than the second times the mean."""
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
_ALL = np.uint64(0xFFFFFFFFFFFFFFFF)


def new_forest(num_images: int) -> Forest:
    """Every image in a group of its own."""
    return np.arange(num_images, dtype=np.int64)


def bucket_hashes(words: npt.NDArray[np.uint64], mask: np.uint64) -> npt.NDArray[np.uint64]:
    """A well-mixed value per hash that depends only on the bits in ``mask``, shape ``(n,)``."""
    masked = words & mask
    masked ^= masked >> np.uint64(32)
    masked *= _MULTIPLIER
    return masked ^ (masked >> np.uint64(29))


def collapse(entries: Entries, forest: Forest) -> Entries:
    """Join the groups of images that have the same code, and return the distinct codes.

    Without this, a placeholder that occurs a million times would be compared with itself 10**12 times.
    """
    words = np.ascontiguousarray(entries["words"])
    digests = bucket_hashes(words[:, 0] ^ entries["mirrored"], _ALL)
    for word in range(1, WORDS):
        digests = bucket_hashes(digests ^ words[:, word], _ALL)
    order = np.argsort(digests, kind="stable")
    entries, digests = entries[order], digests[order]
    is_same = digests[1:] == digests[:-1]
    at = np.flatnonzero(is_same)
    one, other = entries[at], entries[at + 1]  # equal digests of different codes are possible
    is_same[at] = (one["words"] == other["words"]).all(axis=1) & (one["mirrored"] == other["mirrored"])
    at = np.flatnonzero(is_same)
    join(forest, np.stack([entries["image"][at], entries["image"][at + 1]], axis=1).astype(np.int64))
    return entries[np.concatenate([[True], ~is_same])[: len(entries)]]


def collapse_crowded(entries: Entries, mask: np.uint64, forest: Forest) -> Entries:
    """:func:`collapse` for those of the mask's buckets alone that hold many more codes than the others.

    Equal codes share a bucket, so in the other buckets there are few, and :func:`link` compares them for less than
    sorting all codes by their 256 bits costs.
    """
    if not len(entries):
        return entries
    buckets, num_buckets = _buckets(np.ascontiguousarray(entries["words"][:, 0]), mask)
    sizes = np.bincount(buckets, minlength=num_buckets)
    most = max(_CROWDED, _CROWDED_BY * len(entries) / np.count_nonzero(sizes))
    inside = (sizes > most)[buckets]
    if not inside.any():
        return entries
    return np.concatenate([entries[~inside], collapse(entries[inside], forest)])


def _buckets(words: npt.NDArray[np.uint64], mask: np.uint64) -> tuple[npt.NDArray[np.uint32], int]:
    """The bucket of each hash, and the number of buckets: about one per hash."""
    bits = min(_MOST_BUCKET_BITS, max(1, int(np.log2(len(words)))))
    return (bucket_hashes(words, mask) >> np.uint64(64 - bits)).astype(np.uint32), 1 << bits


def link(entries: Entries, mask: np.uint64, forest: Forest, *, max_distance: int, max_check: int) -> None:
    """Join the groups of images in ``forest`` that have similar codes whose hashes agree in the bits of ``mask``.

    Over all masks of :func:`~mc2_hpc.curation.copies.tables.table_masks`, this finds every link exactly.

    Args:
        entries: any number; memory is about 30 bytes for each, beside them.
    """
    if not len(entries):
        return
    words = np.ascontiguousarray(entries["words"][:, 0])
    buckets, num_buckets = _buckets(words, mask)
    order, starts = _sorted_by(buckets, num_buckets)
    _link_buckets(words[order], order, starts, entries, forest, max_distance, max_check)


def join(forest: Forest, links: npt.NDArray[np.int64]) -> None:
    """Join the groups of linked images, ``(n, 2)``."""
    _join(forest, links)


def links_of(forest: Forest) -> npt.NDArray[np.int64]:
    """The fewest links that give the same groups: each image with the root of its group, ``(n, 2)``."""
    roots = roots_of(forest)
    others = np.flatnonzero(roots != np.arange(len(roots)))
    return np.stack([others, roots[others]], axis=1)


def roots_of(forest: Forest) -> npt.NDArray[np.int64]:
    """The first image of each image's group, ``(num_images,)``."""
    return _roots(forest)


def _generate_bit_count(typing: Any, word: Any) -> Any:

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return context.cast(builder, builder.ctpop(arguments[0]), types.uint64, types.int64)

    return types.int64(types.uint64), generate


bit_count: Any = intrinsic(_generate_bit_count)
"""The number of bits set in an integer: one instruction."""


@compiled
def _sorted_by(buckets, num_buckets):
    """A counting sort: the order, and where each bucket starts in it."""
    starts = np.zeros(num_buckets + 1, np.int64)
    for bucket in buckets:
        starts[bucket + 1] += 1
    for bucket in range(num_buckets):
        starts[bucket + 1] += starts[bucket]
    at = starts[:-1].copy()
    order = np.empty(len(buckets), np.int64)
    for index in range(len(buckets)):
        order[at[buckets[index]]] = index
        at[buckets[index]] += 1
    return order, starts


@compiled
def _link_buckets(words, order, starts, entries, forest, max_distance, max_check):
    for bucket in range(len(starts) - 1):
        end = starts[bucket + 1]
        for first in range(starts[bucket], end - 1):
            word, others = words[first], words[first + 1 : end]
            nearest = np.int64(64)  # found before anything else, in a loop that the compiler vectorises
            for index in range(len(others)):
                nearest = min(nearest, bit_count(word ^ others[index]))
            if nearest <= max_distance:
                for index in range(len(others)):
                    if bit_count(word ^ others[index]) <= max_distance:
                        _link_pair(entries[order[first]], entries[order[first + 1 + index]], forest, max_check)


@compiled
def _link_pair(one, other, forest, max_check):
    if one.image == other.image or (one.mirrored and other.mirrored):
        return
    check = 0
    for word in range(1, WORDS):
        check += bit_count(one.words[word] ^ other.words[word])
    if check <= max_check:
        _unite(forest, np.int64(one.image), np.int64(other.image))


@compiled
def _root(forest, image):
    while forest[image] != image:
        forest[image] = forest[forest[image]]
        image = forest[image]
    return image


@compiled
def _unite(forest, one, other):
    one, other = _root(forest, one), _root(forest, other)
    if one != other:
        forest[max(one, other)] = min(one, other)


@compiled
def _join(forest, links):
    for index in range(len(links)):
        _unite(forest, links[index, 0], links[index, 1])


@compiled
def _roots(forest):
    roots = np.empty(len(forest), np.int64)
    for image in range(len(forest)):
        roots[image] = _root(forest, image)
    return roots
