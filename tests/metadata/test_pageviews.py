"""Views of titles, from hourly files."""

import gzip

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.metadata import pageviews
from mc2_hpc.metadata.pageviews import count_views, rank_titles
from mc2_hpc.metadata.workers import Workers

HOUR = """\
"" Some_page 99 0
de Hund 51 0
en Main_Page 50 0
en Dog 49 0
en Cat_food 80 0
en Talk:Dog 900 0
en - 900 0
en Caf%C3%A9 60 0
en Talk%3ADog 60 0
en bad%FFescape 60 0
en 100%_Wolf 70 0
en.d word 900 0
en.b book 900 0
en.m Cat_food 60 0
en.m.d word 900 0
en.zero Cat_food 900 0
enx Cat_food 900 0
zh-yue 香港 77 0
not a line
"""


def hour(path, text=HOUR):
    path.write_bytes(gzip.compress(text.encode()))
    return path


def views(paths, codes, **options):
    with Workers() as workers:
        return count_views(paths, codes, workers=workers, **options)


def test_own_domain_and_its_mobile_one_from_fifty_views_an_hour(tmp_path):
    found = views([hour(tmp_path / "a.gz")], ["en", "zh_yue", "sw"])
    assert found == {
        "en": {"Main Page": 50, "Cat food": 140, "Café": 60, "100% Wolf": 70},
        "zh_yue": {"香港": 77},
        "sw": {},
    }


def test_a_lower_threshold_and_a_sum_over_files(tmp_path):
    files = [hour(tmp_path / "a.gz"), hour(tmp_path / "b.gz", "en Dog 7 0\nen Cow 6 0\n")]
    found = views(files, ["en"], min_views=7)["en"]
    assert found["Dog"] == 56 and "Cow" not in found


def test_blocks_are_cut_between_lines(tmp_path, monkeypatch):
    whole = views([hour(tmp_path / "a.gz")], ["en", "de", "zh_yue"])
    monkeypatch.setattr(pageviews, "_BLOCK_BYTES", 7)
    assert views([tmp_path / "a.gz"], ["en", "de", "zh_yue"]) == whole


def test_rank():
    assert rank_titles({"b": 1, "c": 9, "a": 1}) == ["c", "a", "b"]


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "no such file"),
        (b"plain", "cannot be read"),
        (gzip.compress(HOUR.encode(), mtime=0)[:50], "cannot be read"),
        (gzip.compress(b"<html>\n", mtime=0), "no line has the form `<domain> <title> <views> <bytes>`"),
    ],
)
def test_bad_files_are_named(tmp_path, content, message):
    if content is not None:
        (tmp_path / "h.gz").write_bytes(content)
    with pytest.raises(UserError, match=rf"h\.gz: {message}"):
        views([tmp_path / "h.gz"], ["en"])
