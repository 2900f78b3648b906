"""The matcher's tables: two tries in hash tables, and the compiled loops that build and search them.

Imported only when needed, because importing numba is slow.

Layout
    Both tries share it. The *token* trie holds patterns with a space at both ends, over tokens (the
    pieces between spaces); the *character* trie holds all others, over code points.

    slots: uint64 (2 * capacity,), open addressing with linear probing, capacity a power of two, key at even positions,
        0 = empty, its value at the odd position after it.
    value: (entry id + 1) << 32, 0 if no pattern ends here; ``BRANCH`` if longer patterns continue; node number + 1
        below.
    vocabulary: token -> value. A token of at most 7 bytes is its own key (bytes, then length + 1 in the top byte). A
        longer token's key is a hash with the top bit set; the token is also compared with the stored bytes, so no match
        relies on a hash alone.
    token_words: uint64, length and bytes of every longer token; the token's node number is the offset of its start.
    edges: (parent number + 1) << 32 | (symbol + 1) -> value.

Bytes are read eight at a time, as little-endian words.
"""

import zlib
from pathlib import Path

import numpy as np
from numba import njit

from mc2_hpc.compiling import compiled

_U = np.uint64
BRANCH = _U(1 << 31)
NUMBER = _U((1 << 31) - 1)
"""Bits of a value: whether longer patterns continue here; node number + 1."""
S32 = _U(32)
ONE, ZERO = _U(1), _U(0)
LONG = _U(1 << 63)
"""The bit that marks a key as a hash."""
BLANK = 32
SOURCE = zlib.crc32(Path(__file__).read_bytes())
"""Checksum of this file. numba's cache notices changes to the file of a compiled function, but not to the functions it
calls. So only functions called from Python are cached, and those in other files take this number as an argument, which
makes it part of the cache key."""
_S16, _S29, _S56, _S63 = _U(16), _U(29), _U(56), _U(63)
_K1 = _U(0x9E3779B97F4A7C15)
_K2 = _U(0xBF58476D1CE4E5B9)
_SHORT = 7
"""Most bytes of a token that is its own key."""
_CODE_POINTS = 0x110000
_OPENING_BITS = 18
"""Logarithm of the bits for hashed openings of character patterns: 32 KB."""
_S_OPENING = _U(64 - _OPENING_BITS)

inner = njit(nogil=True)
entry = compiled


@inner
def slot_of(key, mask):
    mixed = key * _K1
    return np.int64((mixed ^ (mixed >> _S29)) & mask)


