"""Common Crawl's archives to caption pools: a shard of images and alt texts for each WAT or WARC file.

WAT files hold the links of every page as JSON, WARC files the pages themselves; both give the same rows, WAT at a
fraction of the bytes. A row is an image address of a page with its alt text: ``key`` (of the canonical address, see
:mod:`mc2_hpc.curation.pool.urls`), ``text`` and ``source`` (the absolute address).
"""

import gzip
import hashlib
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, cast

import pyarrow as pa
import pyarrow.parquet as pq

from mc2_hpc.curation.pool.page_images import PageImages, images_of_wat
from mc2_hpc.curation.pool.page_worker import HeavyPage, PageWorker
from mc2_hpc.curation.pool.urls import UnusableUrl, absolute_url, image_key
from mc2_hpc.errors import UserError
from mc2_hpc.jobs.engines import Engine
from mc2_hpc.jobs.stages import Progress, Stage, open_stage, run_stages, stats_path, sum_stats
from mc2_hpc.storage import atomic_path, write_json

SETTINGS = "extract.json"
_SETTINGS = {"key": "96 bits of SHA-224 of the canonical URL", "rules": 1}
_SUFFIXES = (".wat", ".warc", ".wat.gz", ".warc.gz")
_LARGEST_RECORD = 64 << 20
_LARGEST_PAGE = 16 << 20
"""Of HTML, unpacked; Common Crawl cuts pages off at 5 MiB."""
_ROWS_AT_ONCE = 1 << 16
_SCHEMA = pa.schema({"key": pa.string(), "text": pa.string(), "source": pa.string()})
_Parser = Callable[[bytes, str], PageImages | None]
_HTML = ("text/html", "application/xhtml+xml")


