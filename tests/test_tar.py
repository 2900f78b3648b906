"""Tars read and written without ``tarfile``'s reader: same results, and damage is detected."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc2_hpc.tar import ESCAPES, LocalFile, TarError, escapes, fits_tar_name, list_members, write_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}


class Bytes:
    """A source in memory."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.size = len(data)

    def read(self, offset: int, size: int) -> bytes:
        if offset + size > self.size:
            raise OSError("short")
        return self.data[offset : offset + size]


def tar_bytes(files: list[tuple[str, bytes]], layout: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=layout) as archive:
        for name, payload in files:
            info = tarfile.TarInfo(name)
            info.size = len(payload)
            archive.addfile(info, io.BytesIO(payload))
    return out.getvalue()


NAMES = st.text(st.sampled_from("abcäひ0/_-"), min_size=1, max_size=240).filter(
    lambda name: not name.startswith("/") and "//" not in name and not name.endswith("/")
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, st.binary(max_size=1500)), min_size=1, max_size=8), st.sampled_from(["gnu", "pax"]))
def test_index_equals_tarfile(files: list[tuple[str, bytes]], layout: str) -> None:
    source = Bytes(tar_bytes(files, FORMATS[layout]))
    members = list_members(source)
    assert [(m.name, source.read(m.offset, m.size)) for m in members] == files


def test_real_shard_equals_tarfile(shared_data: Path) -> None:
    path = shared_data / "cc12m-32.tar"
    source = LocalFile(path)
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    assert [tuple(m) for m in list_members(source)] == expected


