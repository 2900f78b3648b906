"""The stored index of a tar: one read instead of thousands, never used for another tar, safe to lose."""

import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mc2_hpc.data import index as index_module
from mc2_hpc.data.index import cache_folder
from mc2_hpc.data.locations import LocalShards
from mc2_hpc.data.packing import write_shard
from mc2_hpc.data.shards import Pair, Shard, open_shard
from mc2_hpc.data.skips import ShardError
from mc2_hpc.data.stream import Lane, Position, ShardPool
from mc2_hpc.tar import LocalFile, write_tar

DAY_AGO = time.time() - 86_400


def write(path: Path, num: int, size: int = 10, at: float = DAY_AGO) -> Path:
    samples = ((f"k{i:05d}", {"jpg": b"%05d" % i + b"j" * size, "txt": f"text {i}".encode()}) for i in range(num))
    write_shard(path, samples)
    os.utime(path, (at, at))
    return path


def kept(path: Path) -> Path:
    return path.with_name(f".{path.name}.index")


def contents(shard: Shard) -> list[Pair]:
    return [shard.read(row, seed=0, epoch=0) for row in range(shard.num_keys)]


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of all reads from tars."""
    sizes: list[int] = []
    read = LocalFile.read

    def counted(self: LocalFile, offset: int, size: int) -> bytes:
        sizes.append(size)
        return read(self, offset, size)

    monkeypatch.setattr(LocalFile, "read", counted)
    return sizes


def test_an_index_gives_the_same_shard(tmp_path: Path, reads: list[int]) -> None:
    path = write(tmp_path / "0.tar", 50)
    first = open_shard(path)
    listed = contents(first)
    assert kept(path).is_file() and len(reads) > 50
    reads.clear()
    again = open_shard(path)
    assert reads == []
    assert contents(again) == listed and (again.row_hashes() == first.row_hashes()).all()
    assert (again.drops, again.changed) == ({}, False)


def test_resume_far_inside_a_big_tar_reads_the_member_alone(tmp_path: Path, reads: list[int]) -> None:
    path = write(tmp_path / "0.tar", 5_000, size=2_000)
    size = path.stat().st_size

    def resume(offset: int) -> str:
        pool = ShardPool(
            LocalShards([path], tmp_path),
            lanes=1,
            seed=0,
            probs=None,
            transform=lambda data, key, epoch: data,  # type: ignore[arg-type, return-value]
            name="test",
        )
        return next(Lane(pool, 0, Position(3, 0, offset))).pair.key

    resume(0)
    assert sum(reads) > 5_000 * 512
    for offset in (0, 2_500, 4_999):
        reads.clear()
        began = time.perf_counter()
        resume(offset)
        assert sum(reads) < 4_000 < size / 1_000, offset
        assert time.perf_counter() - began < 2


@pytest.mark.parametrize("change", ["grown", "same size"])
def test_a_rewritten_tar_is_listed_again_and_counted(change: str, tmp_path: Path) -> None:
    path = write(tmp_path / "0.tar", 20)
    open_shard(path)
    write(path, 25 if change == "grown" else 20, at=DAY_AGO + 1)
    shard = open_shard(path)
    assert shard.changed and shard.num_keys == (25 if change == "grown" else 20)
    assert not open_shard(path).changed


def test_a_tar_written_this_moment_is_not_trusted_to_stay(tmp_path: Path) -> None:
    path = write(tmp_path / "0.tar", 5, at=time.time())
    open_shard(path)
    assert not kept(path).exists()


def test_plain_and_curated_have_one_index(tmp_path: Path) -> None:
    path = write(tmp_path / "0.tar", 3)
    assert open_shard(path).num_keys == 3
    pq.write_table(pa.table({"key": ["k00001"], "text": ["x"]}), path.with_suffix(".parquet"))
    curated = open_shard(path)
    pair = curated.read(0, seed=0, epoch=0)
    assert curated.num_keys == 1 and pair.image[:5] == b"00001"
    assert open_shard(path).read(0, seed=0, epoch=0) == pair


@pytest.mark.parametrize("damage", ["empty", "cut", "flipped", "header"])
def test_a_damaged_index_is_made_again(damage: str, tmp_path: Path) -> None:
    path = write(tmp_path / "0.tar", 20)
    expected = contents(open_shard(path))
    whole = kept(path).read_bytes()
    flip = {"flipped": 200, "header": 24}.get(damage, 0)  # 24: the number of samples
    flipped = whole[:flip] + bytes([whole[flip] ^ 4]) + whole[flip + 1 :]
    kept(path).write_bytes({"empty": b"", "cut": whole[:100]}.get(damage, flipped))
    assert contents(open_shard(path)) == expected
    assert kept(path).read_bytes() == whole


def test_every_byte_of_an_index_counts(tmp_path: Path) -> None:
    path = write(tmp_path / "0.tar", 3)
    expected = contents(open_shard(path))
    whole = kept(path).read_bytes()
    for position in range(len(whole)):
        kept(path).write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        shard = open_shard(path)
        assert contents(shard) == expected and shard.drops == {}, position
        assert kept(path).read_bytes() == whole


def test_a_pipe_in_place_of_an_index_is_not_waited_for(tmp_path: Path) -> None:
    path = write(tmp_path / "0.tar", 3)
    expected = contents(open_shard(path))
    kept(path).unlink()
    os.mkfifo(kept(path))
    assert contents(open_shard(path)) == expected


def test_where_nothing_can_be_written_beside_the_tar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "data" / "0.tar", 20)
    atomic_path = index_module.atomic_path

    def read_only(target: Path):  # chmod does not stop root
        if Path(target).parent == path.parent:
            raise PermissionError(13, "Permission denied")
        return atomic_path(target)

    monkeypatch.setattr(index_module, "atomic_path", read_only)
    expected = contents(open_shard(path, cache=tmp_path / "cache"))
    assert [p.name for p in path.parent.iterdir()] == ["0.tar"]
    assert len(list((tmp_path / "cache" / "indexes").iterdir())) == 1
    monkeypatch.setattr(index_module, "list_samples", None)  # not called again
    assert contents(open_shard(path, cache=tmp_path / "cache")) == expected


def test_where_nothing_can_be_written_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "0.tar", 3)
    (tmp_path / "no folder").write_text("")

    def full(target: Path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(index_module, "atomic_path", full)
    assert open_shard(path, cache=tmp_path / "no folder").num_keys == 3


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mc2_hpc"


def tar_of(path: Path, files: list[tuple[str, bytes]]) -> Path:
    write_tar(path, files)
    os.utime(path, (DAY_AGO, DAY_AGO))
    return path


@pytest.mark.parametrize("name", ["/etc/passwd.jpg", "../up.jpg", "a/../../b.jpg", "./../c.txt", "a\\b.jpg"])
def test_names_that_lead_out_are_left_out_and_counted(name: str, tmp_path: Path) -> None:
    path = tar_of(tmp_path / "0.tar", [(name, b"x"), ("./ok.jpg", b"y"), ("ok.txt", b"z")])
    for _ in range(2):
        shard = open_shard(path)
        assert contents(shard)[0].key == "ok" and (shard.num_keys, shard.drops) == (1, {"name_unsafe": 1})


def test_a_tar_without_files(tmp_path: Path) -> None:
    with pytest.raises(ShardError, match="holds no files"):
        open_shard(tar_of(tmp_path / "0.tar", []))


@pytest.mark.parametrize("order", [("jpg", "json", "txt"), ("txt", "jpg", "json"), ("json", "txt", "jpg")])
@pytest.mark.parametrize("lang", ["", "ja"])
def test_a_sample_is_one_read_wherever_its_files_lie(
    order: tuple[str, ...], lang: str, tmp_path: Path, reads: list[int]
) -> None:
    files = {"jpg": b"j" * 3_000, "txt": b"words", "json": b'{"lang": "ja"}' if lang else b'{"language": 1'}
    path = tar_of(tmp_path / "0.tar", [(f"k{i}.{kind}", files[kind]) for i in range(3) for kind in order])
    for _ in range(2):
        shard = open_shard(path)
        reads.clear()
        assert [shard.read(row, seed=0, epoch=0) for row in range(3)] == [
            Pair(f"k{i}", b"j" * 3_000, "words", lang) for i in range(3)
        ]
        assert len(reads) == 3 and max(reads) < 3_000 + 5 * 512 + 20


def test_files_that_lie_apart_are_read_one_by_one(tmp_path: Path, reads: list[int]) -> None:
    rows = range(20)
    names = [[(f"k{i}.{kind}", kind) for i in rows] for kind in ("jpg", "json", "txt")]
    content = {"jpg": b"j" * 3_000, "json": b'{"lang": "ja"}', "txt": b"words"}
    path = tar_of(tmp_path / "0.tar", [(name, content[kind]) for group in names for name, kind in group])
    for _ in range(2):
        shard = open_shard(path)
        reads.clear()
        assert [shard.read(row, seed=0, epoch=0) for row in rows] == [
            Pair(f"k{i}", content["jpg"], "words", "ja") for i in rows
        ]
        assert reads == [3_000, 5, 14] * 20


def test_an_index_of_another_version_is_no_change_of_the_tar(tmp_path: Path) -> None:
    path = write(tmp_path / "0.tar", 20)
    open_shard(path)
    data = kept(path).read_bytes()
    kept(path).write_bytes(data[:6] + b"0" + data[7:])
    assert not open_shard(path).changed and kept(path).read_bytes() == data
