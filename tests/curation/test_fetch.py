"""``mc2 curate fetch`` against a server on this machine: every key ends once, whatever the server does."""

import asyncio
import hashlib
import io
import json
import os
import ssl
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import trustme
from PIL import Image

from mc2_hpc import jobs
from mc2_hpc.cli import main
from mc2_hpc.curation.fetch import plan_fetch
from mc2_hpc.curation.fetching.options import FetchOptions
from mc2_hpc.curation.match import plan_match
from mc2_hpc.curation.pack import plan_pack
from mc2_hpc.drops import MEANINGS
from mc2_hpc.errors import UserError
from mc2_hpc.storage import write_json
from mc2_hpc.tar import LocalFile, list_members
from tests.curation.image_server import ImageServer, Request, bad_behaviours, encoded, running
from tests.killing import kill_when

LOOPBACK = ("127.0.0.1/32",)
KINDS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "AVIF": "avif", "BMP": "bmp", "TIFF": "tiff"}


@pytest.fixture
def server() -> Iterator[ImageServer]:
    with running(ImageServer()) as server:
        yield server


def options(**changes) -> FetchOptions:
    return FetchOptions(**{"allow_addresses": LOOPBACK, "timeout": 5.0, "host_rate": 0.0, **changes})


def write_pool(folder: Path, *shards: dict[str, str | None]) -> Path:
    """A pool of shards 0, 1, ... of keys and addresses."""
    folder.mkdir(exist_ok=True)
    for number, shard in enumerate(shards):
        texts = [f"caption of {key}" for key in shard]
        table = pa.table({"key": list(shard), "text": texts, "source": pa.array(list(shard.values()), pa.string())})
        pq.write_table(table, folder / f"{number}.parquet")
    return folder


def fetch(pool: Path, out: Path, **changes) -> dict:
    counters = jobs.run(plan_fetch(pool, out, options(**changes)))
    assert counters is not None
    return counters


def in_tar(path: Path) -> dict[str, bytes]:
    file = LocalFile(path)
    return {member.name: file.read(member.offset, member.size) for member in list_members(file)}


def outcomes(out: Path, shard: str = "0") -> dict[str, dict]:
    rows = pq.read_table(out / "fetched" / f"{shard}.parquet").to_pylist()
    assert len({row["key"] for row in rows}) == len(rows)
    return {row["key"]: row for row in rows}


def reasons(out: Path) -> dict[str, str | None]:
    return {key: row["reason"] for key, row in outcomes(out).items()}


def test_every_behaviour_ends_in_one_counted_outcome(server, tmp_path):
    bad = bad_behaviours(server)
    images = {kind: encoded(kind) for kind in KINDS}
    good = {f"good {kind}": server.image(f"/{kind}", body) for kind, body in images.items()}
    addresses = {"none": None, "relative": "a.jpg", "ftp": "ftp://a/b.jpg", "bad port": "http://a:b/", **good}
    addresses |= {name: url for name, (url, _) in bad.items()}
    expected = {name: reason for name, (_, reason) in bad.items()} | dict.fromkeys(good)
    expected |= {"none": "url_missing", "relative": "url_not_http", "ftp": "url_not_http", "bad port": "url_invalid"}
    counters = fetch(write_pool(tmp_path / "pool", addresses), tmp_path / "out", timeout=1.0, max_bytes=1 << 20)
    assert reasons(tmp_path / "out") == expected
    assert counters["drops"] == Counter(filter(None, expected.values()))
    assert counters["keys"] == len(addresses) == counters["images"] + sum(counters["drops"].values())
    assert counters["images"] == counters["texts"] == len(KINDS) and counters["bytes"] == sum(map(len, images.values()))
    assert counters["formats"] == dict.fromkeys(KINDS.values(), 1) and set(counters["drops"]) <= set(MEANINGS)
    stored = in_tar(tmp_path / "out" / "0.tar")
    assert stored == {f"good {kind}.{KINDS[kind]}": images[kind] for kind in KINDS}
    assert list(stored) == sorted(stored)
    for key, row in outcomes(tmp_path / "out").items():
        body = stored.get(f"{key}.{row['format']}")
        assert (row["status"] == "image") == (row["reason"] is None) == (body is not None)
        if body is not None:
            assert row["sha256"] == hashlib.sha256(body).hexdigest() and row["size"] == len(body)
            assert (row["width"], row["height"]) == Image.open(io.BytesIO(body)).size
    rows = pq.read_table(tmp_path / "out" / "0.parquet").to_pydict()
    assert rows["key"] == list(good) and rows["text"] == [f"caption of {key}" for key in good]
    assert rows["source"] == list(good.values())
    assert not (tmp_path / "out" / "partial").exists()


