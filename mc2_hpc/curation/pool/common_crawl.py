"""Images and their alt texts from Common Crawl archives: WAT or WARC files.

WAT files hold each page's links as JSON, WARC files the pages themselves; both give the same rows, WAT at a fraction
of the size. A row is an image address in a page with its alt text: ``key`` (of the canonical address, see
:mod:`mc2_hpc.curation.pool.urls`), ``text`` and ``source`` (the absolute address).
"""

import gzip
import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, cast

from mc2_hpc.curation.pool.page_images import PageImages, images_of_wat
from mc2_hpc.curation.pool.page_worker import HeavyPage, PageWorker
from mc2_hpc.curation.pool.urls import absolute_url, image_key
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError, first_line
from mc2_hpc.reading.files import open_regular

_SUFFIXES = (".wat", ".warc", ".wat.gz", ".warc.gz")
_LARGEST_RECORD = 64 << 20
_LARGEST_PAGE = 16 << 20
"""Of HTML, unpacked; Common Crawl truncates pages at 5 MiB."""
_Parser = Callable[[bytes, str], PageImages | None]
_HTML = ("text/html", "application/xhtml+xml")


def list_archives(specs: Sequence[str | Path]) -> dict[str, Path]:
    """Archives by shard name (the part before ``.warc`` or ``.wat``), sorted.

    Raises:
        UserError: a path that does not exist, a folder without archives, or a name that occurs twice.
    """
    found: dict[str, Path] = {}
    for spec in map(Path, specs):
        if not spec.exists():
            raise UserError(f"{spec}: no such file or folder")
        files = [spec] if spec.is_file() else sorted(p for p in spec.rglob("*") if p.name.endswith(_SUFFIXES))
        if not files:
            raise UserError(f"{spec}: no {', '.join('*' + suffix for suffix in _SUFFIXES)} in this folder")
        for path in files:
            name = path.name.removesuffix(".gz").removesuffix(".wat").removesuffix(".warc")
            if name in found and found[name].resolve() != path.resolve():
                raise UserError(f"{path} and {found[name]} have the same name; extract them into two folders")
            found[name] = path
    return dict(sorted(found.items()))


class ArchiveReader:
    """Rows of one archive, with counts of what is read and dropped. Memory: one record, 16 bytes per distinct row."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts = {"records": 0, "pages": 0, "images": 0, "rows": 0}
        self.drops: Counter[str] = Counter()
        self._seen: set[bytes] = set()
        self._worker = PageWorker()

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Key, text and source of each usable image, in the archive's order.

        Raises:
            UserError: the archive is damaged or truncated, or is not an archive.
        """
        try:
            with _open(self.path) as stream, self._worker:
                for page in self._pages(stream):
                    yield from self._rows_of(page)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(
                f"{self.path}: damaged or truncated after record {self.counts['records']} "
                f"({first_line(error, most=80)}); fetch it again or remove it"
            ) from None
        if self.counts["records"] == 0:
            raise UserError(f"{self.path}: contains no WARC records; fetch it again or remove it")

    def _pages(self, stream: IO[bytes]) -> Iterator[PageImages]:
        from fastwarc import ArchiveIterator

        # HTTP is parsed later, from memory: a page that breaks its rules must not end the archive.
        for record in ArchiveIterator(cast(Any, stream), parse_http=False):
            size = record.content_length
            parse = _parser(record, self._worker)
            if parse and size <= _LARGEST_RECORD:
                payload = record.reader.read()
                whole = len(payload) == size
            else:
                payload, whole = b"", record.reader.consume() == size
            if not whole:
                raise EOFError("its last record is incomplete")
            self.counts["records"] += 1
            if parse and size > _LARGEST_RECORD:
                self.drops[Drop.RECORD_TOO_LARGE] += 1
            elif parse:
                page = self._try(parse, payload, record.headers.get("WARC-Target-URI") or "")
                if page is not None and page.images:
                    self.counts["pages"] += 1
                    yield page

    def _try(self, parse: _Parser, payload: bytes, address: str) -> PageImages | None:
        try:
            return parse(payload, address)
        except UnicodeDecodeError:
            self.drops[Drop.CAPTION_NOT_UTF8] += 1
        except (ValueError, RecursionError):
            self.drops[Drop.CAPTION_NOT_JSON] += 1
        except _BadHttp:
            self.drops[Drop.RECORD_NOT_HTTP] += 1
        except _TooLarge:
            self.drops[Drop.RECORD_TOO_LARGE] += 1
        except HeavyPage:
            self.drops[Drop.PAGE_TOO_HEAVY] += 1
        return None

    def _rows_of(self, page: PageImages) -> Iterator[tuple[str, str, str]]:
        self.counts["images"] += len(page.images)
        for source, alt in page.images:
            text = " ".join(alt.split())
            if not text:
                self.drops[Drop.CAPTION_EMPTY] += 1
                continue
            try:
                url = absolute_url(source, page.base)
                digest = hashlib.blake2b(f"{url}\n{text}".encode(), digest_size=16).digest()
            except Dropped as dropped:
                self.drops[dropped.reason] += 1
            except UnicodeEncodeError:  # JSON can contain half of a surrogate pair
                self.drops[Drop.CAPTION_NOT_UTF8] += 1
            else:
                if digest in self._seen:
                    self.drops[Drop.CAPTION_REPEATED] += 1
                else:
                    self._seen.add(digest)
                    self.counts["rows"] += 1
                    yield image_key(url), text, url


class _BadHttp(Exception):
    """A response that violates HTTP."""


class _TooLarge(Exception):
    """A page that unpacks to more than :data:`_LARGEST_PAGE`."""


def _images_of_response(worker: PageWorker, payload: bytes, address: str) -> PageImages | None:
    """Images of an HTTP response, or None if it is not HTML."""
    from fastwarc import WarcRecord

    response = WarcRecord()
    response.set_bytes_content(payload)
    response.is_http = True
    try:
        response.parse_http(auto_decode="all")
        if response.http_content_type not in _HTML:
            return None
        body = response.reader.read(_LARGEST_PAGE + 1)
    except OSError as error:
        raise _BadHttp from error
    if len(body) > _LARGEST_PAGE:
        raise _TooLarge
    return worker.images_of_html(body, response.http_charset, address)


def _parser(record: Any, worker: PageWorker) -> _Parser | None:
    """The parser of images in a record's payload; None if the record does not describe a page."""
    from fastwarc import WarcRecordType

    if record.record_type == WarcRecordType.metadata and "json" in record.headers.get("Content-Type", ""):
        return lambda payload, address: images_of_wat(payload)
    if record.record_type == WarcRecordType.response and record.is_http:
        return partial(_images_of_response, worker)
    return None


def _open(path: Path) -> IO[bytes]:
    """The archive's bytes, read with Python's gzip because FastWARC's own reader accepts truncated files."""
    with open_regular(path) as stream:
        is_gzip = stream.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if is_gzip else open(path, "rb")
