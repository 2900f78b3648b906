"""The captions in the fields of a table's row."""

from typing import Any

from mc2_hpc.drops import Dropped
from mc2_hpc.ingestion.columns import Columns
from mc2_hpc.samples import Caption, texts_in, usable_text


def raw_captions(fields: dict[str, Any], used: Columns) -> list[tuple[bytes, str]]:
    """Captions, which may not be valid UTF-8, each with its language or an empty string.

    A caption column holds a string, a list of strings, or an object with a caption for each language, such as
    ``{"en": ..., "de": ...}``; otherwise the language is that of the row.
    """
    lang = fields.get(used.lang)
    lang = lang if isinstance(lang, str) else ""
    found = []
    for column in used.captions:
        value = fields.get(column)
        by_language = value if isinstance(value, dict) else {lang: value}
        found += [(text, code) for code, texts in by_language.items() for text in texts_in(texts)]
    return [(text.encode("utf-8", "surrogatepass"), code) for text, code in found]


def captions_in(fields: dict[str, Any], used: Columns) -> list[Caption | Dropped]:
    """Captions, or why one cannot be used."""
    return [usable(raw, lang) for raw, lang in raw_captions(fields, used)]


def usable(raw: bytes, lang: str) -> Caption | Dropped:
    """The caption, or why it cannot be used."""
    try:
        return Caption(usable_text(raw), lang)
    except Dropped as dropped:
        return dropped