def test_a_key_is_fetched_once_and_keeps_all_its_captions(server, tmp_path):
    first, second = (server.image(path, encoded(seed=number)) for number, path in enumerate(("/a", "/b")))
    table = {"key": ["x", "y", "x", "x"], "text": ["1", "2", "3", " "], "source": [second, None, first, None]}
    table = pa.table({**table, "lang": ["en", "de", "fr", "en"]})
    (tmp_path / "pool").mkdir()
    pq.write_table(table, tmp_path / "pool" / "a.parquet")
    counters = fetch(tmp_path / "pool", tmp_path / "out")
    assert counters["drops"] == {"caption_empty": 1, "url_missing": 1} and counters["rows"] == 4
    assert counters["keys"] == 2 and counters["images"] == 1 and counters["texts"] == 2
    assert server.requests == {"/a": 1}
    rows = pq.read_table(tmp_path / "out" / "a.parquet").to_pydict()
    assert rows["text"] == ["1", "3"] and rows["lang"] == ["en", "fr"]


def test_matching_and_packing_keep_every_format(server, tmp_path):
    """Images of any format reach the training shards, also if only some addresses have images."""
    addresses = {kind: server.image(f"/{kind}", encoded(kind)) for kind in KINDS} | {"gone": server.url("/gone")}
    pool = write_pool(tmp_path / "pool", addresses)
    fetch(pool, tmp_path / "fetched")
    write_json(tmp_path / "metadata" / "en.json", ["caption"])
    jobs.run(plan_match(tmp_path / "fetched", tmp_path / "metadata", tmp_path / "matched"))
    packed = jobs.run(plan_pack(tmp_path / "fetched", tmp_path / "matched", tmp_path / "shards"))
    assert packed == {"images": len(KINDS), "texts": len(KINDS), "drops": {}}
    assert in_tar(tmp_path / "shards" / "0.tar") == in_tar(tmp_path / "fetched" / "0.tar")
    assert len(in_tar(tmp_path / "shards" / "0.tar")) == len(KINDS)


def test_nested_shards_and_a_shard_without_images(server, tmp_path):
    write_pool(tmp_path / "pool")
    write_pool(tmp_path / "pool" / "a", {"x": server.image("/x", encoded())})
    write_pool(tmp_path / "pool" / "b", {"y": server.url("/gone")})
    assert fetch(tmp_path / "pool", tmp_path / "out")["images"] == 1
    assert not (tmp_path / "out" / "b" / "0.tar").exists() and outcomes(tmp_path / "out", "b/0")["y"]["reason"]
    write_json(tmp_path / "metadata" / "en.json", ["caption"])
    counters = jobs.run(plan_match(tmp_path / "out", tmp_path / "metadata", tmp_path / "matched"))
    assert counters is not None and counters["matched"] == 1
    assert fetch(tmp_path / "pool", tmp_path / "out")["images"] == 1
    assert server.requests == {"/x": 1, "/gone": 1}


def test_images_of_an_earlier_run_do_not_stay_when_none_can_be_fetched(server, tmp_path):
    pool = write_pool(tmp_path / "pool", {"a": server.image("/a", encoded())}, {"b": server.image("/b", encoded())})
    fetch(pool, tmp_path / "out")
    assert (tmp_path / "out" / "0.tar").exists()
    del server.handlers["/a"]
    (tmp_path / "out" / "stats" / "0.json").unlink()
    counters = fetch(pool, tmp_path / "out")
    assert counters["images"] == 1 and counters["drops"] == {"http_404": 1}
    assert sorted(path.name for path in (tmp_path / "out").glob("?.*")) == ["1.parquet", "1.tar"]


def test_opting_out_is_obeyed_or_not_as_told(server, tmp_path):
    tags = {"all": "noindex", "us": "mc2_hpc: noai", "them": "otherbot: noai, noindex", "until": "max-snippet: 5"}
    pool = write_pool(tmp_path / "pool", {k: server.image(f"/{k}", encoded(), X_Robots_Tag=v) for k, v in tags.items()})
    fetch(pool, tmp_path / "out")
    assert reasons(tmp_path / "out") == {"all": "opted_out", "us": "opted_out", "them": None, "until": None}
    fetch(pool, tmp_path / "all", opt_out=())
    assert set(reasons(tmp_path / "all").values()) == {None}


