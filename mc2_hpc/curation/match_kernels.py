"""Compiled loops of the matcher: building its tables, and matching texts. Imported only when needed, as numba is slow.

All in one file: the cache of compiled code sees changes of the file that holds a function, not of what it calls.

Tables
    Two hash-edge tries share one layout. The *token* trie holds patterns with a space at both ends, over tokens (the
    pieces between spaces); the *character* trie holds all others, over code points.

    slots: uint64 (2 * capacity,), open addressing with linear probing, capacity a power of two, key at even positions,
        0 = empty, its value at the odd position after it.
    value: (entry id + 1) << 32, 0 if no pattern ends here; ``_BRANCH`` if longer patterns go on; node number + 1 below.
    vocabulary: token -> value. A token of at most 7 bytes is its own key (bytes, then length + 1 in the top byte), a
        longer one has a hash with the top bit set and is compared with the stored bytes, so no match rests on a hash
        alone.
    edges: (parent number + 1) << 32 | (symbol + 1) -> value.
"""

import numpy as np
from numba import njit

from mc2_hpc.curation.text import ACTION_BITS, KEEP, NORMALISE, SPACE, WRAP

_U = np.uint64
_BRANCH = _U(1 << 31)
_NUMBER = _U((1 << 31) - 1)
_S8, _S29, _S32, _S56 = _U(8), _U(29), _U(32), _U(56)
_ONE, _ZERO = _U(1), _U(0)
_LONG = _U(1 << 63)
_K1 = _U(0x9E3779B97F4A7C15)
_K2 = _U(0xBF58476D1CE4E5B9)
_BLANK = 32
_SHORT = 7
"""Bytes of a token that is its own key."""
_SMALL_SORT = 24
"""Most matches that insertion sort is used for."""

_jit = njit(cache=True, nogil=True)


@_jit
def _slot_of(key, mask):
    mixed = key * _K1
    return np.int64((mixed ^ (mixed >> _S29)) & mask)


