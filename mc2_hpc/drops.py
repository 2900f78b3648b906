"""The reasons why a sample, a caption or a shard is dropped, shared by curation, loading and evaluation.

Everything that is dropped is counted under one of these reasons. Only a user's own filters add others
(``docs/curation.md``).
"""

import logging
from collections import Counter
from enum import StrEnum

_LOGGED_PER_REASON = 3
logger = logging.getLogger(__name__)
_logged: Counter[str] = Counter()


class Drop(StrEnum):
    """The identifier used in counters, logs, reports and file formats; :data:`MEANINGS` explains each."""

    # A whole shard
    SHARD_UNREADABLE = "shard_unreadable"
    SHARD_CHANGED = "shard_changed"
    READ_ERROR = "read_error"

    # Names and keys
    NAME_UNSAFE = "name_unsafe"
    NAME_TOO_LONG = "name_too_long"
    NAME_REPEATED = "name_repeated"
    KEY_MISSING = "key_missing"
    ROW_MALFORMED = "row_malformed"

    # Pages and addresses
    RECORD_TOO_LARGE = "record_too_large"
    RECORD_NOT_HTTP = "record_not_http"
    PAGE_TOO_HEAVY = "page_too_heavy"
    URL_MISSING = "url_missing"
    URL_NOT_HTTP = "url_not_http"
    URL_INVALID = "url_invalid"

    # Fetching an image
    ADDRESS_REFUSED = "address_refused"
    HOST_UNREACHABLE = "host_unreachable"
    TIMEOUT = "timeout"
    TOO_MANY_REDIRECTS = "too_many_redirects"
    HTTP_404 = "http_404"
    HTTP_BUSY = "http_busy"
    HTTP_ERROR = "http_error"
    RESPONSE_BROKEN = "response_broken"
    TOO_LARGE = "too_large"
    OPTED_OUT = "opted_out"
    NOT_AN_IMAGE = "not_an_image"

    # Captions
    CAPTION_MISSING = "caption_missing"
    CAPTION_EMPTY = "caption_empty"
    CAPTION_NOT_UTF8 = "caption_not_utf8"
    CAPTION_NOT_JSON = "caption_not_json"
    CAPTION_REPEATED = "caption_repeated"
    LANGUAGE_UNKNOWN = "language_unknown"
    NO_MATCH = "no_match"
    NOT_DRAWN = "not_drawn"
    BALANCED = "balanced"
    TAKEN_DOWN = "taken_down"

    # Images
    IMAGE_MISSING = "image_missing"
    IMAGE_UNMATCHED = "image_unmatched"
    IMAGE_REPEATED = "image_repeated"
    IMAGE_UNSUPPORTED = "image_unsupported"
    IMAGE_TRUNCATED = "image_truncated"
    IMAGE_UNDECODABLE = "image_undecodable"
    IMAGE_TOO_LARGE = "image_too_large"
    DUPLICATE_IMAGE = "duplicate_image"


MEANINGS = {
    Drop.SHARD_UNREADABLE: "the tar or its Parquet file is missing, empty, truncated or damaged",
    Drop.SHARD_CHANGED: "the tar was rewritten since it was last listed; it is read in a different order",
    Drop.READ_ERROR: "storage could no longer read the bytes",
    Drop.NAME_UNSAFE: "the name or key is absolute, hidden, or leads out of its folder",
    Drop.NAME_TOO_LONG: "the name is too long for a plain tar",
    Drop.NAME_REPEATED: "another file of the same name",
    Drop.KEY_MISSING: "a caption without a key",
    Drop.ROW_MALFORMED: "a row of a table with more or fewer fields than its header",
    Drop.RECORD_TOO_LARGE: "an archive record that is too large to be a page",
    Drop.RECORD_NOT_HTTP: "a record that is not a valid HTTP response",
    Drop.PAGE_TOO_HEAVY: "a page that takes too much time or memory to parse",
    Drop.URL_MISSING: "an image without an address",
    Drop.URL_NOT_HTTP: "an address that is neither http nor https",
    Drop.URL_INVALID: "an address that cannot be parsed",
    Drop.ADDRESS_REFUSED: "the server is in a private, local or reserved network",
    Drop.HOST_UNREACHABLE: "unknown host, no connection, or a certificate that is not valid",
    Drop.TIMEOUT: "no connection or no whole response in time",
    Drop.TOO_MANY_REDIRECTS: "the server redirects in a circle or too often",
    Drop.HTTP_404: "the server no longer has the image (404 or 410)",
    Drop.HTTP_BUSY: "the server keeps asking to wait (429 or 503), or for longer than allowed",
    Drop.HTTP_ERROR: "any other status than 200",
    Drop.RESPONSE_BROKEN: "the response ends early or is not valid HTTP",
    Drop.TOO_LARGE: "more bytes than the limit",
    Drop.OPTED_OUT: "the server's X-Robots-Tag header asks not to use the image",
    Drop.NOT_AN_IMAGE: "something else than an image, such as a page",
    Drop.CAPTION_MISSING: "an image without a caption",
    Drop.CAPTION_EMPTY: "nothing but white space",
    Drop.CAPTION_NOT_UTF8: "the caption or its key is not valid UTF-8",
    Drop.CAPTION_NOT_JSON: "the record is not a JSON object, or is too large or nested too deeply",
    Drop.CAPTION_REPEATED: "a duplicate of a caption with the same key",
    Drop.LANGUAGE_UNKNOWN: "no metadata in the caption's language",
    Drop.NO_MATCH: "no metadata entry occurs in the caption",
    Drop.NOT_DRAWN: "another caption of the image was drawn in this epoch",
    Drop.BALANCED: "drawn, then removed by balancing",
    Drop.TAKEN_DOWN: "the sample is in the takedown list",
    Drop.IMAGE_MISSING: "a caption without an image",
    Drop.IMAGE_UNMATCHED: "none of the image's captions matched",
    Drop.IMAGE_REPEATED: "another image of the same sample",
    Drop.IMAGE_UNSUPPORTED: "a format that cannot be decoded here, such as JPEG XL or HEIC",
    Drop.IMAGE_TRUNCATED: "the JPEG ends early",
    Drop.IMAGE_UNDECODABLE: "any other damage, or not an image",
    Drop.IMAGE_TOO_LARGE: "more pixels than the limit (a decompression bomb)",
    Drop.DUPLICATE_IMAGE: "a copy of another image, which stays",
}
"""What each reason means, for reports and documentation."""


class Dropped(ValueError):
    """Something is dropped for ``reason``; ``detail`` adds more for the log."""

    def __init__(self, reason: Drop, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else str(reason))
        self.reason = reason
        self.detail = detail


def log_skip(reason: Drop, where: str, detail: str = "") -> None:
    """Log the first drops of each reason in this process; the rest are only counted, so that bad data cannot flood the
    log."""
    _logged[reason] += 1
    if _logged[reason] <= _LOGGED_PER_REASON:
        last = " (further ones are counted but not shown)" if _logged[reason] == _LOGGED_PER_REASON else ""
        logger.warning("skipped, %s: %s%s%s", reason, where, f": {detail}" if detail else "", last)
