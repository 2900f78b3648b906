"""Fetch files over HTTP: downloads resume, and files are checked before they get their final name.

Partial data is in ``<name>.part`` beside the target; calling again resumes from there.
"""

import gzip
import hashlib
import http.client
import os
import re
import ssl
import time
import urllib.error
import urllib.request
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from email.message import Message
from pathlib import Path

from mc2_hpc import __version__
from mc2_hpc.errors import UserError
from mc2_hpc.metadata.languages import LANGUAGES, code_of_folder
from mc2_hpc.storage import fsync_file, fsync_folder

MIRROR = "https://dumps.wikimedia.org"

_BLOCK_BYTES = 1 << 20
_LONGEST_WAIT_S = 60.0
_DIGESTS = {32: "md5", 40: "sha1", 64: "sha256"}
"""Algorithm by the number of hex digits of a checksum."""
_PASSING = {408, 425, 429, 500, 502, 503, 504}
"""Statuses after which the same request may succeed later."""

Report = Callable[[int, int], None]
"""Called with the bytes received and the total bytes (0 if the server does not say)."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a download is retried."""

    attempts: int = 6
    """Consecutive failures, with no byte in between, after which the download is abandoned."""
    first_wait_s: float = 2.0
    """Wait after the first failure; doubled after each further one, up to a minute."""
    timeout_s: float = 60.0
    """How long the server may be silent before it counts as a failure."""


class _Broken(Exception):
    """The transfer failed in a way that may be temporary."""


def download(
    url: str,
    path: str | Path,
    *,
    checksum: str | None = None,
    patience: Patience | None = None,
    report: Report | None = None,
) -> None:
    """Fetch ``url`` to ``path``; a file that already exists is only checked.

    Args:
        checksum: MD5, SHA-1 or SHA-256 in hex, distinguished by its length.

    Raises:
        UserError: the server refuses or keeps failing (partial data is kept), or the file does not match the checksum
            (it is removed).
    """
    path, patience = Path(path), patience or Patience()
    if checksum is not None and len(checksum) not in _DIGESTS:
        raise UserError(f"checksum {checksum!r}: expected the hex digits of an MD5, SHA-1 or SHA-256")
    part = path.with_name(path.name + ".part")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        _fetch(url, part, patience, report)
        _check(part, url, checksum)
        fsync_file(part)
        os.replace(part, path)
        fsync_folder(path.parent)
    else:
        _check(path, url, checksum)


def fetch_dump(
    code: str,
    date: str,
    out: Path,
    *,
    mirror: str = MIRROR,
    patience: Patience | None = None,
    report: Report | None = None,
) -> Path:
    """Fetch a Wikipedia's ``pages-articles`` dump to ``out/<code>/``, checked against the dump's own SHA-1 list.

    Args:
        code: of the language table, or Wikipedia's subdomain.
        date: of the dump, ``YYYYMMDD``.

    Raises:
        UserError: no such language or date, or see :func:`download`.
    """
    code = code_of_folder(code)
    if code not in LANGUAGES:
        raise UserError(f"wiki {code!r}: not in the language table; use a code such as sw or zh_yue")
    if not re.fullmatch(r"\d{8}", date):
        raise UserError(f"date {date!r}: write YYYYMMDD, the day the dump was started")
    database = f"{LANGUAGES[code].wiki}wiki"
    name = f"{database}-{date}-pages-articles.xml.bz2"
    base = f"{mirror.rstrip('/')}/{database}/{date}"
    sums = out / code / f"{database}-{date}-sha1sums.txt"
    sums.unlink(missing_ok=True)  # from an earlier call, perhaps while the dump was still being made
    download(f"{base}/{sums.name}", sums, patience=patience)
    lines = (line.split() for line in sums.read_text(encoding="utf-8").splitlines())
    checksums = {fields[1]: fields[0] for fields in lines if len(fields) == 2}
    sums.unlink()
    if name not in checksums:
        raise UserError(f"{base}/{sums.name}: does not list {name}; that day's dump is not finished")
    download(f"{base}/{name}", out / code / name, checksum=checksums[name], patience=patience, report=report)
    return out / code / name


def pageview_names(spec: str) -> list[str]:
    """Names of the hourly files of ``YYYYMMDD-HH``, or of the 24 of ``YYYYMMDD``.

    Raises:
        UserError: ``spec`` has neither form.
    """
    match = re.fullmatch(r"(\d{8})(?:-([01]\d|2[0-3]))?", spec)
    if not match:
        raise UserError(f"page views {spec!r}: write YYYYMMDD-HH for an hour (UTC) or YYYYMMDD for a day")
    hours = [match[2]] if match[2] else [f"{hour:02}" for hour in range(24)]
    return [f"pageviews-{match[1]}-{hour}0000.gz" for hour in hours]


