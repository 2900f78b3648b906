"""Why a sample, a caption or a shard is left out: one word each, for curation, loading and evaluation alike.

What is left out is always counted, under one of these words. A filter of the user's adds words of its own
(``docs/curation.md``); nothing else does.
"""

from enum import StrEnum


class Drop(StrEnum):
    """The word that counters, logs, reports and file formats use; the text below it says when."""

    # A whole shard
    SHARD_UNREADABLE = "shard_unreadable"
    """The tar or its Parquet file is missing, empty, truncated or damaged."""
    SHARD_CHANGED = "shard_changed"
    """The tar was rewritten since it was last listed: it is read, in another order."""
    READ_ERROR = "read_error"
    """Storage could no longer read the bytes."""

    # Names and keys
    NAME_UNSAFE = "name_unsafe"
    """The name or key is absolute, or climbs out of its folder."""
    NAME_TOO_LONG = "name_too_long"
    """The key is too long for a name in a plain tar."""
    KEY_MISSING = "key_missing"
    """A row of captions without a key."""

    # Captions
    CAPTION_MISSING = "caption_missing"
    """An image without a caption."""
    CAPTION_EMPTY = "caption_empty"
    """Nothing but white space."""
    CAPTION_NOT_UTF8 = "caption_not_utf8"
    """The bytes of the caption or its key are not UTF-8."""
    CAPTION_NOT_JSON = "caption_not_json"
    """The .json member is not a JSON object, or too large or too deep to be read."""
    CAPTION_REPEATED = "caption_repeated"
    """The same caption of the same key again."""
    LANGUAGE_UNKNOWN = "language_unknown"
    """No metadata in the language of the caption."""
    NO_MATCH = "no_match"
    """No metadata entry occurs in the caption."""
    NOT_DRAWN = "not_drawn"
    """Another caption of the image was drawn in this epoch."""
    BALANCED = "balanced"
    """Drawn, then thinned by balancing."""

    # Images
    IMAGE_MISSING = "image_missing"
    """A caption without an image."""
    IMAGE_UNMATCHED = "image_unmatched"
    """An image none of whose captions matched."""
    IMAGE_REPEATED = "image_repeated"
    """A further image of the same sample."""
    IMAGE_UNSUPPORTED = "image_unsupported"
    """A format that cannot be decoded here, such as .jxl or .heic."""
    IMAGE_TRUNCATED = "image_truncated"
    """The JPEG ends early."""
    IMAGE_UNDECODABLE = "image_undecodable"
    """Any other damage, or not an image."""
    IMAGE_TOO_LARGE = "image_too_large"
    """More pixels than are decoded (a decompression bomb)."""
    IMAGE_IN_BENCHMARK = "image_in_benchmark"
    """A near copy of a benchmark's image."""


class Dropped(ValueError):
    """Something is left out; ``reason`` says why, ``detail`` says more for the log."""

    def __init__(self, reason: Drop, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.detail = detail
