"""Downloads from a local server that drops connections, lacks ranges, sends wrong data, or refuses."""

import bz2
import gzip
import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mc2_hpc.cli import main
from mc2_hpc.errors import UserError
from mc2_hpc.metadata.download import Patience, download, fetch_dump, fetch_pageviews, pageview_names

CONTENT = bytes(range(256)) * 4000
SHA1 = hashlib.sha1(CONTENT).hexdigest()
QUICK = Patience(attempts=3, first_wait_s=0.01, timeout_s=20)


class Server(ThreadingHTTPServer):
    """Serves ``files``; closes the connection after ``drop_after`` bytes while ``drops`` are left."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.ranges, self.drops, self.drop_after, self.statuses = True, 0, 300_000, []
        self.requests: list[tuple[str, str | None]] = []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append((self.path, wanted))
        content = server.files.get(self.path)
        if server.statuses or content is None:
            self.send_error(server.statuses.pop(0) if server.statuses else 404)
            return
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and server.ranges else 0
        if start >= len(content) > 0:
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if server.drops:
            server.drops -= 1
            self.wfile.write(content[start : start + server.drop_after])
            self.close_connection = True
        else:
            self.wfile.write(content[start:])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        server.files["/f"] = CONTENT
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join(timeout=30)


def test_whole_file_and_its_checksums(server, tmp_path):
    seen = []
    for name in ("md5", "sha1", "sha256"):
        checksum = hashlib.new(name, CONTENT).hexdigest()
        download(f"{server.url}/f", tmp_path / name / "f", checksum=checksum.upper(), patience=QUICK)
    download(f"{server.url}/f", tmp_path / "f", patience=QUICK, report=lambda here, total: seen.append((here, total)))
    assert (tmp_path / "f").read_bytes() == CONTENT and not (tmp_path / "f.part").exists()
    assert seen[-1] == (len(CONTENT), len(CONTENT))


def test_a_file_that_is_there_is_only_checked(server, tmp_path):
    (tmp_path / "f").write_bytes(CONTENT)
    download(f"{server.url}/f", tmp_path / "f", checksum=SHA1)
    assert server.requests == []
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(UserError, match="its SHA1 is .*removed, fetch it again"):
        download(f"{server.url}/f", tmp_path / "f", checksum=SHA1)


def test_dropped_connections_are_continued(server, tmp_path):
    server.drops = 3
    download(f"{server.url}/f", tmp_path / "f", checksum=SHA1, patience=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.requests] == [None, "bytes=300000-", "bytes=600000-", "bytes=900000-"]


def test_a_later_call_goes_on_from_what_has_arrived(server, tmp_path):
    (tmp_path / "f.part").write_bytes(CONTENT[:1000])
    download(f"{server.url}/f", tmp_path / "f", checksum=SHA1, patience=QUICK)
    assert server.requests == [("/f", "bytes=1000-")] and (tmp_path / "f").read_bytes() == CONTENT


def test_a_part_that_is_whole_already(server, tmp_path):
    (tmp_path / "f.part").write_bytes(CONTENT)
    download(f"{server.url}/f", tmp_path / "f", checksum=SHA1, patience=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_part_that_is_too_long_is_begun_anew(server, tmp_path):
    (tmp_path / "f.part").write_bytes(CONTENT + b"x")
    download(f"{server.url}/f", tmp_path / "f", checksum=SHA1, patience=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_server_without_ranges_sends_the_whole(server, tmp_path):
    server.ranges = False
    (tmp_path / "f.part").write_bytes(b"other" * 1000)
    download(f"{server.url}/f", tmp_path / "f", checksum=SHA1, patience=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_wrong_file_gets_no_name(server, tmp_path):
    server.files["/f"] = CONTENT[:-1] + b"!"
    with pytest.raises(UserError, match=f"its SHA1 is .*, not {SHA1}, so it is not the file at"):
        download(f"{server.url}/f", tmp_path / "f", checksum=SHA1, patience=QUICK)
    assert list(tmp_path.iterdir()) == []


def test_passing_failures_are_waited_out(server, tmp_path):
    server.statuses = [503, 429]
    download(f"{server.url}/f", tmp_path / "f", patience=QUICK)
    assert (tmp_path / "f").read_bytes() == CONTENT


def test_a_server_that_keeps_failing_is_given_up_and_the_part_kept(server, tmp_path):
    server.drops, server.drop_after = 99, 0
    (tmp_path / "f.part").write_bytes(CONTENT[:1000])
    with pytest.raises(UserError, match="/f: failed 3 times in a row .*partial data is kept"):
        download(f"{server.url}/f", tmp_path / "f", patience=QUICK)
    assert (tmp_path / "f.part").read_bytes() == CONTENT[:1000] and len(server.requests) == 3


def test_no_server(tmp_path):
    with Server() as closed:
        url = closed.url
    with pytest.raises(UserError, match="failed 3 times in a row .*refused"):
        download(f"{url}/f", tmp_path / "f", patience=QUICK)


@pytest.mark.parametrize(
    "path, checksum, message",
    [("none", None, "the server returned 404"), ("f", "abc", "checksum 'abc': expected the hex digits")],
)
def test_refusals(server, tmp_path, path, checksum, message):
    with pytest.raises(UserError, match=message):
        download(f"{server.url}/{path}", tmp_path / "f", checksum=checksum, patience=QUICK)
    assert len(server.requests) <= 1


def test_not_an_address(tmp_path):
    with pytest.raises(UserError, match="not a valid address"):
        download("dumps/f", tmp_path / "f", patience=QUICK)


def dump_of(server, code, wiki):
    """Serve a dump with its list of checksums; returns its content."""
    content = bz2.compress(b'<mediawiki xmlns="x"><page><title>a</title><ns>0</ns></page></mediawiki>')
    name = f"{wiki}-20240501-pages-articles.xml.bz2"
    server.files[f"/{wiki}/20240501/{name}"] = content
    sums = f"{hashlib.sha1(b'').hexdigest()}  other\n{hashlib.sha1(content).hexdigest()}  {name}\n"
    server.files[f"/{wiki}/20240501/{wiki}-20240501-sha1sums.txt"] = sums.encode()
    return content


def test_a_dump_by_its_wikipedia(server, tmp_path):
    content = dump_of(server, "be_tarask", "be_x_oldwiki")
    path = fetch_dump("be-tarask", "20240501", tmp_path, mirror=server.url, patience=QUICK)
    assert path == tmp_path / "be_tarask" / "be_x_oldwiki-20240501-pages-articles.xml.bz2"
    assert path.read_bytes() == content and list(path.parent.iterdir()) == [path]


def test_a_dump_that_is_not_the_one_listed(server, tmp_path):
    dump_of(server, "sw", "swwiki")
    server.files["/swwiki/20240501/swwiki-20240501-pages-articles.xml.bz2"] += b"!"
    with pytest.raises(UserError, match="its SHA1 is"):
        fetch_dump("sw", "20240501", tmp_path, mirror=server.url, patience=QUICK)
    server.files["/swwiki/20240501/swwiki-20240501-sha1sums.txt"] = b""
    with pytest.raises(UserError, match="does not list swwiki-.*not finished"):
        fetch_dump("sw", "20240501", tmp_path, mirror=server.url, patience=QUICK)


@pytest.mark.parametrize(
    "code, date, message", [("xx", "20240501", "not in the language table"), ("sw", "2024-05", "write YYYYMMDD")]
)
def test_bad_names_of_dumps(tmp_path, code, date, message):
    with pytest.raises(UserError, match=message):
        fetch_dump(code, date, tmp_path)


def test_names_of_page_views():
    assert pageview_names("20240501-07") == ["pageviews-20240501-070000.gz"]
    day = pageview_names("20240501")
    assert len(day) == 24 and day[0].endswith("-000000.gz") and day[-1].endswith("-230000.gz")
    for spec in ("20240501-24", "2024", "20240501-7"):
        with pytest.raises(UserError, match="write YYYYMMDD-HH"):
            pageview_names(spec)


def test_page_views_are_read_through(server, tmp_path):
    name, packed = "pageviews-20240501-070000.gz", gzip.compress(b"en Dog 99 0\n")
    where = f"/other/pageviews/2024/2024-05/{name}"
    server.files[where] = packed
    path = fetch_pageviews(name, tmp_path / "a", mirror=server.url + "/", patience=QUICK)
    assert path == tmp_path / "a" / "pageviews" / name and path.read_bytes() == packed
    server.files[where] = packed[:-9]
    with pytest.raises(UserError, match="incomplete gzip .*removed"):
        fetch_pageviews(name, tmp_path / "b", mirror=server.url, patience=QUICK)
    assert list((tmp_path / "b" / "pageviews").iterdir()) == []


def test_fetched_by_the_command_line_and_built(server, tmp_path, capsys):
    dump_of(server, "sw", "swwiki")
    name = "pageviews-20240501-070000.gz"
    server.files[f"/other/pageviews/2024/2024-05/{name}"] = gzip.compress(b"sw Kenya 99 0\nsw Uganda 60 0\n")
    words = ["--wiki", "sw", "--date", "20240501", "--pageviews", "20240501-07", "--mirror", server.url]
    assert main(["metadata", "fetch", *words, "--out", str(tmp_path / "dumps")]) == 0
    assert capsys.readouterr().out.split() == [
        str(tmp_path / "dumps/sw/swwiki-20240501-pages-articles.xml.bz2"),
        str(tmp_path / "dumps/pageviews" / name),
    ]
    assert main(["metadata", "build", str(tmp_path / "dumps"), "--out", str(tmp_path / "metadata")]) == 0
    assert '"Kenya"' in (tmp_path / "metadata" / "sw.json").read_text(encoding="utf-8")
