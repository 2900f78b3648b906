"""Reading Common Crawl: rows, addresses and keys; broken input is counted or named."""

import functools
import gzip
import hashlib
import json
import resource
import zlib
from functools import partial

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mc2_hpc import jobs
from mc2_hpc.curation import extract as stages
from mc2_hpc.curation.extract import plan_extract
from mc2_hpc.curation.pool import common_crawl
from mc2_hpc.curation.pool.captions import iter_captions, list_pool
from mc2_hpc.curation.pool.common_crawl import list_archives
from mc2_hpc.curation.pool.page_images import images_of_html, images_of_wat
from mc2_hpc.curation.pool.page_worker import PageWorker
from mc2_hpc.curation.pool.urls import absolute_url, canonical_url, image_key
from mc2_hpc.drops import Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.jobs import Local

pytest.importorskip("fastwarc", reason="FastWARC is not installed")

compress = functools.partial(gzip.compress, mtime=0)  # no timestamps in test ids
HTTP = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n"


def record(kind, content_type, payload, address="http://site.com/dir/page.html"):
    header = f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: {address}\r\nContent-Type: {content_type}\r\n"
    return f"{header}Content-Length: {len(payload)}\r\n\r\n".encode() + payload + b"\r\n\r\n"


def wat(links, address="http://site.com/dir/page.html", base=None):
    """A WAT record as written by Common Crawl."""
    head = {"Title": "t"} | ({"Base": base} if base else {})
    page = {"HTML-Metadata": {"Head": head, "Links": links}}
    envelope = {
        "WARC-Header-Metadata": {"WARC-Target-URI": address},
        "Payload-Metadata": {"HTTP-Response-Metadata": page},
    }
    return record("metadata", "application/json", json.dumps({"Envelope": envelope}).encode(), address)


def img(url, alt=None):
    return {"path": "IMG@/src", "url": url} | ({} if alt is None else {"alt": alt})


def response(html, http=HTTP):
    return record("response", "application/http; msgtype=response", http + html)


