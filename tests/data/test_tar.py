"""The tar index: equal to tarfile's, safe about names, and sure about damage."""

import io
import os
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc2_hpc.data.packing import write_shard
from mc2_hpc.data.tar import LocalFile, ShardError, is_safe_name, list_members

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
    lambda name: is_safe_name(name) and "//" not in name and not name.endswith("/")
)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(NAMES, st.binary(max_size=1500)), min_size=1, max_size=8), st.sampled_from(["gnu", "pax"]))
def test_index_equals_tarfile(files: list[tuple[str, bytes]], layout: str) -> None:
    source = Bytes(tar_bytes(files, FORMATS[layout]))
    members, unsafe = list_members(source)
    assert unsafe == 0
    assert [(m.name, source.read(m.offset, m.size)) for m in members] == files


def test_real_shard_equals_tarfile(shared_data: Path) -> None:
    path = shared_data / "cc12m-32.tar"
    source = LocalFile(path)
    with tarfile.open(path) as archive:
        expected = [(m.name, m.offset_data, m.size) for m in archive if m.isreg()]
    assert [tuple(m) for m in list_members(source)[0]] == expected


def test_other_kinds_of_members_are_passed_over() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for kind, name in ((tarfile.DIRTYPE, "folder"), (tarfile.SYMTYPE, "link"), (tarfile.LNKTYPE, "hard")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "elsewhere"
            archive.addfile(info)
        info = tarfile.TarInfo("./folder/a.txt")
        info.size = 2
        archive.addfile(info, io.BytesIO(b"hi"))
    members, unsafe = list_members(Bytes(out.getvalue()))
    assert [m.name for m in members] == ["folder/a.txt"] and unsafe == 0


@pytest.mark.parametrize("name", ["/etc/passwd", "../up.jpg", "a/../../b.jpg", "./../c.txt"])
def test_names_that_lead_out_are_left_out_and_counted(name: str) -> None:
    members, unsafe = list_members(Bytes(tar_bytes([(name, b"x"), ("ok.txt", b"y")])))
    assert [m.name for m in members] == ["ok.txt"] and unsafe == 1


def test_pre_posix_headers_are_read_and_their_checksum_checked() -> None:
    header = bytearray(512)
    header[:5] = b"a.txt"
    header[124:136] = b"00000000002\0"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    members, _ = list_members(Bytes(bytes(header) + b"hi" + bytes(510 + 512)))
    assert members == [("a.txt", 512, 2)]
    header[0] ^= 1
    with pytest.raises(ShardError, match="not a tar header at byte 0"):
        list_members(Bytes(bytes(header) + b"hi" + bytes(510 + 512)))


@pytest.mark.parametrize("cut", [0, 100, 512, 513, 1536, 1536 + 100, 2 * 1536 - 600, 2 * 1536 - 1, 2 * 1536])
def test_a_cut_is_noticed_wherever_it_lies(cut: int) -> None:
    data = tar_bytes([("a.txt", b"x" * 600), ("b.txt", b"y" * 600)])
    with pytest.raises(ShardError, match="cut off" if cut >= 512 else "holds no files"):
        list_members(Bytes(data[:cut]))
    assert len(list_members(Bytes(data[: 2 * 1536 + 512]))[0]) == 2


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=3000))
def test_garbage_is_refused(data: bytes) -> None:
    if not any(data[:512]):
        data = b"\1" + data[1:]
    with pytest.raises(ShardError):
        list_members(Bytes(data))


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 3 * 1024 - 1), st.integers(0, 255))
def test_a_flipped_byte_is_refused_or_harmless(where: int, value: int) -> None:
    data = bytearray(tar_bytes([("a" * 120, b"x"), ("b.txt", b"y" * 300)], tarfile.GNU_FORMAT))
    data[where] = value
    try:
        members, _ = list_members(Bytes(bytes(data)))
    except ShardError:
        return
    assert all(m.offset + m.size <= len(data) and is_safe_name(m.name) for m in members)


@pytest.mark.parametrize("content", [b"", bytes(10240)])
def test_empty_tars(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "empty.tar"
    path.write_bytes(content)
    with pytest.raises(ShardError, match="holds no files"):
        list_members(LocalFile(path))


def test_local_file_says_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="No such file"):
        LocalFile(tmp_path / "absent.tar")
    path = tmp_path / "short.tar"
    path.write_bytes(b"abc")
    source = LocalFile(path)
    assert source.read(1, 2) == b"bc"
    os.truncate(path, 1)  # under the open file: a short read, not a dead process
    with pytest.raises(OSError, match="1 of 3 bytes at 0"):
        source.read(0, 3)


def test_write_shard_is_deterministic_and_readable_by_tarfile(tmp_path: Path) -> None:
    samples = [("a/000", {"jpg": b"1", "txt": "ä".encode()}), ("001", {"jpg": b"2" * 700})]
    for name in ("x.tar", "y.tar"):
        write_shard(tmp_path / name, samples)
    assert (tmp_path / "x.tar").read_bytes() == (tmp_path / "y.tar").read_bytes()
    with tarfile.open(tmp_path / "x.tar") as archive:
        assert archive.getnames() == ["a/000.jpg", "a/000.txt", "001.jpg"]
    with pytest.raises(ValueError, match="no safe member name"):
        write_shard(tmp_path / "z.tar", [("../evil", {"jpg": b""})])
    assert not (tmp_path / "z.tar").exists()