def extract(
    archives: Sequence[str | Path],
    out: str | Path,
    *,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> dict[str, Any] | None:
    """Write ``<archive>.parquet`` and ``stats/<archive>.json`` for every WAT or WARC file.

    Archives already finished are skipped. Memory: one record, and 16 bytes for each distinct row of the archive.

    Args:
        archives: files, or folders that are searched for ``*.wat``, ``*.warc`` and their ``.gz``, at any depth.
        engine: where it runs; this process by default.

    Returns:
        counters over all archives: ``records`` (of any type), ``pages`` (with at least one image), ``images`` (in
        them), ``rows``, and ``drops`` by reason. Of records: ``giant_record`` (above 64 MiB), ``bad_json``,
        ``invalid_utf8``, ``bad_http``, ``too_large`` (HTML that unpacks to more than 16 MiB), ``heavy_page`` (HTML
        that takes more than 10 s or 1 GiB to parse). Of images: ``empty_text``, ``no_url``, ``not_http``, ``bad_url``,
        ``invalid_utf8`` and ``duplicate_text`` (the same address and text again). None where the work was only
        submitted to Slurm.

    Raises:
        UserError: nothing to read, two archives of one name, or archives that are damaged or cut short (every other
            one is done). A file cut exactly between two records cannot be told from a whole one.
    """
    stage = plan_extract(archives, out)
    if not run_stages([stage], engine, progress):
        return None
    return sum_stats(stage.folder, list(stage.shards))


def plan_extract(archives: Sequence[str | Path], out: str | Path) -> Stage:
    """The stage of :func:`extract`, its arguments checked and its settings written."""
    out = Path(out)
    if find_spec("fastwarc") is None or find_spec("resiliparse") is None:
        raise UserError("reading WAT and WARC files needs resiliparse and FastWARC: pip install resiliparse")
    shards = list_archives(archives)
    open_stage(out, SETTINGS, _SETTINGS, list(shards))
    return Stage("extract", out, shards, _ExtractArchive(out), partial(_is_extracted, out), unit="archives")


def list_archives(specs: Sequence[str | Path]) -> dict[str, Path]:
    """Archives by the name of their shard (what comes before ``.warc`` or ``.wat``), sorted.

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
                raise UserError(f"{path} and {found[name]} have one name; extract them into two folders")
            found[name] = path
    return dict(sorted(found.items()))


def _is_extracted(out: Path, name: str) -> bool:
    """Whether all outputs of the archive are there."""
    return stats_path(out, name).is_file() and (out / f"{name}.parquet").is_file()


@dataclass(frozen=True)
class _ExtractArchive:
    """Extracts one archive; picklable."""

    out: Path

    def __call__(self, name: str, path: Path) -> None:
        reader = _ArchiveReader(path)
        with (
            atomic_path(self.out / f"{name}.parquet") as temporary,
            pq.ParquetWriter(temporary, _SCHEMA, compression="zstd") as writer,
        ):
            rows: list[tuple[str, str, str]] = []
            for row in reader.rows():
                rows.append(row)
                if len(rows) == _ROWS_AT_ONCE:
                    _write(writer, rows)
            _write(writer, rows)
        write_json(stats_path(self.out, name), {**reader.counts, "drops": dict(reader.drops)})


def _write(writer: pq.ParquetWriter, rows: list[tuple[str, str, str]]) -> None:
    """Write the rows as a row group and empty the list."""
    columns = zip(*rows, strict=True) if rows else ((), (), ())
    writer.write_table(pa.table([pa.array(column, pa.string()) for column in columns], _SCHEMA))
    rows.clear()


class _ArchiveReader:
    """Rows of one archive, counting what it reads and what it drops."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.counts = {"records": 0, "pages": 0, "images": 0, "rows": 0}
        self.drops: Counter[str] = Counter()
        self._seen: set[bytes] = set()
        self._worker = PageWorker()

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Key, text and source of each usable image, in the archive's order.

        Raises:
            UserError: the archive is damaged, cut short, or none.
        """
        try:
            with _open(self.path) as stream, self._worker:
                for page in self._pages(stream):
                    yield from self._rows_of(page)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(
                f"{self.path}: damaged or cut short after record {self.counts['records']} ({_brief(error)}); "
                "fetch it again or remove it"
            ) from None
        if self.counts["records"] == 0:
            raise UserError(f"{self.path}: holds no WARC records; fetch it again or remove it")

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
                raise EOFError("its last record is not whole")
            self.counts["records"] += 1
            if parse and size > _LARGEST_RECORD:
                self.drops["giant_record"] += 1
            elif parse:
                page = self._try(parse, payload, record.headers.get("WARC-Target-URI") or "")
                if page is not None and page.images:
                    self.counts["pages"] += 1
                    yield page

    def _try(self, parse: _Parser, payload: bytes, address: str) -> PageImages | None:
        try:
            return parse(payload, address)
        except UnicodeDecodeError:
            self.drops["invalid_utf8"] += 1
        except (ValueError, RecursionError):
            self.drops["bad_json"] += 1
        except _BadHttp:
            self.drops["bad_http"] += 1
        except _TooLarge:
            self.drops["too_large"] += 1
        except HeavyPage:
            self.drops["heavy_page"] += 1
        return None

    def _rows_of(self, page: PageImages) -> Iterator[tuple[str, str, str]]:
        self.counts["images"] += len(page.images)
        for source, alt in page.images:
            text = " ".join(alt.split())
            if not text:
                self.drops["empty_text"] += 1
                continue
            try:
                url = absolute_url(source, page.base)
                digest = hashlib.blake2b(f"{url}\n{text}".encode(), digest_size=16).digest()
            except UnusableUrl as reason:
                self.drops[str(reason)] += 1
            except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
                self.drops["invalid_utf8"] += 1
            else:
                if digest in self._seen:
                    self.drops["duplicate_text"] += 1
                else:
                    self._seen.add(digest)
                    self.counts["rows"] += 1
                    yield image_key(url), text, url


class _BadHttp(Exception):
    """A response that breaks HTTP's rules."""


class _TooLarge(Exception):
    """A page that unpacks to more than :data:`_LARGEST_PAGE`."""


def _images_of_response(worker: PageWorker, payload: bytes, address: str) -> PageImages | None:
    """Images of an HTTP response, None where it is no HTML."""
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
    """What finds the images in a record's payload; None for a record that describes no page."""
    from fastwarc import WarcRecordType

    if record.record_type == WarcRecordType.metadata and "json" in record.headers.get("Content-Type", ""):
        return lambda payload, address: images_of_wat(payload)
    if record.record_type == WarcRecordType.response and record.is_http:
        return partial(_images_of_response, worker)
    return None


def _open(path: Path) -> IO[bytes]:
    """The archive's bytes; by Python's gzip reader, because FastWARC's own takes a file that is cut off for whole."""
    with open(path, "rb") as stream:
        is_gzip = stream.read(2) == b"\x1f\x8b"
    return cast(IO[bytes], gzip.open(path)) if is_gzip else open(path, "rb")


def _brief(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:80] if str(error).strip() else type(error).__name__
