"""Image addresses: absolute and canonical forms, and the key of an image.

The *canonical* address decides which images are the same. It never merges what may be two images: it differs from the
absolute address only as follows.

- The scheme is ``https``, the host is in lower case, and the scheme's default port and the fragment are removed.
- Characters that an address cannot contain are percent-encoded as UTF-8, and escapes have upper-case digits.
- Query parameters that track a visitor (``utm_*``, ``fbclid`` ...) are removed.
- If the path ends in the name of an image (``.jpg``, ``.png`` ...), so are parameters that choose a rendition (``w``,
  ``quality``, ``format`` ...) or bust a cache (``v``, ``ts`` ...). Elsewhere (``image.php?v=7``) they may be what
  selects the image.

Every other parameter stays in its place.
"""

import hashlib
import re
from urllib.parse import quote, urljoin, urlsplit

from mc2_hpc.drops import Drop, Dropped

_TRACKING = frozenset({"fbclid", "gclid", "dclid", "msclkid", "yclid", "igshid", "mc_cid", "mc_eid", "_ga"})
_RENDITION = frozenset(
    "w h width height maxwidth maxheight q quality fit crop auto fm format dpr resize size scale strip ssl sharpen "
    "lossy compress v ver version rev t ts timestamp itok cb nocache _".split()
)
_IMAGE = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".avif", ".bmp", ".tif", ".tiff", ".jxl", ".heic")
_DEFAULT_PORTS = {"http": 80, "https": 443}
_IS_PLAIN = re.compile(r"[!#-;=?-Z\[\]_a-z~]*").fullmatch  # printable ASCII but " < > \ ^ ` { | }
_LOWER_ESCAPE = re.compile(r"%(?=[0-9A-F]?[a-f])[0-9A-Fa-f]{2}")
_SAFE = "!#$%&'()*+,/:;=?@[]~"


def absolute_url(source: str, base: str) -> str:
    """The http(s) address that ``source``, an attribute in a page, refers to on a page with base address ``base``.

    Raises:
        Dropped: ``url_missing`` (empty), ``url_not_http`` (``data:``, ``blob:`` ...), ``url_invalid`` (no host, a port
            that is not a number, credentials, characters that are not text).
    """
    source = source.strip()
    if not source:
        raise Dropped(Drop.URL_MISSING)
    try:
        if not source.startswith(("http://", "https://")):
            source = urljoin(base, source)
        parts = urlsplit(source)
        if parts.scheme not in _DEFAULT_PORTS:
            raise Dropped(Drop.URL_NOT_HTTP)
        host, port = parts.hostname, parts.port
        if not host or "@" in parts.netloc:
            raise Dropped(Drop.URL_INVALID)
        host = host if host.isascii() else host.encode("idna").decode()
        path, query = _escaped(parts.path or "/"), _escaped(parts.query)
    except Dropped:
        raise
    except ValueError:  # includes UnicodeError
        raise Dropped(Drop.URL_INVALID) from None
    if not _IS_PLAIN(host):
        raise Dropped(Drop.URL_INVALID)
    host = f"[{host}]" if ":" in host else host
    place = host if port is None or port == _DEFAULT_PORTS[parts.scheme] else f"{host}:{port}"
    return f"{parts.scheme}://{place}{path}?{query}" if query else f"{parts.scheme}://{place}{path}"


def _escaped(part: str) -> str:
    if not _IS_PLAIN(part):
        part = quote(part, safe=_SAFE)
    return _LOWER_ESCAPE.sub(lambda escape: escape[0].upper(), part) if "%" in part else part


def canonical_url(url: str) -> str:
    """The canonical form (see the module) of an address from :func:`absolute_url`."""
    path, _, query = url.removeprefix("https:").removeprefix("http:").partition("?")
    if query:
        dropped = _RENDITION if path.lower().endswith(_IMAGE) else frozenset()
        query = "&".join(item for item in query.split("&") if not _is_dropped(item.partition("=")[0].lower(), dropped))
    return f"https:{path}?{query}" if query else f"https:{path}"


def _is_dropped(name: str, dropped: frozenset[str]) -> bool:
    return not name or name in dropped or name in _TRACKING or name.startswith("utm_")


def image_key(url: str) -> str:
    """24 hex digits: the first 96 bits of the SHA-224 of the canonical form of ``url`` (MetaCLIP 1's keys)."""
    return hashlib.sha224(canonical_url(url).encode()).hexdigest()[:24]
