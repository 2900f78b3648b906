"""Titles ranked by page views, from Wikimedia's hourly ``pageviews-<date>-<hour>0000.gz``.

A line is ``<domain> <title> <views> <bytes>``. For the Wikipedia ``sw``, the domains ``sw`` and ``sw.m`` (mobile) are
counted; ``sw.b``, ``sw.d`` and the like are other projects, whose titles the release mistook for Wikipedia's.
"""

import gzip
import re
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from urllib.parse import unquote

from mc2_hpc.errors import UserError
from mc2_hpc.metadata.languages import LANGUAGES
from mc2_hpc.metadata.workers import Workers
from mc2_hpc.reading.files import check_regular
from mc2_hpc.terminal import Report

MIN_HOURLY_VIEWS = 50
"""From the recipe: a title counts in the hours in which it is viewed at least this often."""

_BLOCK_BYTES = 1 << 24


def count_views(
    paths: Collection[Path],
    codes: Collection[str],
    *,
    min_views: int = MIN_HOURLY_VIEWS,
    workers: Workers,
    progress: Report | None = None,
) -> dict[str, Counter[str]]:
    """Views of the titles of each Wikipedia of ``codes``, summed over the files.

    An hour's views of a title on one domain count if they are at least ``min_views``. Percent-encoded titles are
    decoded, ``_`` becomes a space; titles with ``:`` (namespaces) or without text ("-") are left out.

    Raises:
        UserError: a file cannot be read, or none of its lines has the format.
    """
    domains = {LANGUAGES[code].domain.encode() if code in LANGUAGES else code.encode(): code for code in codes}
    total: dict[str, Counter[str]] = {code: Counter() for code in codes}
    files = sorted(paths)
    counted = workers.map(partial(_count_file, domains=domains, min_views=min_views), files)
    for done, (path, views) in enumerate(zip(files, counted, strict=True), start=1):
        for code, titles in views.items():
            total[code].update(titles)
        if progress:
            progress("page views", done, len(files), path.name)
    return total


def rank_titles(views: Mapping[str, int], min_views: int = 0) -> list[str]:
    """Titles with at least ``min_views`` in total, most viewed first; equal views in code-point order."""
    return [title for _, title in sorted((-count, title) for title, count in views.items() if count >= min_views)]


def _count_file(path: Path, domains: Mapping[bytes, str], min_views: int) -> dict[str, dict[str, int]]:
    digits = len(str(min_views))  # the pattern itself skips most lines, whose views have fewer digits
    pattern = re.compile(rb"^([a-z-]+)(?:\.m)? (\S+) (\d{%d,}) \d+\r?$" % digits, re.MULTILINE)
    views: dict[str, dict[str, int]] = {}
    for block in _blocks(path):
        for domain, raw, count in pattern.findall(block):
            code = domains.get(domain)
            if code is not None and int(count) >= min_views and (title := _title(raw)):
                titles = views.setdefault(code, {})
                titles[title] = titles.get(title, 0) + int(count)
    return views


def _title(raw: bytes) -> str | None:
    """The title as a reader sees it, or None if it is not an article's."""
    try:
        title = raw.decode()
        title = unquote(title, errors="strict") if "%" in title else title
    except UnicodeDecodeError:
        return None
    title = title.replace("_", " ").strip()
    return None if ":" in title or title in ("", "-") or "\n" in title else title


def _blocks(path: Path) -> Iterator[bytes]:
    """The file in blocks of complete lines."""
    line = re.compile(rb"^\S+ \S+ \d+ \d+\r?$", re.MULTILINE)
    known, rest = False, b""
    check_regular(path)
    try:
        with gzip.open(path, "rb") as stream:
            while block := stream.read(_BLOCK_BYTES):
                rest += block
                whole, _, rest = rest.rpartition(b"\n")
                known = known or line.search(whole) is not None
                yield whole
            known = known or line.search(rest) is not None
            yield rest
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read ({error}); fetch it again") from None
    if not known:
        raise UserError(f"{path}: no line has the form `<domain> <title> <views> <bytes>`; is it an hourly file?")
