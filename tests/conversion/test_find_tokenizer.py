"""The tokenizer of a folder: its sentencepiece file, or one rebuilt from tokenizer.json, fitted to the model's rows."""

from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto

from mc2_hpc.conversion.find_tokenizer import find_tokenizer, fit_to_rows
from mc2_hpc.conversion.tokenizer_files import MODEL_NAMES, write_tokenizer
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.errors import UserError

STYLES = ["xlmv", "mt5", "gemma"]


@pytest.mark.parametrize("style", STYLES)
def test_the_way_back_finds_file_and_style(style: str, tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    tokenizer = tokenizers[style]
    write_tokenizer(tokenizer.model_file, style, 24, tmp_path)
    path, found = find_tokenizer(tmp_path, tokenizer.eos_id, tokenizer.vocab_size, tmp_path / "out")
    assert found == style and path.name == MODEL_NAMES[style]
    assert path.read_bytes() == tokenizer.model_file.read_bytes()


def test_the_way_back_says_what_is_wrong(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sentencepiece model there .* copy the one that the model was trained with"):
        find_tokenizer(tmp_path, 2, 1000, tmp_path / "out")
    write_tokenizer(tokenizers["xlmv"].model_file, "xlmv", 24, tmp_path)
    size = tokenizers["xlmv"].vocab_size
    with pytest.raises(
        UserError, match=rf"EOS id 2 and {size} ids do not fit the model \(EOS id 2, 10 embedding rows\)"
    ):
        find_tokenizer(tmp_path, 2, 10, tmp_path / "out")
    with pytest.raises(UserError, match=rf"do not fit the model \(EOS id 1, {size} embedding rows\)"):
        find_tokenizer(tmp_path, 1, size, tmp_path / "out")
    (tmp_path / MODEL_NAMES["xlmv"]).write_bytes(b"not a model")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        find_tokenizer(tmp_path, 2, size, tmp_path / "out")


@pytest.mark.parametrize("style", STYLES)
def test_only_a_tokenizer_json(
    style: str, tokenizers: dict[str, Tokenizer], tmp_path: Path, captions: list[str]
) -> None:
    tokenizer = tokenizers[style]
    write_tokenizer(tokenizer.model_file, style, 24, tmp_path)
    (tmp_path / MODEL_NAMES[style]).unlink()
    path, found = find_tokenizer(tmp_path, tokenizer.eos_id, tokenizer.vocab_size, tmp_path / "out")
    assert found == style and path == tmp_path / "out" / "tokenizer.model"
    rebuilt = Tokenizer(path, style)
    assert rebuilt.vocab_size == tokenizer.vocab_size
    assert rebuilt.encode(captions).tolist() == tokenizer.encode(captions).tolist()


def with_sentinels(tokenizer: Tokenizer, path: Path, count: int) -> Tokenizer:
    """The tokenizer with sentinels after its pieces, as mT5's file has them."""
    proto = sentencepiece_proto.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(tokenizer.model_file.read_bytes())
    for number in reversed(range(count)):
        proto.pieces.add(piece=f"▁<extra_id_{number}>", score=0.0, type=4)
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(proto.SerializeToString())
    return Tokenizer(path, tokenizer.style)


def test_rows_without_sentinels(tokenizers: dict[str, Tokenizer], tmp_path: Path, captions: list[str]) -> None:
    """As in the released mT5 models of 250,000 rows: a caption that spells a sentinel gets no id beyond the rows."""
    mt5 = tokenizers["mt5"]
    full = with_sentinels(mt5, tmp_path / "in/spiece.model", 10)
    spelled = ["▁＜extra＿id＿3＞", "＜extra＿id＿0＞"]
    assert int(full.encode(spelled).max()) >= mt5.vocab_size  # full-width characters pass the cleaning
    path, style = find_tokenizer(tmp_path / "in", 1, mt5.vocab_size, tmp_path)
    cut = Tokenizer(path, style)
    assert cut.vocab_size == mt5.vocab_size and int(cut.encode(spelled).max()) < mt5.vocab_size
    assert cut.encode(captions).tolist() == mt5.encode(captions).tolist() == full.encode(captions).tolist()
    assert find_tokenizer(tmp_path / "in", 1, full.vocab_size, tmp_path)[0] == full.model_file
    assert fit_to_rows(full, mt5.vocab_size - 1, tmp_path / "no.model") is None  # an ordinary piece
