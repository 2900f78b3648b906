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
    token_words: uint64, length and bytes of every longer token; its node number is the place where they start.
    edges: (parent number + 1) << 32 | (symbol + 1) -> value.

Bytes are read eight at a time, as little-endian words.
"""

import numpy as np
from numba import njit

from mc2_hpc.curation.text import ACTION_BITS, KEEP, NORMALISE, SPACE, WRAP

_U = np.uint64
_BRANCH = _U(1 << 31)
_NUMBER = _U((1 << 31) - 1)
_S8, _S16, _S29, _S32, _S56, _S63 = _U(8), _U(16), _U(29), _U(32), _U(56), _U(63)
_ONE, _ZERO = _U(1), _U(0)
_LONG = _U(1 << 63)
_K1 = _U(0x9E3779B97F4A7C15)
_K2 = _U(0xBF58476D1CE4E5B9)
_BLANK = 32
_SHORT = 7
"""Bytes of a token that is its own key."""
_NONE = np.uint32(0xFFFFFFFF)
"""No entry's id."""
_SMALL_SORT = 32
"""Most matches that are sorted by counting: a multiple of what the processor compares at a time."""
_BLOCK_TEXTS = 256
_BLOCK_BYTES = 1 << 14
"""Texts of one block, unless a single one is longer: what a block needs stays in the core's own cache."""
_CODE_POINTS = 0x110000
_OPENING_BITS = 18
"""Logarithm of the bits for hashed openings of character patterns: 32 KB."""
_S_OPENING = _U(64 - _OPENING_BITS)

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
def _padded(data):
    """Bytes as words, with one more word than they fill."""
    words = np.zeros(len(data) // 8 + 2, np.uint64)
    words.view(np.uint8)[: len(data)] = data
    return words


@_jit
def _word(text, at):
    """The 8 bytes from byte ``at`` on."""
    shift = _U((at & 7) * 8)
    return (text[at >> 3] >> shift) | ((text[(at >> 3) + 1] << _ONE) << (_S63 - shift))


@_jit
def _token_key(text, start, end):
    length = end - start
    rest = _word(text, end - (length & 7)) & ((_ONE << _U(8 * (length & 7))) - _ONE)
    if length <= _SHORT:
        return rest | (_U(length + 1) << _S56)
    digest = _U(length)
    for at in range(start, end - 7, 8):
        digest = (digest ^ _word(text, at)) * _K2
        digest ^= digest >> _S29
    digest = (digest ^ rest) * _K2
    digest ^= digest >> _S32
    return digest | _LONG


@_jit
def _is_stored(text, start, end, words, at):
    """Whether the token is what :func:`_store_token` put at ``at``."""
    length = end - start
    if words[at] != _U(length):
        return False
    for offset in range(0, length - 7, 8):
        at += 1
        if words[at] != _word(text, start + offset):
            return False
    # Some of the last 8 bytes are compared twice, which is quicker than to mask them.
    return words[at + 1] == _word(text, end - 8)


@_jit
def _store_token(text, start, end, words, at):
    """Put length and bytes of a long token at ``at``; returns where the next one goes."""
    words[at] = _U(end - start)
    for first in range(start, end - 7, 8):
        at += 1
        words[at] = _word(text, first)
    words[at + 1] = _word(text, end - 8)
    return at + 2


@_jit
def _num_words(length):
    """Words that :func:`_store_token` needs for a token of this many bytes."""
    return 2 + length // 8 if length > _SHORT else 0


@_jit
def _find_token(slots, key, text, start, end, words):
    """Position of the slot of the token at bytes ``start`` to ``end - 1``, or of the empty one where it belongs."""
    mask = _U(len(slots) // 2 - 1)
    slot = _slot_of(key, mask)
    while slots[2 * slot] != _ZERO:
        if slots[2 * slot] == key:
            number = np.int64(slots[2 * slot + 1] & _NUMBER) - 1
            if key < _LONG or _is_stored(text, start, end, words, number):
                break
        slot = np.int64(_U(slot + 1) & mask)
    return slot


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
        vocabulary slots, token_words, edge slots
    """
    text = _padded(data)
    num_tokens, num_inner, most_words = 0, 0, 0
    for pattern in range(len(entry_ids)):
        start, stop = offsets[pattern], offsets[pattern + 1]
        for end in range(start, stop + 1):
            if end < stop and data[end] != _BLANK:
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
            if end < stop and data[end] != _BLANK:
                continue
            key = _token_key(text, start, end)
            slot = _find_token(vocabulary, key, text, start, end, words)
            if vocabulary[2 * slot] == _ZERO:
                tokens += 1
                vocabulary[2 * slot] = key
                if key >= _LONG:
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
            if end < stop and data[end] != _BLANK:
                continue
            found = _find_token(vocabulary, _token_key(text, start, end), text, start, end, words)
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
    return vocabulary, words[:used].copy(), _shrink(edges, num_edges)


@_jit
def _slide(window, point):
    """The last four code points, the lower 16 bits of each."""
    return (window << _S16) | (_U(point) & _U(0xFFFF))


@_jit
def _opening_bit(window):
    return _CODE_POINTS + np.int64((window * _K1) >> _S_OPENING)


@_jit
def _bit(bits, at):
    return (bits[at >> 3] >> (at & 7)) & 1


@_jit
def build_character_trie(points, offsets, entry_ids):
    """Character trie of whole patterns, spaces at their ends included.

    Args:
        points, offsets: code points of the patterns (uint32) and where each starts (int64, one more than patterns).
        entry_ids: int64, ascending; of equal patterns the first keeps its id.

    Returns:
        edge slots; openings: bits (uint8) that tell of most places that no pattern starts there, none without patterns:
        one a code point that is a pattern, then ``1 << _OPENING_BITS`` for the hashed first 4 code points of a pattern,
        the first 2 of one shorter than that
    """
    edges = np.zeros(2 * _capacity(len(points)), np.uint64)
    openings = np.zeros((_CODE_POINTS + (1 << _OPENING_BITS)) // 8 if len(entry_ids) else 0, np.uint8)
    number, num_edges = 0, 0
    for pattern in range(len(entry_ids)):
        start = offsets[pattern]
        length = offsets[pattern + 1] - start
        bit = np.int64(points[start])
        if length > 1:
            window = _ZERO
            for at in range(start, start + (2 if length < 4 else 4)):
                window = _slide(window, points[at])
            bit = _opening_bit(window)
        openings[bit >> 3] |= np.uint8(1 << (bit & 7))
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
    return _shrink(edges, num_edges), openings


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
def _scan_tokens(spaced, text, start, stop, keys, starts, count):
    """Append the key and start of every token of ``spaced[start:stop]`` (``text`` as bytes), a blank at both ends.

    An empty token closes the text: it stands for what no pattern has, so no window of tokens crosses into the next.
    """
    first = start + 1
    for end in range(start + 1, stop):
        if spaced[end] == _BLANK:
            keys[count] = _token_key(text, first, end)
            starts[count] = first
            count += 1
            first = end + 1
    keys[count] = _ZERO
    starts[count] = first
    return count + 1


@_jit
def _look_up(keys, count, text, starts, vocabulary, words, long_tokens):
    """Replace each key by the value of its token, 0 if no pattern has it.

    ``keys[count]`` and ``long_tokens`` are scratch.
    """
    # Reads that wait for nothing but memory wait together; the look-ups proper then find their slots in the cache. What
    # was read is stored, or the compiler would leave the reads out.
    mask = _U(len(vocabulary) // 2 - 1)
    seen = _ZERO
    for token in range(count):
        seen ^= vocabulary[2 * _slot_of(keys[token], mask)]
    num_long = 0
    for token in range(count):
        key = keys[token]
        slot = _slot_of(key, mask)
        while vocabulary[2 * slot] != key and vocabulary[2 * slot] != _ZERO:
            slot = np.int64(_U(slot + 1) & mask)
        value = vocabulary[2 * slot + 1]
        keys[token] = value
        long_tokens[num_long] = token
        num_long += int(key >= _LONG) & int(value != _ZERO)
    for at in range(num_long):
        seen ^= words[(keys[long_tokens[at]] & _NUMBER) - _ONE]
    keys[count] = seen
    for at in range(num_long):
        token = long_tokens[at]
        start, end = starts[token], starts[token + 1] - 1
        if not _is_stored(text, start, end, words, np.int64(keys[token] & _NUMBER) - 1):
            slot = _find_token(vocabulary, _token_key(text, start, end), text, start, end, words)
            keys[token] = vocabulary[2 * slot + 1]


@_jit
def _touch_edges(values, count, edges):
    """Bring the slots of all neighbours into the cache, as :func:`_look_up` does; ``values[count]`` is scratch."""
    mask = _U(len(edges) // 2 - 1)
    seen = _ZERO
    for token in range(count - 1):
        key = ((values[token] & _NUMBER) << _S32) | (values[token + 1] & _NUMBER)
        seen ^= edges[2 * _slot_of(key, mask)]
    values[count] = seen


@_jit
def _match_tokens(values, first, last, edges, ids, count):
    """Append the ids of the token patterns that start at the tokens ``first`` to ``last - 1``.

    Returns the new count, or -1 if ``ids`` has no room.
    """
    for start in range(first, last):
        if count + last - start > len(ids):
            return -1
        value = values[start]
        ids[count] = np.uint32((value >> _S32) - _ONE)
        count += value >> _S32 != _ZERO
        after = start + 1
        while value & _BRANCH != _ZERO and values[after] != _ZERO:
            symbol = (values[after] & _NUMBER) - _ONE
            slot, _ = _find_edge(edges, (value & _NUMBER) - _ONE, symbol)
            value = edges[2 * slot + 1]
            ids[count] = np.uint32((value >> _S32) - _ONE)
            count += value >> _S32 != _ZERO
            after += 1
    return count


@_jit
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
    window = _slide(_slide(_slide(_ZERO, points[0]), points[1]), points[2])
    for first in range(num_points):
        window = _slide(window, points[first + 3])
        one, two, four = np.int64(points[first]), _opening_bit(window >> _S32), _opening_bit(window)
        if not (_bit(openings, one) | _bit(openings, two) | _bit(openings, four)):
            continue
        if count + num_points - first > len(ids):
            return -1
        value = _BRANCH | _ONE
        after = first
        while value & _BRANCH != _ZERO and after < num_points:
            slot, _ = _find_edge(edges, (value & _NUMBER) - _ONE, _U(points[after]))
            value = edges[2 * slot + 1]
            ids[count] = np.uint32((value >> _S32) - _ONE)
            count += value >> _S32 != _ZERO
            after += 1
    return count


@_jit
def _sort_unique(ids, first, count, scratch):
    """Sort ``ids[first:count]`` and drop repeats; returns the new count."""
    size = count - first
    if size > _SMALL_SORT:
        ids[first:count] = np.sort(ids[first:count])
        for at in range(count - 1, first, -1):
            if ids[at] == ids[at - 1]:
                ids[at] = _NONE
    else:
        # The place of an id is the number of smaller ones; repeats share one place, and those after it stay empty.
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


@_jit
def match_texts(data, offsets, actions, collapse, vocabulary, token_words, token_edges, character_edges, openings):
    """All entries of each text.

    Texts are taken in blocks and each step done for a whole block, so that the look-ups of many tokens wait for memory
    together rather than one after another.

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
                ids = np.concatenate((ids, ids))  # twice the room, and the text once more
                continue
            count = _sort_unique(ids, count, end, scratch)
            starts[block + member + 1] = count
            start, token = spaced_ends[member], token_ends[member]
            member += 1
        block += size
    return starts, ids[:count].copy()
