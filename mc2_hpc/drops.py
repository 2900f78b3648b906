"""Why a sample, a caption or a shard is left out: one word each, for curation, loading and evaluation alike.

What is left out is always counted, under one of these words. A filter of the user's adds words of its own
(``docs/curation.md``); nothing else does.
"""

from enum import StrEnum


class Drop(StrEnum):
    """The word that counters, logs, reports and file formats use; the text beside it says when."""

    meaning: str

    def __new__(cls, word: str, meaning: str) -> "Drop":
        member = str.__new__(cls, word)
        member._value_ = word
        member.meaning = meaning
        return member

    # A whole shard
    SHARD_UNREADABLE = "shard_unreadable", "the tar or its Parquet file is missing, empty, truncated or damaged"
    SHARD_CHANGED = "shard_changed", "the tar was rewritten since it was last listed: it is read, in another order"
    READ_ERROR = "read_error", "storage could no longer read the bytes"

    # Names and keys
    NAME_UNSAFE = "name_unsafe", "the name or key is absolute, or climbs out of its folder"
    NAME_TOO_LONG = "name_too_long", "the key is too long for a name in a plain tar"
    KEY_MISSING = "key_missing", "a row of captions without a key"

    # Captions
    CAPTION_MISSING = "caption_missing", "an image without a caption"
    CAPTION_EMPTY = "caption_empty", "nothing but white space"
    CAPTION_NOT_UTF8 = "caption_not_utf8", "the bytes of the caption or its key are not UTF-8"
    CAPTION_NOT_JSON = "caption_not_json", "the .json member is not a JSON object, or too large or too deep to be read"
    CAPTION_REPEATED = "caption_repeated", "the same caption of the same key again"
    LANGUAGE_UNKNOWN = "language_unknown", "no metadata in the language of the caption"
    NO_MATCH = "no_match", "no metadata entry occurs in the caption"
    NOT_DRAWN = "not_drawn", "another caption of the image was drawn in this epoch"
    BALANCED = "balanced", "drawn, then thinned by balancing"

    # Images
    IMAGE_MISSING = "image_missing", "a caption without an image"
    IMAGE_UNMATCHED = "image_unmatched", "an image none of whose captions matched"
    IMAGE_REPEATED = "image_repeated", "a further image of the same sample"
    IMAGE_UNSUPPORTED = "image_unsupported", "a format that cannot be decoded here, such as .jxl or .heic"
    IMAGE_TRUNCATED = "image_truncated", "the JPEG ends early"
    IMAGE_UNDECODABLE = "image_undecodable", "any other damage, or not an image"
    IMAGE_TOO_LARGE = "image_too_large", "more pixels than are decoded (a decompression bomb)"
    IMAGE_IN_BENCHMARK = "image_in_benchmark", "a near copy of a benchmark's image"
