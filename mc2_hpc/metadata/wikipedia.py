"""Wikipedia's ``pages-articles`` dumps, read with one page in memory at a time."""

import bz2
from collections.abc import Iterator
from pathlib import Path
from typing import IO, cast
from xml.etree import ElementTree

from mc2_hpc.errors import UserError
from mc2_hpc.metadata.wikitext import FILE_NAMESPACES
from mc2_hpc.reading.files import check_regular

_MEDIA, _FILE, _CATEGORY = "-2", "6", "14"
"""Keys of namespaces whose links leave no text."""


def read_articles(path: str | Path) -> Iterator[tuple[str, frozenset[str]]]:
    """Wikitext of every article in a dump, with the wiki's lower-cased names of the file and category namespaces.

    Articles are the pages in namespace 0 that are not redirects. A ``.bz2`` file may contain one stream, or many as in
    multistream dumps.

    Raises:
        UserError: missing, truncated, not bzip2, not XML, or not a dump; the message has the last complete page.
    """
    path = Path(path)
    check_regular(path)
    last = "the beginning"
    try:
        with bz2.open(path, "rb") as stream:
            pages = 0
            namespaces = FILE_NAMESPACES
            for element in _elements(cast(IO[bytes], stream)):
                if element.tag.endswith("}siteinfo"):
                    namespaces = _file_namespaces(element)
                    continue
                pages += 1
                last = f"page {element.findtext('{*}title')!r}"
                if element.findtext("{*}ns") == "0" and element.find("{*}redirect") is None:
                    yield element.findtext("{*}revision/{*}text") or "", namespaces
            if not pages:
                raise UserError(
                    f"{path}: no page in it; expected a dump such as swwiki-20240501-pages-articles.xml.bz2"
                )
    except ElementTree.ParseError as error:
        line, _ = error.position
        raise UserError(f"{path}: line {line} is not a dump's XML ({error}, after {last}); fetch it again") from None
    except (OSError, EOFError) as error:
        raise UserError(f"{path}: cannot be read beyond {last} ({error}); fetch it again") from None


def _elements(stream: IO[bytes]) -> Iterator[ElementTree.Element]:
    """Each ``siteinfo`` and ``page``, freed as soon as the next one is requested."""
    events = ElementTree.iterparse(stream, ("start", "end"))
    _, root = next(events)
    for event, element in events:
        if event == "end" and element.tag.endswith(("}page", "}siteinfo")):
            yield element
            root.clear()


def _file_namespaces(siteinfo: ElementTree.Element) -> frozenset[str]:
    names = {
        (namespace.text or "").lower()
        for namespace in siteinfo.iterfind("{*}namespaces/{*}namespace")
        if namespace.get("key") in (_MEDIA, _FILE, _CATEGORY)
    }
    return FILE_NAMESPACES | (names - {""})