def test_other_kinds_of_members_are_passed_over() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for kind, name in ((tarfile.DIRTYPE, "folder"), (tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "hard")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere"
            archive.addfile(info)
        archive.addfile(tarfile.TarInfo("old folder/"))
        info = tarfile.TarInfo("./folder/a.txt")
        info.size = 2
        archive.addfile(info, io.BytesIO(b"hi"))
    data = bytearray(out.getvalue())
    data[3 * 512 + 156] = 0  # from before folders had a type of their own
    sign(data, 3 * 512)
    assert [m.name for m in list_members(Bytes(bytes(data)))] == ["./folder/a.txt"]


def sign(data: bytearray, at: int, signed: bool = False) -> None:
    """Write the checksum of the header at ``at``, over unsigned or, like some old writers, signed bytes."""
    data[at + 148 : at + 156] = b" " * 8
    header = data[at : at + 512]
    data[at + 148 : at + 156] = b"%06o\0 " % sum(byte - 256 * (signed and byte > 127) for byte in header)


@pytest.mark.parametrize("signed", [False, True])
def test_every_header_has_its_checksum(signed: bool) -> None:
    data = bytearray(tar_bytes([("a.txt", b"x" * 600), ("\u65e5.txt", b"y")]))
    sign(data, 1536, signed)
    assert [m.name for m in list_members(Bytes(bytes(data)))] == ["a.txt", "\u65e5.txt"]
    data[1536] ^= 1
    with pytest.raises(TarError, match="not a tar header at byte 1536"):
        list_members(Bytes(bytes(data)))


def test_a_negative_size_does_not_loop() -> None:
    data = bytearray(tar_bytes([("a.txt", b"x" * 600)]))
    data[124:136] = b"-0000002000\0"
    sign(data, 0)
    with pytest.raises(TarError, match="damaged header at byte 0"):
        list_members(Bytes(bytes(data)))


def sparse_gnu() -> bytes:
    """A sparse file in GNU's old form, whose map continues in a second block, followed by a plain file."""
    data = bytearray(tar_bytes([("holes.bin", b"x" * 600), ("a.txt", b"hi")], tarfile.GNU_FORMAT))
    data[156:157], data[482] = b"S", 1
    sign(data, 0)
    return bytes(data[:512] + bytes(512) + data[512:])


def sparse_pax() -> bytes:
    """The same in the newest sparse form."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as archive:
        info = tarfile.TarInfo("GNUSparseFile.1/holes.bin")
        info.size = 1024
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9000"}
        archive.addfile(info, io.BytesIO(b"1\n0\n512\n".ljust(512, b"\0") + b"x" * 512))
        info = tarfile.TarInfo("a.txt")
        info.size = 2
        archive.addfile(info, io.BytesIO(b"hi"))
    return out.getvalue()


@pytest.mark.parametrize("make", [sparse_gnu, sparse_pax])
def test_sparse_files_are_passed_over(make: Callable[[], bytes]) -> None:
    source = Bytes(make())
    (member,) = list_members(source)
    assert member.name == "a.txt" and source.read(member.offset, member.size) == b"hi"
    with tarfile.open(fileobj=io.BytesIO(source.data)) as archive:
        assert [m.name for m in archive if m.isreg() and not m.issparse()] == ["a.txt"]


def test_pre_posix_headers_are_read_and_their_checksum_checked() -> None:
    header = bytearray(512)
    header[:5] = b"a.txt"
    header[124:136] = b"00000000002\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    members = list_members(Bytes(bytes(header) + b"hi" + bytes(510 + 512)))
    assert members == [("a.txt", 512, 2)]
    header[0] ^= 1
    with pytest.raises(TarError, match="not a tar header at byte 0"):
        list_members(Bytes(bytes(header) + b"hi" + bytes(510 + 512)))


@pytest.mark.parametrize("cut", [0, 100, 512, 513, 1536, 1536 + 100, 2 * 1536 - 600, 2 * 1536 - 1, 2 * 1536])
def test_a_cut_is_noticed_wherever_it_lies(cut: int) -> None:
    data = tar_bytes([("a.txt", b"x" * 600), ("b.txt", b"y" * 600)])
    with pytest.raises(TarError, match="cut off" if cut >= 512 else "holds no files"):
        list_members(Bytes(data[:cut]))
    assert len(list_members(Bytes(data[: 2 * 1536 + 512]))) == 2


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=3000))
def test_garbage_is_refused(data: bytes) -> None:
    if not any(data[:512]):
        data = b"\1" + data[1:]
    with pytest.raises(TarError):
        list_members(Bytes(data))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3 * 1024 - 1), st.integers(0, 255))
def test_a_flipped_byte_is_refused_or_harmless(where: int, value: int) -> None:
    data = bytearray(tar_bytes([("a" * 120, b"x"), ("b.txt", b"y" * 300)], tarfile.GNU_FORMAT))
    data[where] = value
    try:
        members = list_members(Bytes(bytes(data)))
    except TarError:
        return
    assert all(m.offset + m.size <= len(data) for m in members)


def test_a_long_name_without_its_file_is_damage() -> None:
    data = tar_bytes([("a" * 120, b"x")], tarfile.GNU_FORMAT)
    with pytest.raises(TarError, match="damaged header at byte 1024"):
        list_members(Bytes(data[:1024] + bytes(1024)))


def test_an_empty_archive_is_valid_but_an_empty_file_is_not() -> None:
    assert list_members(Bytes(bytes(10240))) == []
    with pytest.raises(TarError, match="holds no files"):
        list_members(Bytes(b""))


def test_local_file_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LocalFile(tmp_path / "absent.tar")
    path = tmp_path / "short.tar"
    path.write_bytes(b"abc")
    source = LocalFile(path)
    assert source.read(1, 2) == b"bc"
    os.truncate(path, 1)  # while it is open: a short read, not a killed process
    with pytest.raises(OSError, match="1 of 3 bytes at 0"):
        source.read(0, 3)


def test_written_tar_depends_on_content_alone(tmp_path: Path) -> None:
    files = [("a.jpg", b"x" * 600), ("b.jpg", b""), ("日本.jpg", b"y")]
    write_tar(tmp_path / "one.tar", files)
    write_tar(tmp_path / "two.tar", ((name, memoryview(content)) for name, content in files))
    assert (tmp_path / "one.tar").read_bytes() == (tmp_path / "two.tar").read_bytes()
    with tarfile.open(tmp_path / "one.tar") as tar:
        assert [(m.name, m.size, m.mtime, m.uid, m.mode) for m in tar] == [
            (name, len(content), 0, 0, 0o644) for name, content in files
        ]


def test_names() -> None:
    assert fits_tar_name("a" * 100) and not fits_tar_name("a" * 101)
    assert fits_tar_name("a" * 150 + "/" + "b" * 90) and not fits_tar_name("日" * 40)
    assert [escapes(name) for name in ("a", "a/b", "a..b", "./a", ".a")] == [False] * 5
    assert all(escapes(name) for name in ("..", "/a", "a/..", "a/../b", "./../a", "a\\b", "a\0b"))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.sampled_from("a./\\\0\n"), max_size=6), min_size=1))
def test_names_that_escape_are_the_same_in_columns(names: list[str]) -> None:
    assert pc.match_substring_regex(pa.array(names), ESCAPES).to_pylist() == [escapes(name) for name in names]