def fetch_pageviews(
    name: str, out: Path, *, mirror: str = MIRROR, patience: Patience | None = None, report: Report | None = None
) -> Path:
    """Fetch an hourly file of :func:`pageview_names` to ``out/pageviews/`` and check its gzip, as it has no checksum.

    Raises:
        UserError: see :func:`download`; or the file is not gzip (it is removed).
    """
    path = out / "pageviews" / name
    year, month = name[10:14], name[14:16]
    download(
        f"{mirror.rstrip('/')}/other/pageviews/{year}/{year}-{month}/{name}", path, patience=patience, report=report
    )
    try:
        with gzip.open(path, "rb") as stream:
            while stream.read(_BLOCK_BYTES):
                pass
    except (OSError, EOFError, zlib.error) as error:
        path.unlink()
        raise UserError(f"{name}: the server sent incomplete gzip ({error}); removed, fetch it again") from None
    return path


def _fetch(url: str, part: Path, patience: Patience, report: Report | None) -> None:
    """Fetch the rest of ``part``."""
    failures = 0
    while True:
        before = part.stat().st_size if part.exists() else 0
        try:
            _transfer(url, part, before, patience.timeout_s, report)
            return
        except _Broken as error:
            arrived = part.exists() and part.stat().st_size > before
            failures = 1 if arrived else failures + 1
            if failures >= patience.attempts:
                raise UserError(
                    f"{url}: failed {failures} times in a row ({error}); partial data is kept, run it again later"
                ) from None
            time.sleep(min(patience.first_wait_s * 2 ** (failures - 1), _LONGEST_WAIT_S))


def _transfer(url: str, part: Path, offset: int, timeout_s: float, report: Report | None) -> None:
    """One request: append the data after ``offset``, or start over if the server sends the whole file."""
    headers = {"User-Agent": f"mc2_hpc/{__version__}", "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=timeout_s) as answer:
            start, total = _extent(answer.status, answer.headers)
            if start not in (0, offset):
                raise _Broken(f"requested from byte {offset}, received from byte {start}")
            here = start
            with open(part, "r+b" if start else "wb") as file:
                file.seek(start)
                while block := answer.read(_BLOCK_BYTES):
                    file.write(block)
                    here += len(block)
                    if report:
                        report(here, total)
                file.truncate()
            if total and here != total:
                raise _Broken(f"the connection ended after {here} of {total} bytes")
    except urllib.error.HTTPError as error:
        if error.code == 416 and offset:  # no data after it: complete, or longer than the file
            if _extent_of_416(error.headers) == offset:
                return
            part.unlink()
            raise _Broken("the file on the server is shorter than the partial data; starting over") from None
        if error.code not in _PASSING:
            raise UserError(f"{url}: the server returned {error.code} {error.reason}") from None
        raise _Broken(f"{error.code} {error.reason}") from None
    except (urllib.error.URLError, http.client.HTTPException, ssl.SSLError, ConnectionError, TimeoutError) as error:
        raise _Broken(str(getattr(error, "reason", error)) or type(error).__name__) from None
    except ValueError as error:
        raise UserError(f"{url}: not a valid address ({error})") from None


def _extent(status: int, headers: Message) -> tuple[int, int]:
    """(first byte sent, total bytes or 0 if unknown) of a successful response."""
    if status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", ""))
        if not match:
            raise _Broken(f"unclear Content-Range {headers.get('Content-Range')!r}")
        return int(match[1]), 0 if match[2] == "*" else int(match[2])
    return 0, int(headers.get("Content-Length") or 0)


def _extent_of_416(headers: Message) -> int:
    match = re.fullmatch(r"bytes \*/(\d+)", headers.get("Content-Range", ""))
    return int(match[1]) if match else -1


def _check(path: Path, url: str, checksum: str | None) -> None:
    if checksum is None:
        return
    algorithm = _DIGESTS[len(checksum)]
    with open(path, "rb") as stream:
        found = hashlib.file_digest(stream, algorithm).hexdigest()
    if found != checksum.lower():
        path.unlink()
        raise UserError(
            f"{path}: its {algorithm.upper()} is {found}, not {checksum.lower()}, so it is not the file at {url}; "
            "removed, fetch it again"
        )