def test_addresses_are_checked_after_looking_up_names_and_after_redirects(server, tmp_path):
    image = server.image("/x", encoded())
    server.image("/to-name", b"", 301, Location=server.url("/x", "localhost"))
    addresses = {"number": image, "name": server.url("/x", "localhost"), "six": server.url("/x", "[::ffff:127.0.0.1]")}
    pool = write_pool(
        tmp_path / "pool", addresses | {"odd": server.url("/x", "0x7f.1"), "meta": "http://169.254.169.254/"}
    )
    with pytest.raises(UserError, match=r"nothing was kept \(images 0\): address_refused 5"):
        fetch(pool, tmp_path / "none", allow_addresses=())
    assert not server.requests, "a refused server saw a request"
    pool = write_pool(tmp_path / "pool", addresses | {"moved": server.url("/to-name")})
    fetch(pool, tmp_path / "out")
    assert reasons(tmp_path / "out") == dict.fromkeys(("number", "name", "six", "moved"))


@pytest.mark.parametrize("first", ["127.0.0.1", "10.0.0.1"])
def test_a_public_name_that_leads_to_this_machine_is_refused(server, tmp_path, monkeypatch, first):
    """Whatever the resolver says, each address is checked as it is connected to, also if a name has several."""

    def look_up(host, port, *rest, **more):
        return [(2, 1, 6, "", (address, port)) for address in (first, "127.0.0.1")]

    monkeypatch.setattr("socket.getaddrinfo", look_up)
    url = server.image("/x", encoded()).replace("127.0.0.1", "rebind.example")
    with pytest.raises(UserError, match=r"\(images 0\): address_refused 3"):
        fetch(write_pool(tmp_path / "pool", {f"{n}": url for n in range(3)}), tmp_path / "out", allow_addresses=())
    assert not server.requests


def test_a_busy_server_is_asked_again_after_the_time_it_names(server, tmp_path):
    async def once_busy(request: Request) -> None:
        if server.requests[request.path] == 1:
            await request.answer(429, Retry_After=1)
        else:
            await request.answer(200, encoded())

    server.add("/x", once_busy)
    addresses = {f"{number}": server.url("/x" if number == 0 else f"/{number}") for number in range(4)}
    for number in range(1, 4):
        server.image(f"/{number}", encoded())
    fetch(write_pool(tmp_path / "pool", addresses), tmp_path / "out", host_connections=1)
    assert set(reasons(tmp_path / "out").values()) == {None} and server.requests["/x"] == 2
    assert server.times[1] - server.times[0] > 0.95, "the server's other images did not wait either"


def test_a_dead_host_does_not_cost_a_time_limit_per_image(server, tmp_path):
    async def silent(request: Request) -> None:
        await request.writer.drain()
        await asyncio.sleep(60)

    addresses = {f"{number:03d}": server.add(f"/{number}", silent) for number in range(200)}
    addresses |= {"good": server.image("/good", encoded()).replace("127.0.0.1", "localhost")}
    counters = fetch(write_pool(tmp_path / "pool", addresses), tmp_path / "out", timeout=0.3)
    assert counters["drops"] == {"timeout": 200} and counters["images"] == 1
    assert sum(server.requests.values()) < 20, "each costs a time limit"


def test_limits_per_host(server, tmp_path):
    addresses = {f"{number:02d}": server.image(f"/{number}", encoded(seed=number)) for number in range(30)}
    pool = write_pool(tmp_path / "pool", addresses)
    fetch(pool, tmp_path / "a", host_connections=3)
    assert server.most_open <= 3
    server.times.clear()
    fetch(pool, tmp_path / "b", host_rate=40.0)
    assert server.times[-1] - server.times[0] >= 29 / 40 - 0.05


def test_what_is_sent(server, tmp_path):
    fetch(write_pool(tmp_path / "pool", {"x": server.image("/x?a=%C3%A9&b", encoded())}), tmp_path / "out")
    sent = server.seen["/x?a=%C3%A9&b"]
    assert sent["user-agent"].startswith("mc2_hpc/") and sent["accept-encoding"] == "identity"
    assert "cookie" not in sent and "referer" not in sent
    fetch(tmp_path / "pool", tmp_path / "named", user_agent="me/1.0 (+https://example.org)")
    assert server.seen["/x?a=%C3%A9&b"]["user-agent"] == "me/1.0 (+https://example.org)"


def test_certificates_are_checked(tmp_path):
    """An image comes over TLS only if the authority is known and the certificate is for the host."""
    authority, tls = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(tls)
    authority.cert_pem.write_to_path(tmp_path / "authority.pem")
    command = [
        sys.executable,
        "-m",
        "mc2_hpc.cli",
        "curate",
        "fetch",
        tmp_path / "pool",
        "--allow-addresses",
        LOOPBACK[0],
    ]
    with running(ImageServer(tls)) as server:
        address = server.image("/x", encoded())
        write_pool(tmp_path / "pool", {"x": address, "other": address.replace("127.0.0.1", "localhost")})
        for out, known in (("known", {"SSL_CERT_FILE": f"{tmp_path / 'authority.pem'}"}), ("unknown", {})):
            environment = {**os.environ, **known}
            done = subprocess.run(
                [*command, "--out", tmp_path / out], env=environment, capture_output=True, text=True, timeout=240
            )
            assert (done.returncode == 0) == bool(known), done.stderr
    assert reasons(tmp_path / "known") == {"x": None, "other": "host_unreachable"}
    assert reasons(tmp_path / "unknown") == dict.fromkeys(("x", "other"), "host_unreachable")


