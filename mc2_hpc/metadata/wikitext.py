"""MediaWiki markup to plain text, for counting words.

Templates, tables, references, formulas, code, files and categories are dropped with their content; links and headings
leave their text. The recipe keeps the same (WikiExtractor without templates), except that this also keeps list items
and headings. Broken markup loses its own marks, never the rest of the article.
"""

import html
import re
from collections.abc import Collection
from functools import cache

from mc2_hpc.metadata.languages import LANGUAGES

FILE_NAMESPACES = frozenset({"file", "image", "media", "category"})
"""Canonical names of namespaces whose links leave no text; every Wikipedia accepts them besides its own names."""

_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_ELEMENT = re.compile(
    r"<(ref|math|chem|ce|gallery|timeline|score|source|syntaxhighlight|code|pre|imagemap|graph|hiero|mapframe|maplink"
    r"|templatedata|inputbox|templatestyles|references|section)\b(?:[^<>]*/>|[^<>]*>(?:.*?</\1\s*>)?)",
    re.DOTALL | re.IGNORECASE,
)
_BRACES = re.compile(r"\{\{|\}\}|^[ \t:*#]*\{\||^[ \t]*\|\}(?!\})", re.MULTILINE)
_VARIANT = re.compile(r"-\{(?:([^{}|]*)\|)?([^{}]*)\}-")
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\]]*[^\S\n]*([^\]\n]*)\]", re.IGNORECASE)
_LINK = re.compile(r"\[\[([^\[\]|]*)(?:\|((?:[^\[\]]++|\[[^\[\]]*+\])*+))?\]\]")
_FILE_NAME = re.compile(r"\.(?:jpe?g|png|svg|gif|tiff?|webp|webm|og[gvam]|wav|mp3|pdf|djvu|xcf|stl)$", re.IGNORECASE)
_URL = re.compile(r"\b(?:https?|ftp)://\S+", re.IGNORECASE)
_TAG = re.compile(r"</?[a-z][^<>]*>", re.IGNORECASE)
_BREAK = re.compile(r"<(?:br|p|/p|hr|li|div|/div|tr|td|th)\b[^<>]*>", re.IGNORECASE)
_LINE_START = re.compile(r"^(?:[*#:;]+[ \t]*|-{4,}|[|!].*)", re.MULTILINE)
_HEADING = re.compile(r"^(={1,6})[ \t]*(.*?)[ \t]*\1[ \t]*$", re.MULTILINE)
_QUOTES = re.compile(r"'{2,}")
_SWITCH = re.compile(r"__[^\W\d_]+(?:_[^\W\d_]+)*__")
_LANGUAGE_PREFIXES = frozenset(row.domain for row in LANGUAGES.values())


def plain_text(wikitext: str, file_namespaces: Collection[str] = FILE_NAMESPACES) -> list[str]:
    """Lines of text of an article, without markup or blank lines.

    Args:
        file_namespaces: lower-cased names of this wiki's file and category namespaces.
    """
    text = _COMMENT.sub("", wikitext)
    text = _ELEMENT.sub("", text)
    text = _without_braces(text)
    text = _VARIANT.sub(_variant, text)
    text = _EXTERNAL.sub(r"\1", text)
    text = _without_links(text, frozenset(file_namespaces))
    text = _BREAK.sub("\n", text)
    text = _TAG.sub("", text)
    text = _URL.sub("", text)
    text = _LINE_START.sub("", text)
    text = _HEADING.sub(r"\2", text)
    text = _QUOTES.sub("", text)
    text = _SWITCH.sub("", text)
    lines = (line.strip() for line in html.unescape(text).splitlines())
    return [line for line in lines if line]


def _without_braces(text: str) -> str:
    """Text without ``{{templates}}`` and ``{| tables |}``, including nested ones; unpaired marks stay."""
    opened: list[tuple[str, int]] = []  # kind of bracket, where it starts
    closed: list[tuple[int, int]] = []  # spans to drop, by end
    for mark in _BRACES.finditer(text):
        kind = "{{" if mark[0] in ("{{", "}}") else "{|"
        if mark[0].endswith(("{{", "{|")):
            opened.append((kind, mark.start()))
        elif any(kind == other for other, _ in opened):
            while opened[-1][0] != kind:
                opened.pop()
            closed.append((opened.pop()[1], mark.end()))
    kept: list[str] = []
    end = len(text)
    for start, stop in reversed(closed):
        if start < end:  # otherwise it is inside a span that is already dropped
            kept.append(text[min(stop, end) : end])
            end = start
    kept.append(text[:end])
    return "".join(reversed(kept))


def _without_links(text: str, file_namespaces: frozenset[str]) -> str:
    """Text with each ``[[link]]`` replaced by what a reader sees; from the inside out, as captions contain links."""
    links = 1
    while links:
        text, links = _LINK.subn(lambda link: _link_text(link[1], link[2], file_namespaces), text)
    return text


def _link_text(target: str, label: str | None, file_namespaces: frozenset[str]) -> str:
    target = target.strip()
    prefix, colon, _ = target.partition(":")
    prefix = prefix.strip().lower()
    if colon and (prefix in file_namespaces or prefix in _LANGUAGE_PREFIXES) or _FILE_NAME.search(target):
        return ""
    return (label or "").rpartition("|")[2] or target.lstrip(":")


def _variant(match: re.Match[str]) -> str:
    """One text of ``-{...}-``, which Chinese and other Wikipedias use for text that depends on the reader's script."""
    flags, text = match.groups()
    if flags is not None and set(flags.upper()) & set("HT-"):
        return ""  # a rule or a page title: not seen here
    first = next((part for part in text.split(";") if part.strip()), "")
    code, colon, alternative = first.partition(":")
    return alternative if colon and _is_variant_code(code.strip().lower()) else text


@cache
def _is_variant_code(code: str) -> bool:
    return re.fullmatch(r"[a-z]{2,3}(?:-[a-z]+)*", code) is not None
