"""Matching texts against the tables of :mod:`mc2_hpc.curation.matching.trie_kernels`, in compiled loops.

Imported only when needed, because importing numba is slow.
"""

import numpy as np

from mc2_hpc.curation.matching.rules import (
    ACTION_BITS,
    CONTEXT,
    DROP,
    KEEP,
    NON_JOINER,
    NORMALISE,
    WRAP,
)
from mc2_hpc.curation.matching.trie_kernels import (
    BLANK,
    BRANCH,
    LONG,
    NUMBER,
    ONE,
    S32,
    SOURCE,
    ZERO,
    entry,
    find_edge,
    find_token,
    inner,
    is_stored,
    opening_bit,
    slide,
    slot_of,
    token_key,
)

_U = np.uint64
_FLAGS = NORMALISE | CONTEXT
_NONE = np.uint32(0xFFFFFFFF)
"""Not the id of any entry."""
_SMALL_SORT = 32
"""Up to this many matches are sorted by counting: a multiple of what the processor compares at once."""
_BLOCK_TEXTS = 256
_BLOCK_BYTES = 1 << 14
"""Size of a block of texts, unless a single text is longer: a block's working set stays in the core's own cache."""


@inner
def _decode(data, at):
    """The code point at byte ``at`` of valid UTF-8, and its length in bytes."""
    b = np.int64(data[at])
    if b < 0x80:
        return b, 1
    if b < 0xE0:
        return ((b & 0x1F) << 6) | (data[at + 1] & 0x3F), 2
    if b < 0xF0:
        return ((b & 0x0F) << 12) | ((data[at + 1] & 0x3F) << 6) | (data[at + 2] & 0x3F), 3
    high = ((b & 0x07) << 18) | ((np.int64(data[at + 1]) & 0x3F) << 12)
    return high | ((data[at + 2] & 0x3F) << 6) | (data[at + 3] & 0x3F), 4


@entry
def text_flags(data, offsets, actions):
    """Each row's character flags, combined (uint8): ``NORMALISE | CONTEXT`` of :func:`rules.character_table`."""
    flags = np.zeros(len(offsets) - 1, np.uint8)
    for row in range(len(flags)):
        at = offsets[row]
        seen = 0
        while at < offsets[row + 1]:
            if data[at] < 0x80:
                at += 1
                continue
            point, size = _decode(data, at)
            seen |= actions[point] if point < len(actions) else _FLAGS
            at += size
        flags[row] = seen & _FLAGS
    return flags


@inner
def _after_arabic(spaced, length):
    """Whether the last character of ``spaced[:length]`` is in the Arabic (D8 to DB) or Arabic Supplement block."""
    last, before = spaced[length - 1], spaced[length - 2]
    return last >= 0x80 and (0xD8 <= before <= 0xDB or (before == 0xDD and last >= 0x90))


@inner
def _space_out(data, start, stop, actions, collapse, spaced):
    """Write the spaced text of ``data[start:stop]`` into ``spaced``; returns its length."""
    spaced[0] = BLANK
    length = 1
    at = start
    while at < stop:
        point, size = _decode(data, at)
        what = actions[point] & ACTION_BITS if point < len(actions) else KEEP
        if what == DROP:
            if point == NON_JOINER and _after_arabic(spaced, length):
                spaced[length] = BLANK
                length += 1
            at += size
            continue
        if what != KEEP and not (collapse and spaced[length - 1] == BLANK):
            spaced[length] = BLANK
            length += 1
        if what == KEEP or what == WRAP:
            for offset in range(size):
                spaced[length + offset] = data[at + offset]
            length += size
        if what == WRAP:
            spaced[length] = BLANK
            length += 1
        at += size
    if not (collapse and spaced[length - 1] == BLANK):
        spaced[length] = BLANK
        length += 1
    return length


@inner
def _scan_tokens(spaced, text, start, stop, keys, starts, count):
    """Append the key and start of every token of ``spaced[start:stop]`` (``text`` as bytes), which has blank ends.

    An empty token ends the text: no pattern contains one, so no window of tokens crosses into the next text.
    """
    first = start + 1
    for end in range(start + 1, stop):
        if spaced[end] == BLANK:
            keys[count] = token_key(text, first, end)
            starts[count] = first
            count += 1
            first = end + 1
    keys[count] = ZERO
    starts[count] = first
    return count + 1