@inner
def find_edge(slots, parent, symbol):
    """The slot that holds the edge, or the empty slot where it belongs."""
    key = ((parent + ONE) << S32) | (symbol + ONE)
    mask = _U(len(slots) // 2 - 1)
    slot = slot_of(key, mask)
    while slots[2 * slot] != key and slots[2 * slot] != ZERO:
        slot = np.int64(_U(slot + 1) & mask)
    return slot, key


@inner
def _padded(data):
    """The bytes as words, plus one spare word."""
    words = np.zeros(len(data) // 8 + 2, np.uint64)
    words.view(np.uint8)[: len(data)] = data
    return words


@inner
def _word(text, at):
    """The 8 bytes starting at byte ``at``."""
    shift = _U((at & 7) * 8)
    return (text[at >> 3] >> shift) | ((text[(at >> 3) + 1] << ONE) << (_S63 - shift))


@inner
def token_key(text, start, end):
    length = end - start
    rest = _word(text, end - (length & 7)) & ((ONE << _U(8 * (length & 7))) - ONE)
    if length <= _SHORT:
        return rest | (_U(length + 1) << _S56)
    digest = _U(length)
    for at in range(start, end - 7, 8):
        digest = (digest ^ _word(text, at)) * _K2
        digest ^= digest >> _S29
    digest = (digest ^ rest) * _K2
    digest ^= digest >> S32
    return digest | LONG


@inner
def is_stored(text, start, end, words, at):
    """Whether the token equals the one that :func:`_store_token` put at ``at``."""
    length = end - start
    if words[at] != _U(length):
        return False
    for offset in range(0, length - 7, 8):
        at += 1
        if words[at] != _word(text, start + offset):
            return False
    # Comparing some of the last 8 bytes twice is faster than masking them.
    return words[at + 1] == _word(text, end - 8)


@inner
def _store_token(text, start, end, words, at):
    """Put the length and bytes of a long token at ``at``; returns where the next token goes."""
    words[at] = _U(end - start)
    for first in range(start, end - 7, 8):
        at += 1
        words[at] = _word(text, first)
    words[at + 1] = _word(text, end - 8)
    return at + 2


@inner
def _num_words(length):
    """The number of words that :func:`_store_token` needs for a token of ``length`` bytes."""
    return 2 + length // 8 if length > _SHORT else 0


@inner
def find_token(slots, key, text, start, end, words):
    """The slot of the token at bytes ``start`` to ``end - 1``, or the empty slot where it belongs."""
    mask = _U(len(slots) // 2 - 1)
    slot = slot_of(key, mask)
    while slots[2 * slot] != ZERO:
        if slots[2 * slot] == key:
            number = np.int64(slots[2 * slot + 1] & NUMBER) - 1
            if key < LONG or is_stored(text, start, end, words, number):
                break
        slot = np.int64(_U(slot + 1) & mask)
    return slot


@inner
def _capacity(items):
    """The smallest power of two that ``items`` fill to at most 60 %."""
    capacity = 4
    while capacity * 6 < items * 10:
        capacity *= 2
    return capacity


@inner
def _shrink(slots, items):
    """The same table at the smallest capacity for ``items``; equal keys keep their order of probing."""
    small = np.zeros(2 * _capacity(items), np.uint64)
    mask = _U(len(small) // 2 - 1)
    for old in range(len(slots) // 2):
        key = slots[2 * old]
        if key != ZERO:
            slot = slot_of(key, mask)
            while small[2 * slot] != ZERO:
                slot = np.int64(_U(slot + 1) & mask)
            small[2 * slot] = key
            small[2 * slot + 1] = slots[2 * old + 1]
    return small


@entry
def build_token_trie(data, offsets, entry_ids):
    """Token trie of patterns given without their outer spaces.

    Args:
        data, offsets: UTF-8 bytes of the patterns (uint8) and the start of each pattern (int64, patterns + 1).
        entry_ids: int64, ascending; of equal patterns the first keeps its id.

    Returns:
        vocabulary slots, token_words, edge slots
    """
    text = _padded(data)
    num_tokens, num_inner, most_words = 0, 0, 0
    for pattern in range(len(entry_ids)):
        start, stop = offsets[pattern], offsets[pattern + 1]
        for end in range(start, stop + 1):
            if end < stop and data[end] != BLANK:
                continue
            num_tokens += 1
            num_inner += end < stop
            most_words += _num_words(end - start)
            start = end + 1
    vocabulary = np.zeros(2 * _capacity(num_tokens), np.uint64)
    words = np.empty(most_words, np.uint64)
    tokens, used, number = 0, 0, most_words  # numbers below are places in `words`
    for pattern in range(len(entry_ids)):
        start, stop = offsets[pattern], offsets[pattern + 1]
        for end in range(start, stop + 1):
            if end < stop and data[end] != BLANK:
                continue
            key = token_key(text, start, end)
            slot = find_token(vocabulary, key, text, start, end, words)
            if vocabulary[2 * slot] == ZERO:
                tokens += 1
                vocabulary[2 * slot] = key
                if key >= LONG:
                    vocabulary[2 * slot + 1] = _U(used + 1)
                    used = _store_token(text, start, end, words, used)
                else:
                    number += 1
                    vocabulary[2 * slot + 1] = _U(number)
            start = end + 1
    vocabulary = _shrink(vocabulary, tokens)
    edges = np.zeros(2 * _capacity(num_inner), np.uint64)
    num_edges = 0
    for pattern in range(len(entry_ids)):
        start, stop = offsets[pattern], offsets[pattern + 1]
        table = vocabulary
        slot = -1
        for end in range(start, stop + 1):
            if end < stop and data[end] != BLANK:
                continue
            found = find_token(vocabulary, token_key(text, start, end), text, start, end, words)
            if slot < 0:
                slot = found
            else:
                table[2 * slot + 1] |= BRANCH
                parent = (table[2 * slot + 1] & NUMBER) - ONE
                symbol = (vocabulary[2 * found + 1] & NUMBER) - ONE
                slot, key = find_edge(edges, parent, symbol)
                table = edges
                if edges[2 * slot] == ZERO:
                    number += 1
                    num_edges += 1
                    edges[2 * slot] = key
                    edges[2 * slot + 1] = _U(number)
            start = end + 1
        if table[2 * slot + 1] >> S32 == ZERO:
            table[2 * slot + 1] |= _U(entry_ids[pattern] + 1) << S32
    return vocabulary, words[:used].copy(), _shrink(edges, num_edges)


@inner
def slide(window, point):
    """The lower 16 bits of each of the last four code points."""
    return (window << _S16) | (_U(point) & _U(0xFFFF))


@inner
def opening_bit(window):
    return _CODE_POINTS + np.int64((window * _K1) >> _S_OPENING)


@entry
def build_character_trie(points, offsets, entry_ids):
    """Character trie of whole patterns, spaces at their ends included.

    Args:
        points, offsets: code points of the patterns (uint32) and the start of each pattern (int64, patterns + 1).
        entry_ids: int64, ascending; of equal patterns the first keeps its id.

    Returns:
        edge slots; openings: bits (uint8) that rule out most positions as the start of a pattern, empty without
        patterns. One bit per code point that is a pattern by itself, then ``1 << _OPENING_BITS`` for the hashed first
        4 code points of a pattern (the first 2 of a shorter pattern)
    """
    edges = np.zeros(2 * _capacity(len(points)), np.uint64)
    openings = np.zeros((_CODE_POINTS + (1 << _OPENING_BITS)) // 8 if len(entry_ids) else 0, np.uint8)
    number, num_edges = 0, 0
    for pattern in range(len(entry_ids)):
        start = offsets[pattern]
        length = offsets[pattern + 1] - start
        bit = np.int64(points[start])
        if length > 1:
            window = ZERO
            for at in range(start, start + (2 if length < 4 else 4)):
                window = slide(window, points[at])
            bit = opening_bit(window)
        openings[bit >> 3] |= np.uint8(1 << (bit & 7))
        parent = ZERO
        slot = -1
        for at in range(offsets[pattern], offsets[pattern + 1]):
            if slot >= 0:
                edges[2 * slot + 1] |= BRANCH
            slot, key = find_edge(edges, parent, _U(points[at]))
            if edges[2 * slot] == ZERO:
                number += 1
                num_edges += 1
                edges[2 * slot] = key
                edges[2 * slot + 1] = _U(number + 1)
            parent = (edges[2 * slot + 1] & NUMBER) - ONE
        if edges[2 * slot + 1] >> S32 == ZERO:
            edges[2 * slot + 1] |= _U(entry_ids[pattern] + 1) << S32
    return _shrink(edges, num_edges), openings
