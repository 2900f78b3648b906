"""The exported tokenizer gives our ids for any raw captions."""

import gzip
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto

from mc2_hpc.conversion.tokenizer_files import tokenizer_json, write_tokenizer
from mc2_hpc.data.tokenizer import Tokenizer, train_tokenizer
from mc2_hpc.errors import UserError

STYLES = ["xlmv", "mt5", "gemma"]
FORGERIES = ["a </s> b", "</s>", "<s>x<pad>", "<unk> and <mask>", "<eos>y<bos>", "＜/s＞", "</S>", "<PAD> <EOS>"]


@pytest.fixture(scope="module")
def exported(
    tokenizers: dict[str, Tokenizer], tmp_path_factory: pytest.TempPathFactory, transformers: ModuleType
) -> dict[str, Any]:
    loaded = {}
    for style, tokenizer in tokenizers.items():
        folder = tmp_path_factory.mktemp(style)
        write_tokenizer(tokenizer.model_file, style, 24, folder)
        loaded[style] = transformers.AutoTokenizer.from_pretrained(folder)
    return loaded


def ids(tokenizer: Any, texts: list[str], length: int = 24) -> list[list[int]]:
    return tokenizer(texts, padding="max_length", truncation=True, max_length=length)["input_ids"]


def our_ids(tokenizer: Tokenizer, texts: list[str], length: int = 24) -> list[list[int]]:
    return Tokenizer(tokenizer.model_file, tokenizer.style, length).encode(texts, pad_to_context=True).tolist()


@pytest.mark.parametrize("style", STYLES)
def test_ids_are_ours(
    style: str, tokenizers: dict[str, Tokenizer], exported: dict[str, Any], captions: list[str]
) -> None:
    assert ids(exported[style], captions) == our_ids(tokenizers[style], captions)
    assert len(exported[style]) == tokenizers[style].vocab_size
    assert exported[style].eos_token_id == tokenizers[style].eos_id
    assert exported[style].pad_token_id == tokenizers[style].pad_id
    assert exported[style].model_max_length == 24


@pytest.mark.parametrize("style", STYLES)
def test_a_caption_cannot_forge_a_special_token(
    style: str, tokenizers: dict[str, Tokenizer], exported: dict[str, Any]
) -> None:
    rows = ids(exported[style], FORGERIES)
    assert rows == our_ids(tokenizers[style], FORGERIES)
    assert all(row.count(tokenizers[style].eos_id) == 1 for row in rows)


@pytest.mark.parametrize("style", STYLES)
def test_nor_where_the_vocabulary_lacks_its_characters(style: str, tmp_path: Path, transformers: ModuleType) -> None:
    """Without "<" in the vocabulary, the special piece is the only segmentation of "</s>"."""
    texts = ["forty two", "drei Hunde", "sept chats", "pad mask bos unk eos s"] * 20
    tokenizer = train_tokenizer(texts, tmp_path / "m.model", vocab_size=330 if style == "gemma" else 60, style=style)
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(tokenizer.model_file, style, 24, out)
    assert ids(transformers.AutoTokenizer.from_pretrained(out), FORGERIES) == our_ids(tokenizer, FORGERIES)


# Ordinary characters, characters that the tokenizer treats specially, and parts of special tokens.
_TEXT = st.text(st.sampled_from("abcdzA Σςσ ΑΊ</s>__-.,!  \t\nдом日本語でสวัสดีمرحباé①ﬁ　🙂"), max_size=30)


@pytest.mark.parametrize("style", STYLES)
@given(texts=st.lists(st.one_of(_TEXT, st.sampled_from(FORGERIES)), min_size=1, max_size=4).map("".join))
@settings(max_examples=150, deadline=None)
def test_ids_are_ours_for_any_caption(
    style: str, texts: str, tokenizers: dict[str, Tokenizer], exported: dict[str, Any]
) -> None:
    # After two combining marks, Python lowers a sigma to its final form, unlike Rust, in which tokenizers is written.
    assume(not re.search("[ัี]{2,}Σ", texts))
    row, theirs = our_ids(tokenizers[style], [texts], 64)[0], ids(exported[style], [texts], 64)[0]
    if row != theirs:  # for two segmentations with the same score, rounding may decide
        scores = [_score(tokenizers[style], found) for found in (row, theirs)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)
        assert style != "gemma"


def _score(tokenizer: Tokenizer, row: list[int]) -> float:
    model = tokenizer._model
    shift = tokenizer._style.shift
    return sum(model.get_score(i - shift) for i in row if i not in (0, 1, 2, 3))


def test_real_captions_give_our_ids(shared_data: Path, tmp_path: Path, transformers: ModuleType) -> None:
    captions: list[str] = []
    for path in sorted((shared_data / "multi30k").glob("train.*.gz")):
        captions += gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()[:500]
    names = json.loads((shared_data / "babel_imagenet-298.json").read_text(encoding="utf-8"))
    captions += [str(name) for language in names.values() for name in language[1][:10]]
    tokenizer = train_tokenizer(captions, tmp_path / "m.model", vocab_size=8000, style="xlmv")
    out = tmp_path / "out"
    out.mkdir()
    write_tokenizer(tokenizer.model_file, "xlmv", 77, out)
    ours = our_ids(tokenizer, captions, 77)
    theirs = ids(transformers.AutoTokenizer.from_pretrained(out), captions, 77)
    different = sum(a != b for a, b in zip(ours, theirs, strict=True))
    assert len(captions) > 4000
    assert different <= len(captions) / 1000  # ties


@pytest.mark.parametrize("style", STYLES)
def test_decoding_gives_the_text_back(style: str, exported: dict[str, Any]) -> None:
    text = "joue de la guitare"
    decoded = exported[style].decode(exported[style](text)["input_ids"], skip_special_tokens=True)
    assert decoded == text


def test_open_clips_wrapper_gives_our_ids(
    tokenizers: dict[str, Tokenizer], tmp_path: Path, open_clip: ModuleType, captions: list[str]
) -> None:
    """open_clip first fixes mojibake, HTML entities and whitespace; captions without those give the same ids."""
    for style, tokenizer in tokenizers.items():
        folder = tmp_path / style
        folder.mkdir()
        write_tokenizer(tokenizer.model_file, style, 24, folder)
        wrapped = open_clip.tokenizer.HFTokenizer(folder, context_length=24)
        clean = captions[:13]
        assert wrapped(clean).tolist() == our_ids(tokenizer, clean)


def test_a_kind_of_model_that_cannot_be_expressed(tokenizers: dict[str, Tokenizer]) -> None:
    proto = sentencepiece_proto.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizers["xlmv"].model_file.read_bytes())
    proto.trainer_spec.treat_whitespace_as_suffix = True
    with pytest.raises(UserError, match="^here: only unigram and BPE models with whitespace prefixes"):
        tokenizer_json(proto, "xlmv", "here")


def test_the_layout_of_xlm_v(tokenizers: dict[str, Tokenizer], exported: dict[str, Any]) -> None:
    tokens = exported["xlmv"].convert_ids_to_tokens([0, 1, 2, 3, len(exported["xlmv"]) - 1])
    assert tokens == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    row: Callable[[str], list[int]] = lambda text: exported["xlmv"](text)["input_ids"]  # noqa: E731
    assert row("a")[0] == 0 and row("a")[-1] == 2
    assert exported["mt5"]("a")["input_ids"][-1] == 1