@inner
def _look_up(keys, count, text, starts, vocabulary, words, long_tokens):
    """Replace each key with the value of its token, or 0 if no pattern contains it.

    ``keys[count]`` and ``long_tokens`` are scratch.
    """
    # Independent reads wait for memory together, and the real look-ups then find their slots in the cache. The values
    # read are stored because the compiler would otherwise remove the reads.
    mask = _U(len(vocabulary) // 2 - 1)
    seen = ZERO
    for token in range(count):
        seen ^= vocabulary[2 * slot_of(keys[token], mask)]
    num_long = 0
    for token in range(count):
        key = keys[token]
        slot = slot_of(key, mask)
        while vocabulary[2 * slot] != key and vocabulary[2 * slot] != ZERO:
            slot = np.int64(_U(slot + 1) & mask)
        value = vocabulary[2 * slot + 1]
        keys[token] = value
        long_tokens[num_long] = token
        num_long += int(key >= LONG) & int(value != ZERO)
    for at in range(num_long):
        seen ^= words[(keys[long_tokens[at]] & NUMBER) - ONE]
    keys[count] = seen
    for at in range(num_long):
        token = long_tokens[at]
        start, end = starts[token], starts[token + 1] - 1
        if not is_stored(text, start, end, words, np.int64(keys[token] & NUMBER) - 1):
            slot = find_token(vocabulary, token_key(text, start, end), text, start, end, words)
            keys[token] = vocabulary[2 * slot + 1]


@inner
def _touch_edges(values, count, edges):
    """Load the slots of all neighbours into the cache, as :func:`_look_up` does; ``values[count]`` is scratch."""
    mask = _U(len(edges) // 2 - 1)
    seen = ZERO
    for token in range(count - 1):
        key = ((values[token] & NUMBER) << S32) | (values[token + 1] & NUMBER)
        seen ^= edges[2 * slot_of(key, mask)]
    values[count] = seen


@inner
def _match_tokens(values, first, last, edges, ids, count):
    """Append the ids of the token patterns that start at the tokens ``first`` to ``last - 1``.

    Returns the new count, or -1 if ``ids`` has no room.
    """
    for start in range(first, last):
        if count + last - start > len(ids):
            return -1
        value = values[start]
        ids[count] = np.uint32((value >> S32) - ONE)
        count += value >> S32 != ZERO
        after = start + 1
        while value & BRANCH != ZERO and values[after] != ZERO:
            symbol = (values[after] & NUMBER) - ONE
            slot, _ = find_edge(edges, (value & NUMBER) - ONE, symbol)
            value = edges[2 * slot + 1]
            ids[count] = np.uint32((value >> S32) - ONE)
            count += value >> S32 != ZERO
            after += 1
    return count


@inner
def _bit(bits, at):
    return (bits[at >> 3] >> (at & 7)) & 1


@inner
def _match_characters(spaced, start, stop, edges, openings, points, ids, count):
    """Append the ids of character patterns in ``spaced[start:stop]``; ``points`` is scratch.

    Returns the new count, or -1 if ``ids`` has no room.
    """
    num_points = 0
    at = start
    while at < stop:
        point, size = _decode(spaced, at)
        points[num_points] = point
        num_points += 1
        at += size
    points[num_points : num_points + 3] = 0
    window = slide(slide(slide(ZERO, points[0]), points[1]), points[2])
    for first in range(num_points):
        window = slide(window, points[first + 3])
        one, two, four = np.int64(points[first]), opening_bit(window >> S32), opening_bit(window)
        if not (_bit(openings, one) | _bit(openings, two) | _bit(openings, four)):
            continue
        if count + num_points - first > len(ids):
            return -1
        value = BRANCH | ONE
        after = first
        while value & BRANCH != ZERO and after < num_points:
            slot, _ = find_edge(edges, (value & NUMBER) - ONE, _U(points[after]))
            value = edges[2 * slot + 1]
            ids[count] = np.uint32((value >> S32) - ONE)
            count += value >> S32 != ZERO
            after += 1
    return count


@inner
def _sort_unique(ids, first, count, scratch):
    """Sort ``ids[first:count]`` and drop repeats; returns the new count."""
    size = count - first
    if size > _SMALL_SORT:
        ids[first:count] = np.sort(ids[first:count])
        for at in range(count - 1, first, -1):
            if ids[at] == ids[at - 1]:
                ids[at] = _NONE
    else:
        # An id's place is the number of smaller ids; repeats share a place, and the places after it stay empty.
        padded = (size + 7) & ~7
        for at in range(padded):
            scratch[at] = ids[first + at] if at < size else _NONE
        ids[first:count] = _NONE
        for one in range(size):
            place = np.uint32(0)
            for other in range(padded):
                place += np.uint32(scratch[other] < scratch[one])
            ids[first + np.int64(place)] = scratch[one]
    kept = first
    for at in range(first, count):
        ids[kept] = ids[at]
        kept += ids[at] != _NONE
    return kept


@entry
def match_texts(
    data, offsets, actions, collapse, vocabulary, token_words, token_edges, character_edges, openings, source=SOURCE
):
    """All entries of each text.

    Texts are processed in blocks, one step at a time for a whole block, so that the look-ups of many tokens wait for
    memory together rather than one after another.

    Args:
        data, offsets: valid UTF-8 bytes of the texts (uint8) and the start of each text (int64, texts + 1).
        actions, collapse: what happens to each character (:func:`rules.character_table`), and to runs of spaces.
        source: leave at its default (:data:`trie_kernels.SOURCE`).

    Returns:
        offsets int64 (texts + 1,); ids uint32, sorted and unique within a text
    """
    num_texts = len(offsets) - 1
    longest = 0
    for text in range(num_texts):
        longest = max(longest, offsets[text + 1] - offsets[text])
    block_bytes = max(longest, _BLOCK_BYTES)
    words = np.empty((3 * block_bytes + 2 * _BLOCK_TEXTS) // 8 + 2, np.uint64)
    spaced = words.view(np.uint8)
    values = np.empty(2 * (block_bytes + _BLOCK_TEXTS) + 1, np.uint64)
    token_starts = np.empty(len(values), np.int64)
    long_tokens = np.empty(len(values), np.int64)
    points = np.empty(3 * longest + 5 if len(openings) else 0, np.uint32)
    spaced_ends = np.empty(_BLOCK_TEXTS, np.int64)
    token_ends = np.empty(_BLOCK_TEXTS, np.int64)
    scratch = np.empty(_SMALL_SORT, np.uint32)
    starts = np.zeros(num_texts + 1, np.int64)
    ids = np.empty(8 * num_texts + 16, np.uint32)
    count = 0
    block = 0
    while block < num_texts:
        length, tokens, size = 0, 0, 0
        while size < _BLOCK_TEXTS and block + size < num_texts:
            text = block + size
            if size > 0 and offsets[text + 1] - offsets[block] > block_bytes:
                break
            start = length
            length += _space_out(data, offsets[text], offsets[text + 1], actions, collapse, spaced[start:])
            tokens = _scan_tokens(spaced, words, start, length, values, token_starts, tokens)
            spaced_ends[size], token_ends[size] = length, tokens
            size += 1
        _look_up(values, tokens, words, token_starts, vocabulary, token_words, long_tokens)
        _touch_edges(values, tokens, token_edges)
        start, token = 0, 0
        member = 0
        while member < size:
            end = _match_tokens(values, token, token_ends[member] - 1, token_edges, ids, count)
            if end >= 0 and len(openings):
                end = _match_characters(spaced, start, spaced_ends[member], character_edges, openings, points, ids, end)
            if end < 0:
                ids = np.concatenate((ids, ids))  # double the room and retry this text
                continue
            count = _sort_unique(ids, count, end, scratch)
            starts[block + member + 1] = count
            start, token = spaced_ends[member], token_ends[member]
            member += 1
        block += size
    return starts, ids[:count].copy()
