"""The quickstart's pool: languages, frequencies, noise and reproducibility."""

import io
import tarfile
from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mc2_hpc.data.tokenizer import train_tokenizer
from mc2_hpc.metadata.languages import is_spaced
from mc2_hpc.quickstart.captions import AUTONYMS, LANGUAGES, NOISE, TEMPLATES, number_names, tokenizer_texts
from mc2_hpc.quickstart.images import SIDES, load_handwriting
from mc2_hpc.quickstart.pool import heldout_place, make_pool, zipf


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    steps = []
    summary = make_pool(
        folder, images=600, shards=3, heldout_per_number=2, seed=1, progress=lambda *step: steps.append(step)
    )
    assert steps[-1] == (800, 800) and steps == sorted(steps)
    return folder, summary


def rows_of(folder, name):
    return pa.concat_tables(pq.read_table(path) for path in sorted((folder / name).glob("*.parquet"))).to_pylist()


def mentions(lang: str, text: str, name: str) -> bool:
    return f" {name} " in f" {text} " if is_spaced(lang) else name in text


def test_number_names_are_distinct_in_at_least_twelve_languages_of_eight_scripts():
    names = number_names()
    assert {"en", "de", "fr", "es", "ru", "ja", "th", "ar", "ko", "bn", "am", "tr"} <= set(names)
    assert len(names) >= 12 and set(AUTONYMS) == set(names)
    for lang, of_lang in names.items():
        assert len(set(of_lang)) == 100, lang
    # The 128-code-point block in which a name starts identifies its script; Latin Extended counts as Latin.
    blocks = {ord(of_lang[7][0]) // 128 for of_lang in names.values()}
    assert len({max(block, 3) for block in blocks}) >= 8


def test_no_template_and_no_noise_names_a_number_itself():
    names = number_names()
    for lang, templates in TEMPLATES.items():
        for template in templates:
            assert template.count("{}") == 1
            frame = template.replace("{}", "\x00")
            assert not [name for name in names[lang] if mentions(lang, frame, name)], (lang, template)
    for lang, form in NOISE:
        text = form.replace("{}", "4711")
        assert not [name for name in names[lang] if mentions(lang, text, name)], text


def test_spaced_languages_set_the_name_off_by_spaces():
    for lang, templates in TEMPLATES.items():
        if is_spaced(lang):
            assert all(mentions(lang, template.format("X"), "X") for template in templates), lang


def test_layout(pool):
    folder, summary = pool
    assert sorted(path.name for path in (folder / "pool").iterdir()) == [
        f"pool-{i:05d}.{suffix}" for i in range(3) for suffix in ("parquet", "tar")
    ]
    rows = rows_of(folder, "pool")
    assert set(rows[0]) == {"key", "text", "lang", "source"}
    keys = set()
    for path in sorted((folder / "pool").glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                image = Image.open(io.BytesIO(tar.extractfile(member).read()))
                assert image.format == "JPEG" and image.size[0] == image.size[1] and image.size[0] in SIDES
                assert member.mtime == 0 and member.uid == 0
                keys.add(member.name.removesuffix(".jpg"))
    assert len(keys) == summary.images == 600 and keys == {row["key"] for row in rows}
    assert len(rows) == summary.captions


def test_english_and_small_numbers_are_the_head_and_some_captions_say_nothing(pool):
    folder, _ = pool
    rows, names = rows_of(folder, "pool"), number_names()
    languages = Counter(row["lang"] for row in rows)
    assert languages.most_common(1)[0][0] == "en" and set(languages) == set(LANGUAGES)
    named = [[n for n in range(100) if mentions(row["lang"], row["text"], names[row["lang"]][n])] for row in rows]
    silent = sum(not numbers for numbers in named) / len(rows)
    assert 0.05 < silent < 0.2
    english = Counter(max(ns) for row, ns in zip(rows, named, strict=True) if ns and row["lang"] == "en")
    assert sum(english[n] for n in range(10)) > sum(english[n] for n in range(50, 100))
    several = Counter(row["key"] for row in rows)
    assert sum(count > 1 for count in several.values()) > 200


def test_candidates_of_one_image_name_one_number(pool):
    folder, _ = pool
    names = number_names()
    exact = {(lang, template.format(names[lang][n])): n for lang in LANGUAGES for template in TEMPLATES[lang]
             for n in range(100)}  # fmt: skip
    numbers: dict[str, set[int]] = {}
    for row in rows_of(folder, "pool"):
        if (row["lang"], row["text"]) in exact:
            numbers.setdefault(row["key"], set()).add(exact[row["lang"], row["text"]])
    assert all(len(found) == 1 for found in numbers.values()) and len(numbers) > 500


def test_held_out_images_are_balanced_with_a_caption_per_language(pool):
    folder, summary = pool
    rows, names = rows_of(folder, "heldout"), number_names()
    assert summary.heldout_images == 200 and len(rows) == 200 * len(LANGUAGES)
    assert Counter(row["number"] for row in rows) == {n: 2 * len(LANGUAGES) for n in range(100)}
    for row in rows:
        assert heldout_place(row["key"])[1] == row["number"]
        assert mentions(row["lang"], row["text"], names[row["lang"]][row["number"]])


def test_the_same_seed_writes_the_same_bytes(pool, tmp_path):
    folder, _ = pool
    make_pool(tmp_path / "again", images=600, shards=3, heldout_per_number=2, seed=1)
    for name in ("pool/pool-00001.tar", "pool/pool-00002.parquet", "heldout/heldout-00000.tar"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes(), name
    make_pool(tmp_path / "other", images=20, shards=1, heldout_per_number=1, seed=2)
    assert (tmp_path / "other/pool/pool-00000.tar").read_bytes()[:4096] != (
        folder / "pool/pool-00000.tar"
    ).read_bytes()[:4096]


def test_no_held_out_digit_is_trained_on():
    training, heldout = load_handwriting()
    for digit in range(10):
        seen = {image.tobytes() for image in training.by_class[digit]}
        assert not seen & {image.tobytes() for image in heldout.by_class[digit]}
        assert len(training.by_class[digit]) > 100 and len(heldout.by_class[digit]) > 40


def test_zipf_is_a_distribution_with_the_named_slope():
    p = zipf(100, 1.5)
    assert p.sum() == pytest.approx(1)
    np.testing.assert_allclose(p[0] / p[3], 4**1.5)


def test_the_tokenizer_knows_whole_words(tmp_path):
    names = number_names()
    captions = [TEMPLATES[lang][form].format(name) for lang in LANGUAGES for form in range(6) for name in names[lang]]
    plain = train_tokenizer(captions, tmp_path / "plain.model", vocab_size=1_600, style="xlmv")
    ours = train_tokenizer(tokenizer_texts(captions), tmp_path / "ours.model", vocab_size=1_600, style="xlmv")
    assert ours.vocab_size <= 1_600

    def tokens(tokenizer):
        ids = tokenizer.encode(captions)
        assert not (ids == 3).any()  # <unk>
        return int((ids != tokenizer.pad_id).sum())

    assert tokens(ours) < 0.7 * tokens(plain)
