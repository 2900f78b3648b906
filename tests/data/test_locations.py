"""What ``data.train`` may say: folders, patterns, braces and addresses."""

from pathlib import Path

import fsspec
import pytest

from mc2_hpc.data.locations import expand_braces, find_shards
from mc2_hpc.data.packing import write_shard
from mc2_hpc.errors import UserError


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{08..11}.tar", ["08.tar", "09.tar", "10.tar", "11.tar"]),
        ("{9..10}.tar", ["9.tar", "10.tar"]),
        ("{en,de}/{0..1}.tar", ["en/0.tar", "en/1.tar", "de/0.tar", "de/1.tar"]),
        ("x{3..3}", ["x3"]),
        ("{one}", ["one"]),
    ],
)
def test_braces(pattern: str, expected: list[str]) -> None:
    assert expand_braces(pattern) == expected


@pytest.mark.parametrize("pattern", ["{5..3}.tar", "{0..99999999}.tar", "{0..9999}{0..9999}.tar"])
def test_braces_that_stand_for_nothing_or_too_much(pattern: str) -> None:
    with pytest.raises(UserError, match=r"no range of|more than 10,000,000"):
        expand_braces(pattern)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for lang in ("en", "de"):
        for number in range(3):
            write_shard(tmp_path / lang / f"{number:03d}.tar", [(f"{lang}{number}", {"jpg": b"1", "txt": b"x"})])
    return tmp_path


def names(spec: object, folder: Path) -> list[str]:
    return [str(Path(name).relative_to(folder)) for name in find_shards(str(spec)).names]


def test_local(folder: Path) -> None:
    assert names(folder / "en", folder) == ["en/000.tar", "en/001.tar", "en/002.tar"]
    assert names(f"{folder}/*/000.tar", folder) == ["de/000.tar", "en/000.tar"]
    assert names(f"{folder}/{{en,de}}/{{001..002}}.tar", folder) == [
        "de/001.tar",
        "de/002.tar",
        "en/001.tar",
        "en/002.tar",
    ]
    assert names(f"file://{folder}/en", folder) == names(folder / "en", folder)
    shards = find_shards(folder / "en")
    assert shards.open(1).read(0).key == "en1"
    (folder / "{odd}").mkdir()
    write_shard(folder / "{odd}" / "0.tar", [("odd", {"jpg": b"1", "txt": b"x"})])
    assert names(folder / "{odd}", folder) == ["{odd}/0.tar"]


def test_what_is_not_there(folder: Path) -> None:
    with pytest.raises(UserError, match=r"003\.tar: no such folder, file or pattern"):
        find_shards(f"{folder}/en/{{000..003}}.tar")
    with pytest.raises(UserError, match="no such folder, file or list"):
        find_shards("memory://nowhere")
    with pytest.raises(UserError, match="nonsense://x: .*mc2_hpc"):
        find_shards("nonsense://x")


def test_remote_listings(tmp_path: Path) -> None:
    memory = fsspec.filesystem("memory")
    for name in ("b/1.tar", "b/0.tar", "b/.hidden.tar", "b/0.parquet", "b/deep/2.tar"):
        memory.pipe(f"/listing/{name}", b"")
    memory.pipe("/listing/empty/x.txt", b"")
    memory.pipe("/listing/shards.txt", b"b/1.tar\nmemory:///listing/b/0.tar\n")

    def listed(spec: str) -> list[str]:
        return find_shards(spec, cache=tmp_path).names

    both = ["memory:///listing/b/0.tar", "memory:///listing/b/1.tar"]
    assert listed("memory:///listing/b") == both
    assert listed("memory:///listing/b/*.tar") == both
    assert listed("memory:///listing/b/{0..1}.tar") == both
    assert listed("memory:///listing/shards.txt") == sorted(["memory:///listing/b/1.tar", both[0]])
    assert listed("memory:///listing/b/1.tar") == both[1:]
    with pytest.raises(UserError, match=r"no \*\.tar shards there"):
        listed("memory:///listing/empty")
