"""Images and their alt texts in a page, as Common Crawl describes it (WAT) or as HTML."""

import html
import json
from typing import Any, NamedTuple
from urllib.parse import urljoin


class PageImages(NamedTuple):
    """``<img>`` elements of a page, in order."""

    base: str
    """The base of relative addresses: the page's own address, or its ``<base href>``."""
    images: list[tuple[str, str]]
    """Address as written, and alt text with entities decoded; either may be empty."""


def images_of_wat(payload: bytes) -> PageImages:
    """Images in the JSON of a WAT record; none if it does not describe an HTML page.

    Raises:
        ValueError: not JSON.
    """
    envelope = _child(json.loads(payload), "Envelope")
    page = _child(envelope, "WARC-Header-Metadata").get("WARC-Target-URI")
    metadata = _child(envelope, "Payload-Metadata", "HTTP-Response-Metadata", "HTML-Metadata")
    base = _child(metadata, "Head").get("Base")
    links = metadata.get("Links")
    images = [
        (_text(link.get("url")), html.unescape(_text(link.get("alt"))))
        for link in (links if isinstance(links, list) else [])
        if isinstance(link, dict) and link.get("path") == "IMG@/src"
    ]
    return PageImages(_joined(_text(page), _text(base)), images)


def images_of_html(body: bytes, charset: str | None, page: str) -> PageImages:
    """Images of an HTML page. An image's address is its ``src``, or its ``data-src`` (lazy loading) if the ``src`` is
    missing or a placeholder (``data:``).

    Args:
        charset: from the HTTP header; taken from the page if the header has no known charset.
        page: address of the page.
    """
    from resiliparse.parse.encoding import detect_encoding, map_encoding_to_html5
    from resiliparse.parse.html import HTMLTree

    encoding = map_encoding_to_html5(charset.strip("\"' "), fallback_utf8=False) if charset else None
    encoding = encoding or detect_encoding(body, from_html_meta=True) or "utf-8"
    document = HTMLTree.parse_from_bytes(body, encoding).document
    if document is None:
        return PageImages(page, [])
    bases = (_text(element.getattr("href")) for element in document.get_elements_by_tag_name("base").values())
    images = [
        (_source(element.getattr("src"), element.getattr("data-src")), _text(element.getattr("alt")))
        for element in document.get_elements_by_tag_name("img").values()  # iterating is quadratic
    ]
    return PageImages(_joined(page, next(filter(None, bases), "")), images)


def _source(src: str | None, lazy: str | None) -> str:
    src = _text(src)
    return _text(lazy) or src if not src.strip() or src.lstrip().startswith("data:") else src


def _joined(page: str, base: str) -> str:
    try:
        return urljoin(page, base)
    except ValueError:
        return page  # as browsers do with a base that is not an address


def _child(value: Any, *path: str) -> dict[str, Any]:
    """The object at ``path``; an empty one if there is none."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""
