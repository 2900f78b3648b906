"""Which shards a folder, a pattern, a list or braces mean."""

import os

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.shard_paths import expand_braces, list_shards, walk_files


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
def test_braces(pattern, expected):
    assert expand_braces(pattern) == expected


@pytest.mark.parametrize("pattern", ["{5..3}.tar", "{0..99999999}.tar", "{0..9999}{0..9999}.tar"])
def test_braces_that_stand_for_nothing_or_too_much(pattern):
    with pytest.raises(UserError, match=r"not a range of|more than 10,000,000"):
        expand_braces(pattern)


@pytest.fixture
def folder(tmp_path):
    """Shards in two languages, with leftovers of other programs."""
    for lang in ("en", "de"):
        for name in ("0.tar", "1.TAR", "0.parquet", ".2.tar", "notes.txt"):
            (tmp_path / lang / name).parent.mkdir(exist_ok=True)
            (tmp_path / lang / name).touch()
    (tmp_path / ".cache").mkdir()
    (tmp_path / ".cache" / "9.tar").touch()
    return tmp_path


def names(found, folder):
    return [str(path.relative_to(folder)) for path in found]


def test_a_folder_means_its_own_shards_or_those_below(folder):
    assert names(list_shards(folder / "en", ".tar"), folder) == ["en/0.tar", "en/1.TAR"]
    assert names(list_shards(folder, ".tar"), folder) == ["de/0.tar", "de/1.TAR", "en/0.tar", "en/1.TAR"]
    (folder / "top.tar").touch()
    assert names(list_shards(folder, ".tar"), folder) == ["top.tar"]


def test_patterns(folder):
    assert names(list_shards(f"{folder}/*/0.*", ".tar"), folder) == ["de/0.tar", "en/0.tar"]
    assert names(list_shards(f"{folder}/*/0.*", ".tar", ".parquet"), folder) == [
        *("de/0.parquet", "de/0.tar"),
        *("en/0.parquet", "en/0.tar"),
    ]
    assert names(list_shards(f"{folder}/**/0.tar", ".tar"), folder) == ["de/0.tar", "en/0.tar"]
    assert names(list_shards(f"{folder}/e*", ".tar"), folder) == ["en/0.tar", "en/1.TAR"]
    assert names(list_shards(f"{folder}/{{en,de}}/{{0..0}}.tar", ".tar"), folder) == ["de/0.tar", "en/0.tar"]


def test_lists(folder):
    expected = ["de/0.tar", "de/1.TAR", "en/0.tar"]
    assert names(list_shards([f"{folder}/en/0.tar", f"{folder}/de"], ".tar"), folder) == expected
    assert names(list_shards(f"{folder}/en/0.tar::{folder}/de::{folder}/de/0.tar", ".tar"), folder) == expected


def test_home(folder, monkeypatch):
    monkeypatch.setenv("HOME", str(folder))
    assert names(list_shards("~/en", ".tar"), folder) == ["en/0.tar", "en/1.TAR"]


def test_pattern_characters_in_names(folder):
    for name in ("{odd}", "od*d", "[1]"):
        (folder / name).mkdir()
        (folder / name / "0.tar").touch()
        assert names(list_shards(folder / name, ".tar"), folder) == [f"{name}/0.tar"]


def test_links_are_followed_once(folder):
    (folder / "en" / "back").symlink_to(folder)
    (folder / "fr").symlink_to(folder / "de")
    (folder / "dangling.tar").symlink_to(folder / "nowhere")
    found = [path for path in walk_files(folder) if path.name != "dangling.tar"]
    assert len({os.path.realpath(path) for path in found}) == len(found) == 8


def test_what_cannot_be_read_is_listed_to_be_counted(folder):
    (folder / "en" / "gone.tar").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "en" / "pipe.tar")
    assert names(list_shards(folder / "en", ".tar"), folder) == ["en/0.tar", "en/1.TAR", "en/gone.tar", "en/pipe.tar"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere: no such folder, file or pattern"),
        ("en/{0..1}.zip", "no such folder, file or pattern"),
        ("empty", "folder has no .*nor do the folders below it"),
        ("en::", "has an empty name"),
    ],
)
def test_what_is_not_there(name, message, folder):
    (folder / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        list_shards(f"{folder}/{name}", ".tar")
