"""The tars that curation reads: which images count, and errors that name the file."""

import io
import os
import tarfile
from pathlib import Path

import pytest

from mc2_hpc.curation.pool.image_tars import TarIndex
from mc2_hpc.errors import UserError


def add(tar: tarfile.TarFile, name: str, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.type = len(content), kind
    tar.addfile(member, io.BytesIO(content))


def test_images_of_a_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content in {"a.jpg": b"1", "b.JPEG": b"2", "c.png": b"3", "d.txt": b"4"}.items():
            add(tar, name, content)
        add(tar, "a.jpg")
        add(tar, "x.jpg", kind=tarfile.DIRTYPE)
        add(tar, "./y.jpg", b"5")
        add(tar, "../z.jpg", b"6")
    with TarIndex(tmp_path / "s.tar") as index:
        images = {sample.key: sample.image for sample in index.listing.samples.values() if sample.image}
        assert {key: (image.name, index.read(image)) for key, image in images.items()} == {
            "a": ("a.jpg", b"1"),
            "b": ("b.JPEG", b"2"),
            "c": ("c.png", b"3"),
            "y": ("y.jpg", b"5"),
        }
        assert index.listing.drops == {"name_unsafe": 1, "image_repeated": 1}


def test_it_closes_its_file(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "a.jpg", b"1")
    before = len(os.listdir("/proc/self/fd"))
    with TarIndex(tmp_path / "s.tar") as index:
        assert index.members and len(os.listdir("/proc/self/fd")) == before + 1
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_tar_that_shrinks_is_an_error_of_its_name(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        add(tar, "a.jpg", b"1" * 600)
    with TarIndex(tmp_path / "s.tar") as index:
        os.truncate(tmp_path / "s.tar", 600)
        with pytest.raises(UserError, match=r"s\.tar: a\.jpg cannot be read \(88 of 600 bytes at 512\)"):
            index.read(index.members[0])
    with pytest.raises(UserError, match=r"absent\.tar: cannot be opened \(No such file"):
        TarIndex(tmp_path / "absent.tar")
