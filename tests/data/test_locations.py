"""The forms of ``data.train``: folders, patterns, braces and addresses."""

from pathlib import Path

import fsspec
import pytest

from mc2_hpc.data.locations import find_shards
from mc2_hpc.data.packing import write_shard
from mc2_hpc.errors import UserError


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
    assert shards.open(1).read(0, seed=0, epoch=0).key == "en1"
    (folder / "{odd}").mkdir()
    write_shard(folder / "{odd}" / "0.tar", [("odd", {"jpg": b"1", "txt": b"x"})])
    assert names(folder / "{odd}", folder) == ["{odd}/0.tar"]


def test_lists_of_names(folder: Path) -> None:
    both = [f"{folder}/en", f"{folder}/de/000.tar"]
    assert find_shards(both).names == find_shards("::".join(both)).names
    assert len(find_shards(both).names) == 4
    with pytest.raises(UserError, match="both local and remote"):
        find_shards([*both, "memory://listing"])


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
