"""`mc2 tokenizer`: which captions it is trained on, and its figures by language against counts made by hand."""

import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mc2_hpc.cli import main
from mc2_hpc.data.tokenizer import Tokenizer, train_tokenizer
from mc2_hpc.errors import UserError
from mc2_hpc.vocabulary.captions import NO_LANGUAGE, draw_captions, tempered, up_to
from mc2_hpc.vocabulary.inspect import inspect_tokenizer

COUNTS = {"en": 4000, "de": 400, "ja": 40}
WORDS = {"en": "house", "de": "Haus", "ja": "家"}

Rows = list[tuple[str, str, str | None]]
WritePool = Callable[..., Path]


def rows() -> Rows:
    """(key, text, lang)"""
    return [(f"{lang}{n}", f"{WORDS[lang]} {n}", lang) for lang, count in COUNTS.items() for n in range(count)]


@pytest.fixture
def write_pool(tmp_path: Path) -> WritePool:
    def write(found: Rows, *, shards: int = 2, name: str = "pool", with_lang: bool = True) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for shard in range(shards):
            keys, texts, langs = zip(*found[shard::shards], strict=True)
            columns = {"key": keys, "text": texts} | ({"lang": langs} if with_lang else {})
            pq.write_table(pa.table(columns), folder / f"{shard}.parquet")
        return folder

    return write


def test_the_choice_does_not_depend_on_shards(write_pool: WritePool) -> None:
    shuffled = rows()
    random.Random(0).shuffle(shuffled)
    one = draw_captions(write_pool(rows(), shards=1, name="one"), up_to(100), seed=3)
    many = draw_captions(write_pool(shuffled, shards=5, name="many"), up_to(100), seed=3)
    assert one == many
    assert one != draw_captions(write_pool(rows(), name="other"), up_to(100), seed=4)
    assert one.available == COUNTS


def test_numbers_drawn_are_the_quotas(write_pool: WritePool) -> None:
    drawn = draw_captions(write_pool(rows()), tempered(1000, 0.3))
    quotas = tempered(1000, 0.3)(COUNTS)
    assert len(drawn.texts["ja"]) == quotas["ja"] == 40  # fewer than its share, so all of them
    for lang in ("en", "de"):
        spread = (quotas[lang] * (1 - quotas[lang] / COUNTS[lang])) ** 0.5
        assert abs(len(drawn.texts[lang]) - quotas[lang]) < 4 * spread
    assert set(drawn.texts["de"]) <= {text for _, text, lang in rows() if lang == "de"}


@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("total", [10, 500, 4439, 4440, 10_000])
def test_quotas_sum_to_the_total_and_follow_the_power(alpha: float, total: int) -> None:
    quotas = tempered(total, alpha)(COUNTS)
    assert sum(quotas.values()) == pytest.approx(min(total, sum(COUNTS.values())))
    free = [lang for lang in COUNTS if quotas[lang] < COUNTS[lang] - 1e-9]
    ratios = [quotas[lang] / COUNTS[lang] ** alpha for lang in free]
    assert ratios == pytest.approx(ratios[:1] * len(ratios))
    assert all(quotas[lang] <= COUNTS[lang] for lang in COUNTS)


def test_unusable_captions_are_counted(write_pool: WritePool) -> None:
    found: Rows = [("a", "a house", None), ("b", " ", "en"), ("a", "a house", None), ("", "no key", "en")]
    drawn = draw_captions(write_pool(found, shards=1), up_to(10))
    assert drawn.texts == {NO_LANGUAGE: ["a house"]}
    assert drawn.drops == Counter(caption_empty=1, caption_repeated=1, key_missing=1)
    with pytest.raises(UserError, match="no caption that can be used .caption_empty 1"):
        draw_captions(write_pool([("b", "", "en")], shards=1, name="empty"), up_to(10))