def archive(folder, name, records, compress=gzip.compress):
    """A file with one gzip member per record, like Common Crawl's."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(b"".join(map(compress, records)))
    return path


def rows_of(out, name):
    return [tuple(row.values()) for row in pq.read_table(out / f"{name}.parquet").to_pylist()]


IMAGES = [
    img("cat.jpg", "a cat &amp;\n a  dog"),
    img("/top.png?utm_source=x", "on top"),
    img("//cdn.com/p.webp#frag", "from a CDN"),
    {"path": "A@/href", "url": "x.jpg", "text": "a link"},
    img("https://Other.COM:443/A%c3%a9.jpg", "emphasis"),
    img("data:image/gif;base64,R0lGOD", "inline"),
    img("cat.jpg", "a cat & a dog"),
    img("cat.jpg", "another text"),
    img("cat.jpg", " \n&nbsp;"),
    img("no-alt.jpg"),
    img("", "no address"),
    img("http://[bad/", "bad address"),
    img("half.jpg", "half of a pair \ud83d"),
]
HTML = (
    "<img src='cat.jpg' alt='a cat &amp;\n a  dog'><IMG SRC='/top.png?utm_source=x' ALT='on top'>"
    "<img src='//cdn.com/p.webp#frag' alt='from a CDN'><a href=x.jpg>a link</a>"
    "<img src='https://Other.COM:443/A%c3%a9.jpg' alt=emphasis><img src='data:image/gif;base64,R0lGOD' alt=inline>"
    "<noscript><img src='cat.jpg' alt='a cat & a dog'></noscript><p><img src='cat.jpg' alt='another text'>"
    "<img src='cat.jpg' alt=' \n&nbsp;'><img src=no-alt.jpg><img src='' alt='no address'>"
    "<img src='http://[bad/' alt='bad address'>"
)
ROWS = [
    ("a cat & a dog", "http://site.com/dir/cat.jpg"),
    ("on top", "http://site.com/top.png?utm_source=x"),
    ("from a CDN", "http://cdn.com/p.webp"),
    ("emphasis", "https://other.com/A%C3%A9.jpg"),
    ("another text", "http://site.com/dir/cat.jpg"),
]
DROPS = {"url_not_http": 1, "caption_repeated": 1, "caption_empty": 2, "url_missing": 1, "url_invalid": 1}


def test_wat_and_warc_give_the_same_rows(tmp_path):
    other = record("metadata", "application/warc-fields", b"fetchTimeMs: 12\r\n")
    archive(tmp_path / "in", "A-00000.warc.wat.gz", [record("warcinfo", "application/warc-fields", b""), wat(IMAGES)])
    archive(tmp_path / "in" / "deeper", "B-00001.warc.gz", [response(HTML.encode()), other])
    result = jobs.run(plan_extract([tmp_path / "in"], tmp_path / "out"))
    expected = [(image_key(url), text, url) for text, url in ROWS]
    assert rows_of(tmp_path / "out", "A-00000") == rows_of(tmp_path / "out", "B-00001") == expected
    drops = {reason: 2 * count for reason, count in DROPS.items()} | {"caption_not_utf8": 1}
    assert result == {"records": 4, "pages": 2, "images": 23, "rows": 10, "drops": drops}


def test_output_is_a_caption_pool(tmp_path):
    archive(tmp_path / "in", "a.warc.wat.gz", [wat(IMAGES)])
    jobs.run(plan_extract([tmp_path / "in"], tmp_path / "out"))
    (shard,) = list_pool(tmp_path / "out")
    rows, drops = next(iter_captions(shard))
    assert rows["text"].to_pylist() == [text for text, _ in ROWS] and not drops


def test_nothing_is_lost_over_all_rows(tmp_path):
    """Images in pages = rows + dropped images, over several pages and row groups."""
    pages = [wat(IMAGES, f"http://site{number}.com/") for number in range(50)]
    archive(tmp_path / "in", "a.warc.wat.gz", pages)
    result = jobs.run(plan_extract([tmp_path / "in"], tmp_path / "out"))
    assert result["images"] == result["rows"] + sum(result["drops"].values()) == 50 * 12


@pytest.mark.parametrize("rows_at_once", [1, 2, 100])
def test_rows_are_the_same_however_many_are_written_at_once(tmp_path, monkeypatch, rows_at_once):
    monkeypatch.setattr(stages, "_ROWS_AT_ONCE", rows_at_once)
    archive(tmp_path / "in", "a.warc.wat.gz", [wat(IMAGES)])
    jobs.run(plan_extract([tmp_path / "in"], tmp_path / "out"))
    assert [row[1:] for row in rows_of(tmp_path / "out", "a")] == ROWS


@pytest.mark.parametrize(
    "base, expected",
    [
        (None, "http://site.com/dir/x.jpg"),
        ("/b/", "http://site.com/b/x.jpg"),
        ("https://cdn.com/c/index.html", "https://cdn.com/c/x.jpg"),
        ("http://[broken", "http://site.com/dir/x.jpg"),
    ],
)
def test_base_href(base, expected):
    page = images_of_wat(wat([img("x.jpg", "x")], base=base).partition(b"\r\n\r\n")[2])
    assert absolute_url(page.images[0][0], page.base) == expected
    tag = f"<head><base target=_blank><base href='{base}'></head>" if base else ""
    page = images_of_html(f"{tag}<img src=x.jpg>".encode(), None, "http://site.com/dir/page.html")
    assert absolute_url(page.images[0][0], page.base) == expected


def test_lazy_images():
    html = b"<img data-src=a.jpg><img src=data:x data-src=b.jpg><img src=c.jpg data-src=d.jpg><img src=' '><img>"
    assert [source for source, _ in images_of_html(html, None, "").images] == ["a.jpg", "b.jpg", "c.jpg", " ", ""]


@pytest.mark.parametrize("charset", ["windows-1251", '"CP1251"', None, "nonsense"])
def test_charset_of_http_or_else_of_the_page(charset):
    html = "<meta charset=windows-1251><img src=a alt='Привет, мир'>".encode("cp1251")
    assert images_of_html(html, charset, "").images == [("a", "Привет, мир")]


@pytest.mark.parametrize(
    "payload",
    [b"[]", b"1", b'{"Envelope": []}', b'{"Envelope": {"Payload-Metadata": null}}', b"{}"],
)
def test_json_of_another_form_has_no_images(payload):
    assert images_of_wat(payload).images == []


def test_links_of_another_form():
    links = [None, {"path": "IMG@/src"}, {"path": "IMG@/src", "url": 1, "alt": []}, "IMG@/src"]
    assert images_of_wat(wat(links).partition(b"\r\n\r\n")[2]).images == [("", ""), ("", "")]
    assert images_of_wat(wat(7).partition(b"\r\n\r\n")[2]).images == []


def test_broken_records_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(common_crawl, "_LARGEST_RECORD", 10_000)
    good = wat([img("a.jpg", "good")])
    gzipped = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Encoding: gzip\r\n\r\n"
    records = [
        record("metadata", "application/json", b"{"),
        record("metadata", "application/json", b"[" * 9_000),
        record("metadata", "application/json", b'{"Envelope": "\xff"}'),
        record("metadata", "application/json", b" " * 10_001),
        response(b"<img src=b.jpg alt='compressed'>" * 2, gzipped),
        response(gzip.compress(b"<img src=b.jpg alt='compressed'>"), gzipped),
        response(b"<img src=x alt='no page'>", b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n"),
        response(b"<img src=x alt='no page'>", b""),
        good,
    ]
    archive(tmp_path / "in", "a.warc.gz", records)
    result = jobs.run(plan_extract([tmp_path / "in"], tmp_path / "out"))
    assert [row[1] for row in rows_of(tmp_path / "out", "a")] == ["compressed", "good"]
    drops = {"caption_not_json": 2, "caption_not_utf8": 1, "record_too_large": 1, "record_not_http": 1}
    assert result["drops"] == drops
    assert result["records"] == len(records)


def test_long_captions_and_addresses_pass(tmp_path):
    text, url = "word " * 200_000 + "end", "http://a.com/" + "x" * 100_000
    archive(tmp_path / "in", "a.warc.wat.gz", [wat([img(url, text)])])
    jobs.run(plan_extract([tmp_path / "in"], tmp_path / "out"))
    assert rows_of(tmp_path / "out", "a")[0][1:] == (text, url)


RECORDS = [wat([img(f"{number}.jpg", "text")]) for number in range(4)]
WHOLE = b"".join(map(compress, RECORDS))


@pytest.mark.parametrize("cut", [-1, -5, -100, len(compress(RECORDS[0])) + 5])
def test_archive_that_is_cut_off_is_named(tmp_path, cut):
    check_damage(tmp_path, WHOLE[:cut])


@pytest.mark.parametrize("position", [3, 200, len(WHOLE) // 2, len(WHOLE) - 6])
def test_archive_with_a_wrong_byte_is_named(tmp_path, position):
    damaged = bytearray(WHOLE)
    damaged[position if position != 3 else 2] ^= 0xFF
    check_damage(tmp_path, bytes(damaged))


@pytest.mark.parametrize(
    "content",
    [
        b"".join(RECORDS)[:-60],
        RECORDS[0] + b"rubbish\r\n\r\n" + RECORDS[1],
        compress(RECORDS[0]) + b"rubbish",
        compress(RECORDS[0].replace(b"Content-Length: 2", b"Content-Length: 9")),
        b"<html>not an archive</html>",
    ],
)
def test_archive_with_broken_records_is_named(tmp_path, content):
    check_damage(tmp_path, content)


def check_damage(tmp_path, content):
    """The broken archive is named and leaves nothing behind; the others finish, and a rerun continues after a fix."""
    folder = tmp_path / "in"
    for name in ("a.warc.wat.gz", "c.warc.wat.gz"):
        archive(folder, name, RECORDS)
    (folder / "b.warc.wat.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"1 of 3 .*b\.warc\.wat\.gz: damaged or truncated after record \d"):
        jobs.run(plan_extract([folder], tmp_path / "out"))
    assert sorted(path.name for path in (tmp_path / "out").glob("*.parquet")) == ["a.parquet", "c.parquet"]
    (folder / "b.warc.wat.gz").write_bytes(WHOLE)
    assert jobs.run(plan_extract([folder], tmp_path / "out"))["rows"] == 12


@pytest.mark.parametrize("content", [b"", compress(b"")])
def test_archive_without_records_is_named(tmp_path, content):
    (tmp_path / "a.warc.wat.gz").write_bytes(content)
    with pytest.raises(UserError, match=r"a\.warc\.wat\.gz: contains no WARC records"):
        jobs.run(plan_extract([tmp_path / "a.warc.wat.gz"], tmp_path / "out"))


def test_workers_and_plain_files_change_nothing(tmp_path):
    for number in range(3):
        archive(tmp_path / "in", f"{number}.warc.wat.gz", [wat(IMAGES, f"http://site{number}.com/")])
        archive(tmp_path / "plain", f"{number}.warc.wat", [wat(IMAGES, f"http://site{number}.com/")], bytes)
    results = [
        jobs.run(plan_extract([tmp_path / "in"], tmp_path / "one")),
        jobs.run(plan_extract([tmp_path / "in"], tmp_path / "two"), Local(2)),
        jobs.run(plan_extract([tmp_path / "plain"], tmp_path / "plain-out")),
    ]
    assert results[0] == results[1] == results[2]
    for number in range(3):
        contents = {(tmp_path / out / f"{number}.parquet").read_bytes() for out in ("one", "two", "plain-out")}
        assert len(contents) == 1


def test_what_is_listed(tmp_path):
    for name in ("b.warc.wat.gz", "a.wat", "x.txt", "c.warc.gz", "d.warc.wet.gz"):
        archive(tmp_path / "in", name, [])
    assert list(list_archives([tmp_path / "in"])) == ["a", "b", "c"]
    assert list(list_archives([tmp_path / "in", tmp_path / "in" / "a.wat"])) == ["a", "b", "c"]
    archive(tmp_path / "in" / "more", "b.warc.gz", [])
    with pytest.raises(UserError, match="b.warc.gz and .*b.warc.wat.gz have the same name"):
        list_archives([tmp_path / "in"])
    with pytest.raises(UserError, match="none: no such file or folder"):
        list_archives([tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty: no \*.wat, \*.warc, \*.wat.gz, \*.warc.gz in this folder"):
        list_archives([tmp_path / "empty"])


def test_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install resiliparse"):
        jobs.run(plan_extract([tmp_path], tmp_path / "out"))


@pytest.mark.parametrize(
    "source, expected",
    [
        ("http://A.com", "http://a.com/"),
        (" http://a.com:80/x \n", "http://a.com/x"),
        ("https://a.com:8443/x", "https://a.com:8443/x"),
        ("../up.jpg", "http://page.com/up.jpg"),
        ("?v=1", "http://page.com/dir/?v=1"),
        ("a b.jpg?q=c d", "http://page.com/dir/a%20b.jpg?q=c%20d"),
        ("é.jpg", "http://page.com/dir/%C3%A9.jpg"),
        ("%C3%a9%2f.jpg", "http://page.com/dir/%C3%A9%2F.jpg"),
        ("100%.jpg", "http://page.com/dir/100%.jpg"),
        ("http://bücher.de/x", "http://xn--bcher-kva.de/x"),
        ("http://[::1]:80/x", "http://[::1]/x"),
        ("HTTP://a.com/x", "http://a.com/x"),
    ],
)
def test_absolute_url(source, expected):
    assert absolute_url(source, "http://page.com/dir/") == expected


@pytest.mark.parametrize(
    "source, reason",
    [
        ("", "url_missing"),
        (" \t", "url_missing"),
        ("data:image/png;base64,AAAA", "url_not_http"),
        ("blob:http://a.com/x", "url_not_http"),
        ("file:///etc/passwd", "url_not_http"),
        ("http:///x", "url_invalid"),
        ("http://a b/x", "url_invalid"),
        ("http://a.com:port/x", "url_invalid"),
        ("http://a.com:99999/x", "url_invalid"),
        ("http://user:secret@a.com/x", "url_invalid"),
        ("http://" + "ü" * 80 + ".com/", "url_invalid"),
        ("x\ud800.jpg", "url_invalid"),
    ],
)
def test_unusable_url(source, reason):
    with pytest.raises(Dropped, match=f"^{reason}$"):
        absolute_url(source, "http://page.com/")


@pytest.mark.parametrize(
    "url, expected",
    [
        ("http://a.com/x.jpg", "https://a.com/x.jpg"),
        ("https://a.com/x.jpg?w=300&h=200&q=80&v=7", "https://a.com/x.jpg"),
        ("https://a.com/x.JPG?W=300&id=5&utm_source=b", "https://a.com/x.JPG?id=5"),
        ("https://a.com/image.php?v=7&w=300&fbclid=x", "https://a.com/image.php?v=7&w=300"),
        ("https://a.com/image.php?b=1&a=2", "https://a.com/image.php?b=1&a=2"),
        ("https://a.com/x?&utm_medium=y&", "https://a.com/x"),
        ("https://a.com/jpg?w=1", "https://a.com/jpg?w=1"),
    ],
)
def test_canonical_url(url, expected):
    assert canonical_url(url) == expected
    assert image_key(url) == hashlib.sha224(expected.encode()).hexdigest()[:24]


@given(st.text(max_size=60), st.sampled_from(["http://page.com/dir/", "https://x.y/?z", "", "nonsense"]))
def test_addresses_stay_as_they_are_made(source, base):
    """Absolute addresses are ASCII and do not change when read again; nor do canonical ones."""
    try:
        url = absolute_url(source, base)
    except Dropped:
        return
    assert url.isascii() and " " not in url and absolute_url(url, base) == url
    assert canonical_url(canonical_url(url)) == canonical_url(url)


def _packed(kind, body):
    return response(body, HTTP.replace(b"\r\n\r\n", b"\r\nContent-Encoding: " + kind + b"\r\n\r\n"))


@pytest.mark.parametrize("kind, pack", [(b"gzip", lambda data: gzip.compress(data, 1)), (b"deflate", zlib.compress)])
def test_a_page_unpacks_to_so_much_at_most(tmp_path, kind, pack):
    good = b"<img src=a.jpg alt=one>"
    pages = [_packed(kind, pack(good)), _packed(kind, pack(good + bytes(200 << 20))), _packed(kind, pack(b"x")[:-3])]
    archive(tmp_path / "in", "a.warc.gz", [*pages, response(b"<img src=b.jpg alt=two>")])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = jobs.run(plan_extract([tmp_path / "in"], tmp_path / "out"))
    assert result["drops"]["record_too_large"] == 1
    assert [row[1] for row in rows_of(tmp_path / "out", "a")] == ["one", "two"]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 << 10  # KiB


def test_a_page_that_costs_too_much_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(common_crawl, "PageWorker", partial(PageWorker, cpu_s=0.3))
    attributes = b" ".join(b"a%d=1" % number for number in range(100_000))
    unclosed = b"".join(b"<b id=%d>" % number for number in range(30_000)) + b"<p>x" * 30_000
    reopened = b"<p>" + b"".join(b"<b id=%d>" % number for number in range(2000)) + b"<p>x" * 1_000_000
    good = response(b"<img src=a.jpg alt=one>")
    pages = [response(html) for html in (b"<img " + attributes + b">", unclosed, reopened)]
    archive(tmp_path / "in", "a.warc.gz", [pages[0], good, *pages[1:], response(b"<img src=b.jpg alt=two>")])
    result = jobs.run(plan_extract([tmp_path / "in"], tmp_path / "out"))
    assert result["drops"] == {"page_too_heavy": 3}
    assert [row[1] for row in rows_of(tmp_path / "out", "a")] == ["one", "two"]
