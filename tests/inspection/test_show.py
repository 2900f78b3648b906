"""``mc2 data show``."""

import pytest

from mc2_hpc.cli import main
from mc2_hpc.errors import UserError
from mc2_hpc.inspection.show import draw_samples, find_samples
from tests.inspection.messy import write_messy


@pytest.fixture(scope="module")
def messy(tmp_path_factory):
    return write_messy(tmp_path_factory.mktemp("messy") / "shards")


def test_a_key_is_found_in_every_shard(messy):
    found = find_samples(messy, "000")
    assert [(sample.shard.rpartition("/")[2], sample.captions) for sample in found] == [
        ("curated.tar", [("one", "en"), ("two", "en")]),
        ("plain.tar", [("a picture 0", "")]),
    ]
    assert (found[1].format, found[1].width, found[1].height) == ("JPEG", 300, 200) and found[1].jpeg
    with pytest.raises(UserError, match="none of 5 shards has the key 'absent'; 3 of them cannot be read"):
        find_samples(messy, "absent")


@pytest.mark.parametrize(
    "key, problem",
    [("empty", "caption_empty"), ("orphan", "image_missing"), ("cut", "image_truncated"), ("bomb", "image_too_large")],
)
def test_problems_are_named(messy, key, problem):
    (sample,) = find_samples(messy, key)
    assert len(sample.problems) == 1 and sample.problems[0].startswith(problem)


def test_samples_are_drawn(messy):
    drawn = list(draw_samples(messy, 100, seed=1))
    assert len(drawn) == 17 and len({(sample.shard, sample.key) for sample in drawn}) == 17
    few = list(draw_samples(messy, 3, seed=1))
    assert few == drawn[:3] and list(draw_samples(messy, 3, seed=2)) != few


def test_the_command(messy, tmp_path, capsys, parse_page):
    assert main(["data", "show", str(messy), "--key", "german", "--page", str(tmp_path / "page.html")]) == 0
    out = capsys.readouterr().out
    assert "PNG 40 x 30" in out and "de    noch ein Bild" in out
    page = parse_page((tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "ein Bild" in page.text and any(source.startswith("data:image/jpeg") for source in page.attributes("src"))
    assert main(["data", "show", str(messy), "--n", "2"]) == 0
    assert capsys.readouterr().out.count(".tar)") == 2
    assert main(["data", "show", str(messy / "zero.tar")]) == 2
    assert "no shard can be read: " in capsys.readouterr().err