@pytest.mark.parametrize("style", ["xlmv", "gemma"])
def test_figures_equal_counts_by_hand(tmp_path: Path, style: str) -> None:
    trained_on = [f"a {word} number {n}" for n in range(100) for word in ("house", "river")]
    tokenizer = train_tokenizer(
        trained_on, tmp_path / "m.model", vocab_size=300 if style == "gemma" else 60, style=style
    )
    tokenizer = Tokenizer(tokenizer.model_file, style, context_length=20)
    # zho_Hans is Chinese, which has no spaces between words. The vocabulary has no 家.
    texts = {"en": ["a house number 7", "a river"], "zho_Hans": ["家" * 20], "none": []}
    english, chinese = inspect_tokenizer(tokenizer, texts)
    lengths = [int((row != tokenizer.pad_id).sum()) for row in tokenizer.encode(texts["en"])]
    special = 20 - tokenizer.room
    assert english.tokens_per_caption == sum(lengths) / 2 - special
    assert english.tokens_per_word == (sum(lengths) - 2 * special) / 6
    assert english.characters_per_token == len("a house number 7a river") / (sum(lengths) - 2 * special)
    assert (english.unknown, english.bytes, english.truncated) == (0, 0, 0)
    assert (chinese.lang, chinese.captions, chinese.tokens_per_word) == ("zho_Hans", 1, None)
    if style == "gemma":  # three bytes per character
        assert (chinese.tokens_per_caption, chinese.bytes, chinese.unknown, chinese.truncated) == (60, 1, 0, 1)
    else:  # sentencepiece joins neighbouring unknown characters to one piece; the first piece is the leading space
        assert (chinese.tokens_per_caption, chinese.bytes, chinese.unknown, chinese.truncated) == (2, 0, 0.5, 0)


def test_truncation_is_what_encode_cuts(tmp_path: Path) -> None:
    letters = train_tokenizer(["abcdefgh " * 20], tmp_path / "m.model", vocab_size=14, style="mt5")
    tokenizer = Tokenizer(letters.model_file, "mt5", context_length=10)
    texts = ["hgfedcba"[:n] for n in range(1, 9)] + ["hgfedcbahgfedcba"]
    (figures,) = inspect_tokenizer(tokenizer, {"en": texts})
    cut = sum(len(row) > 9 for row in tokenizer.content(texts))
    assert 0 < cut < len(texts)
    assert figures.truncated == cut / len(texts)
    assert [row[:9] for row in tokenizer.content(texts)] == tokenizer.content(texts, most=9)


def test_command_line(write_pool: WritePool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pool, model = write_pool(rows()), tmp_path / "new" / "sp.model"
    train = ["tokenizer", "train", str(pool), "--style", "gemma", "--vocab-size", "290", "--captions", "600"]
    assert main([*train, "--out", str(model)]) == 0
    out, err = capsys.readouterr()
    assert f"{model}: 290 ids, data.tokenizer_style=gemma" in out
    assert "captions in 3 languages" in err
    assert main([*train, "--out", str(tmp_path / "again.model")]) == 0
    assert (tmp_path / "again.model").read_bytes() == model.read_bytes()
    capsys.readouterr()
    inspect = ["tokenizer", "inspect", str(pool), "--style", "gemma", "--model", str(model)]
    assert main([*inspect, "--context-length", "8", "--json", str(tmp_path / "facts.json")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table[2:]] == ["en", "de", "ja"]
    assert max(map(len, table[1:])) <= 80
    facts = json.loads((tmp_path / "facts.json").read_text(encoding="utf-8"))
    assert facts["vocab_size"] == 290
    assert {row["lang"]: row["tokens_per_word"] is None for row in facts["languages"]} == dict(
        en=False, de=False, ja=True
    )


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "POOL", "--style", "mt5", "--vocab-size", "100", "--out", "."], "is a folder; name the file"),
        (
            ["train", "POOL", "--style", "mt5", "--vocab-size", "100", "--out", "x", "--alpha", "nan"],
            "must be a number",
        ),
        (["train", "POOL", "--style", "mt5", "--vocab-size", "16", "--out", "x"], "no tokenizer of 16 ids fits"),
        (["train", "nowhere", "--style", "mt5", "--vocab-size", "100", "--out", "x"], "nowhere"),
        (["inspect", "POOL", "--style", "mt5", "--model", "nowhere"], "nowhere: no such sentencepiece model"),
    ],
)
def test_bad_input_is_one_line(
    write_pool: WritePool, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    pool = str(write_pool(rows()))
    assert main(["tokenizer", *(pool if word == "POOL" else word for word in words)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mc2: ") and message in error