@_jit
def _find_edge(slots, parent, symbol):
    """Position of the slot that holds the edge, or of the empty one where it belongs."""
    key = ((parent + _ONE) << _S32) | (symbol + _ONE)
    mask = _U(len(slots) // 2 - 1)
    slot = _slot_of(key, mask)
    while slots[2 * slot] != key and slots[2 * slot] != _ZERO:
        slot = np.int64(_U(slot + 1) & mask)
    return slot, key


@_jit
def _token_key(data, start, end):
    length = end - start
    key = _ZERO
    if length <= _SHORT:
        for at in range(start, end):
            key = (key << _S8) | _U(data[at])
        return key | (_U(length + 1) << _S56)
    digest = _U(length)
    filled = 0
    for at in range(start, end):
        key = (key << _S8) | _U(data[at])
        filled += 1
        if filled == 8:
            digest = (digest ^ key) * _K2
            digest ^= digest >> _S29
            key = _ZERO
            filled = 0
    digest = (digest ^ key) * _K2
    digest ^= digest >> _S32
    return digest | _LONG


@_jit
def _same_bytes(data, start, end, token, token_starts, token_bytes):
    first = token_starts[token]
    if token_starts[token + 1] - first != end - start:
        return False
    for at in range(end - start):
        if data[start + at] != token_bytes[first + at]:
            return False
    return True


@_jit
def _find_token(slots, data, start, end, token_starts, token_bytes):
    """Position of the token's slot, or of the empty one where it belongs."""
    key = _token_key(data, start, end)
    mask = _U(len(slots) // 2 - 1)
    slot = _slot_of(key, mask)
    while slots[2 * slot] != _ZERO:
        if slots[2 * slot] == key:
            if key < _LONG:
                break
            token = np.int64((slots[2 * slot + 1] & _NUMBER) - _ONE)
            if _same_bytes(data, start, end, token, token_starts, token_bytes):
                break
        slot = np.int64(_U(slot + 1) & mask)
    return slot, key


@_jit
def _capacity(items):
    """Smallest power of two that ``items`` fill to at most 60 %."""
    capacity = 4
    while capacity * 6 < items * 10:
        capacity *= 2
    return capacity


@_jit
def _shrink(slots, items):
    """The same table at the smallest capacity for ``items``; equal keys keep their order of probing."""
    small = np.zeros(2 * _capacity(items), np.uint64)
    mask = _U(len(small) // 2 - 1)
    for old in range(len(slots) // 2):
        key = slots[2 * old]
        if key != _ZERO:
            slot = _slot_of(key, mask)
            while small[2 * slot] != _ZERO:
                slot = np.int64(_U(slot + 1) & mask)
            small[2 * slot] = key
            small[2 * slot + 1] = slots[2 * old + 1]
    return small


@_jit
def build_token_trie(data, offsets, entry_ids):
    """Token trie of patterns given without their outer spaces.

    Args:
        data, offsets: UTF-8 bytes of the patterns (uint8) and where each starts (int64, one more than patterns).
        entry_ids: int64, ascending; of equal patterns the first keeps its id.

    Returns:
        vocabulary slots, token_starts, token_bytes, edge slots
    """
    num_tokens, num_inner = 0, 0
    for pattern in range(len(entry_ids)):
        num_tokens += 1
        for at in range(offsets[pattern], offsets[pattern + 1]):
            if data[at] == _BLANK:
                num_tokens += 1
                num_inner += 1
    vocabulary = np.zeros(2 * _capacity(num_tokens), np.uint64)
    token_starts = np.zeros(num_tokens + 1, np.int64)
    token_bytes = np.empty(len(data), np.uint8)
    tokens, used = 0, 0
    for pattern in range(len(entry_ids)):
        start, stop = offsets[pattern], offsets[pattern + 1]
        for end in range(start, stop + 1):
            if end < stop and data[end] != _BLANK:
                continue
            slot, key = _find_token(vocabulary, data, start, end, token_starts, token_bytes)
            if vocabulary[2 * slot] == _ZERO:
                if key >= _LONG:
                    token_bytes[used : used + end - start] = data[start:end]
                    used += end - start
                tokens += 1
                token_starts[tokens] = used
                vocabulary[2 * slot] = key
                vocabulary[2 * slot + 1] = _U(tokens)
            start = end + 1
    vocabulary = _shrink(vocabulary, tokens)
    edges = np.zeros(2 * _capacity(num_inner), np.uint64)
    number, num_edges = tokens, 0
    for pattern in range(len(entry_ids)):
        start, stop = offsets[pattern], offsets[pattern + 1]
        table = vocabulary
        slot = -1
        for end in range(start, stop + 1):
            if end < stop and data[end] != _BLANK:
                continue
            found, _ = _find_token(vocabulary, data, start, end, token_starts, token_bytes)
            if slot < 0:
                slot = found
            else:
                table[2 * slot + 1] |= _BRANCH
                parent = (table[2 * slot + 1] & _NUMBER) - _ONE
                symbol = (vocabulary[2 * found + 1] & _NUMBER) - _ONE
                slot, key = _find_edge(edges, parent, symbol)
                table = edges
                if edges[2 * slot] == _ZERO:
                    number += 1
                    num_edges += 1
                    edges[2 * slot] = key
                    edges[2 * slot + 1] = _U(number)
            start = end + 1
        if table[2 * slot + 1] >> _S32 == _ZERO:
            table[2 * slot + 1] |= _U(entry_ids[pattern] + 1) << _S32
    return vocabulary, token_starts[: tokens + 1].copy(), token_bytes[:used].copy(), _shrink(edges, num_edges)


@_jit
def build_character_trie(points, offsets, entry_ids):
    """Character trie of whole patterns, spaces at their ends included.

    Args:
        points, offsets: code points of the patterns (uint32) and where each starts (int64, one more than patterns).
        entry_ids: int64, ascending; of equal patterns the first keeps its id.

    Returns:
        edge slots; first_bits: uint8, one bit a code point, set where a pattern starts with it
    """
    edges = np.zeros(2 * _capacity(len(points)), np.uint64)
    first_bits = np.zeros(0x110000 // 8 if len(entry_ids) else 0, np.uint8)
    number, num_edges = 0, 0
    for pattern in range(len(entry_ids)):
        first = points[offsets[pattern]]
        first_bits[first >> 3] |= np.uint8(1 << (first & 7))
        parent = _ZERO
        slot = -1
        for at in range(offsets[pattern], offsets[pattern + 1]):
            if slot >= 0:
                edges[2 * slot + 1] |= _BRANCH
            slot, key = _find_edge(edges, parent, _U(points[at]))
            if edges[2 * slot] == _ZERO:
                number += 1
                num_edges += 1
                edges[2 * slot] = key
                edges[2 * slot + 1] = _U(number + 1)
            parent = (edges[2 * slot + 1] & _NUMBER) - _ONE
        if edges[2 * slot + 1] >> _S32 == _ZERO:
            edges[2 * slot + 1] |= _U(entry_ids[pattern] + 1) << _S32
    return _shrink(edges, num_edges), first_bits


@_jit
def _decode(data, at):
    """Code point at byte ``at`` of valid UTF-8, and its number of bytes."""
    b = np.int64(data[at])
    if b < 0x80:
        return b, 1
    if b < 0xE0:
        return ((b & 0x1F) << 6) | (data[at + 1] & 0x3F), 2
    if b < 0xF0:
        return ((b & 0x0F) << 12) | ((data[at + 1] & 0x3F) << 6) | (data[at + 2] & 0x3F), 3
    high = ((b & 0x07) << 18) | ((np.int64(data[at + 1]) & 0x3F) << 12)
    return high | ((data[at + 2] & 0x3F) << 6) | (data[at + 3] & 0x3F), 4


@_jit
def normalisation_doubts(data, offsets, actions):
    """Rows (bool) with a character that NFC might change, by ``actions`` of :func:`text.character_table`."""
    doubts = np.zeros(len(offsets) - 1, np.bool_)
    for row in range(len(doubts)):
        at = offsets[row]
        while at < offsets[row + 1]:
            if data[at] < 0x80:
                at += 1
                continue
            point, size = _decode(data, at)
            if point >= len(actions) or actions[point] & NORMALISE:
                doubts[row] = True
                break
            at += size
    return doubts


@_jit
def _space_out(data, start, stop, actions, collapse, spaced):
    """Write the spaced text of ``data[start:stop]`` into ``spaced``; returns its length."""
    spaced[0] = _BLANK
    length = 1
    at = start
    while at < stop:
        point, size = _decode(data, at)
        what = actions[point] & ACTION_BITS if point < len(actions) else KEEP
        if what == SPACE or what == WRAP:
            if not (collapse and spaced[length - 1] == _BLANK):
                spaced[length] = _BLANK
                length += 1
        if what == KEEP or what == WRAP:
            for offset in range(size):
                spaced[length + offset] = data[at + offset]
            length += size
        if what == WRAP:
            spaced[length] = _BLANK
            length += 1
        at += size
    if not (collapse and spaced[length - 1] == _BLANK):
        spaced[length] = _BLANK
        length += 1
    return length


@_jit
def _append(ids, count, value):
    if count == len(ids):
        grown = np.empty(2 * len(ids), np.uint32)
        grown[:count] = ids
        ids = grown
    ids[count] = np.uint32((value >> _S32) - _ONE)
    return ids, count + 1


@_jit
def _match_tokens(spaced, length, vocabulary, token_starts, token_bytes, edges, values, ids, count):
    """Append the ids of token patterns in ``spaced[:length]``, in order of their start; ``values`` is scratch."""
    num_tokens = 0
    start = 1
    for end in range(1, length):
        if spaced[end] == _BLANK:
            slot, _ = _find_token(vocabulary, spaced, start, end, token_starts, token_bytes)
            values[num_tokens] = vocabulary[2 * slot + 1]
            num_tokens += 1
            start = end + 1
    for first in range(num_tokens):
        value = values[first]
        if value >> _S32 != _ZERO:
            ids, count = _append(ids, count, value)
        after = first + 1
        while value & _BRANCH != _ZERO and after < num_tokens and values[after] != _ZERO:
            symbol = (values[after] & _NUMBER) - _ONE
            slot, _ = _find_edge(edges, (value & _NUMBER) - _ONE, symbol)
            value = edges[2 * slot + 1]
            if value >> _S32 != _ZERO:
                ids, count = _append(ids, count, value)
            after += 1
    return ids, count


@_jit
def _match_characters(spaced, length, edges, first_bits, points, ids, count):
    """Append the ids of character patterns in ``spaced[:length]``; ``points`` is scratch."""
    num_points = 0
    at = 0
    while at < length:
        point, size = _decode(spaced, at)
        points[num_points] = point
        num_points += 1
        at += size
    for first in range(num_points):
        point = points[first]
        if not first_bits[point >> 3] >> (point & 7) & 1:
            continue
        value = _BRANCH | _ONE
        after = first
        while value & _BRANCH != _ZERO and after < num_points:
            slot, _ = _find_edge(edges, (value & _NUMBER) - _ONE, _U(points[after]))
            value = edges[2 * slot + 1]
            if value >> _S32 != _ZERO:
                ids, count = _append(ids, count, value)
            after += 1
    return ids, count


@_jit
def _sort_unique(ids, first, count):
    """Sort ``ids[first:count]`` and drop repeats; returns the new count."""
    if count - first > _SMALL_SORT:
        ids[first:count] = np.sort(ids[first:count])
    else:
        for at in range(first + 1, count):
            value = ids[at]
            before = at
            while before > first and ids[before - 1] > value:
                ids[before] = ids[before - 1]
                before -= 1
            ids[before] = value
    kept = first
    for at in range(first, count):
        if at == first or ids[at] != ids[kept - 1]:
            ids[kept] = ids[at]
            kept += 1
    return kept


@_jit
def match_texts(
    data, offsets, actions, collapse, vocabulary, token_starts, token_bytes, token_edges, character_edges, first_bits
):
    """All entries of each text.

    Args:
        data, offsets: valid UTF-8 bytes of the texts (uint8) and where each starts (int64, one more than texts).
        actions, collapse: what becomes of each character (:func:`text.character_table`), and of runs of spaces.

    Returns:
        offsets int64 (texts + 1,); ids uint32, sorted and unique within a text
    """
    num_texts = len(offsets) - 1
    longest = 0
    for text in range(num_texts):
        longest = max(longest, offsets[text + 1] - offsets[text])
    spaced = np.empty(3 * longest + 2, np.uint8)
    values = np.empty(2 * longest + 2, np.uint64)
    points = np.empty(3 * longest + 2 if len(first_bits) else 0, np.uint32)
    starts = np.zeros(num_texts + 1, np.int64)
    ids = np.empty(8 * num_texts + 16, np.uint32)
    count = 0
    for text in range(num_texts):
        first = count
        length = _space_out(data, offsets[text], offsets[text + 1], actions, collapse, spaced)
        ids, count = _match_tokens(
            spaced, length, vocabulary, token_starts, token_bytes, token_edges, values, ids, count
        )
        if len(first_bits):
            ids, count = _match_characters(spaced, length, character_edges, first_bits, points, ids, count)
        count = _sort_unique(ids, first, count)
        starts[text + 1] = count
    return starts, ids[:count].copy()