def test_an_unreachable_network_is_an_error_rather_than_drops(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(-3, "Temporary failure in name resolution")

    monkeypatch.setattr("socket.getaddrinfo", fail)
    pool = write_pool(tmp_path / "pool", {f"{number}": f"http://host-{number}.example/" for number in range(150)})
    with pytest.raises(UserError, match="none of the first 100 hosts can be reached"):
        fetch(pool, tmp_path / "out")
    assert not (tmp_path / "out" / "stats").exists()


def twenty(server: ImageServer, shard: str) -> dict[str, str | None]:
    return {f"{shard}{n:02d}": server.image(f"/{shard}{n}", encoded(seed=n)) for n in range(20)}


def test_a_killed_run_gives_the_same_bytes_and_fetches_nothing_twice(server, tmp_path, outputs):
    """The server holds back one image of the second shard until the command has been killed."""

    async def hold(request: Request) -> None:
        await asyncio.sleep(600)

    pool = write_pool(tmp_path / "pool", *(twenty(server, shard) for shard in "abc"))
    fetch(pool, tmp_path / "whole")
    server.requests.clear()
    command = [sys.executable, "-m", "mc2_hpc.cli", "curate", "fetch", str(pool), "--out", str(tmp_path / "out")]
    command += ["--workers", "1", "--allow-addresses", *LOOPBACK, "--host-rate", "0", "--timeout", "600"]
    normal, ledger = server.handlers["/b19"], tmp_path / "out" / "partial" / "1.ledger"
    server.add("/b19", hold)
    kill_when(command, lambda: sum(server.requests.values()) == 40 and ledger.stat().st_size >= 19 * 50)
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("0.*")}
    server.add("/b19", normal)
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    assert {path: path.stat().st_mtime_ns for path in finished} == finished and len(finished) == 2
    assert server.requests == {**dict.fromkeys((f"/{s}{n}" for s in "abc" for n in range(20)), 1), "/b19": 2}


@pytest.mark.parametrize("step", ["write_tar", "_write_captions", "write_json"])
def test_a_kill_while_the_shard_is_written_fetches_nothing_twice(server, tmp_path, outputs, monkeypatch, step):
    pool = write_pool(tmp_path / "pool", twenty(server, "a"))
    fetch(pool, tmp_path / "whole")
    server.requests.clear()

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(f"mc2_hpc.curation.fetch.{step}", fail)
        with pytest.raises(UserError, match="disk full"):
            fetch(pool, tmp_path / "out")
    fetch(pool, tmp_path / "out")
    assert outputs(tmp_path / "out") == outputs(tmp_path / "whole")
    assert set(server.requests.values()) == {1}


def test_bad_input_is_one_line(tmp_path, capsys, server):
    def line(*words: str) -> str:
        assert main(["curate", "fetch", *words, "--out", str(tmp_path / "out"), "--workers", "1"]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        return error

    (tmp_path / "empty").mkdir()
    assert "folder has no *.parquet or *.tar shards" in line(str(tmp_path / "empty"))
    assert "no such folder" in line(str(tmp_path / "missing"))
    pool = write_pool(tmp_path / "pool", {"x": server.image("/x", encoded())})
    assert "must be an address or a network" in line(str(pool), "--allow-addresses", "10.0.0.1/8")
    assert "user agent" in line(str(pool), "--user-agent", "a\nb")
    assert "--resize 3: must be at least 16" in line(str(pool), "--resize", "3")
    fetch(pool, tmp_path / "out")
    assert "another resize" in line(str(pool), "--resize", "64")
    assert "already has images" in line(str(tmp_path / "out"))
    pq.write_table(pa.table({"key": ["a"], "text": ["b"]}), pool / "0.parquet")
    error = f"{tmp_path / 'other'}"
    assert main(["curate", "fetch", str(pool), "--out", error, "--workers", "1"]) == 2
    assert "no column 'source'" in capsys.readouterr().err


def test_the_command_prints_its_counters(server, tmp_path, capsys):
    pool = write_pool(tmp_path / "pool", {"x": server.image("/x", encoded(size=(100, 50)))})
    words = ["curate", "fetch", str(pool), "--out", str(tmp_path / "out"), "--workers", "1", "--resize", "64"]
    assert main([*words, "--allow-addresses", "127.0.0.0/8", "--opt-out", "--timeout", "3"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 1
    assert outcomes(tmp_path / "out")["x"]["width"] == 64
