"""Words in languages without spaces: installed packages are really run, missing ones are tested by their error."""

import sys
from importlib.util import find_spec

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.metadata import segmenters
from mc2_hpc.metadata.languages import LANGUAGES
from mc2_hpc.metadata.segmenters import (
    DEFAULT_SEGMENTERS,
    SEGMENTERS,
    choose_segmenter,
    load_segmenter,
    segmenter_versions,
)

SENTENCES = [
    # language, package, sentence, words that must be in the result
    ("ja", "fugashi", "新しいカメラで東京タワーを撮りました。", "カメラ 東京 タワー 。"),
    ("th", "pythainlp", "ฉันชอบกินข้าวผัดที่กรุงเทพ", "ฉัน ชอบ กิน กรุงเทพ"),
    ("zh", "rjieba", "我在北京拍照片，New York也好", "我 北京 ， New York"),
    ("zh_yue", "rjieba", "香港係一個城市", "香港 城市"),
    ("km", "khmercut", "ខ្ញុំរៀនភាសាខ្មែរ\u200bនៅភ្នំពេញ។", "ខ្ញុំ រៀន ភ្នំពេញ ។"),
    ("lo", "laonlp", "ຂ້ອຍຢູ່ວຽງຈັນ", "ຂ້ອຍ ຢູ່ ວຽງຈັນ"),
    ("my", "icu", "မြန်မာနိုင်ငံသည်အာရှတွင်တည်ရှိသည်။", "မြန်မာနိုင်ငံ သည် ။"),
    ("bo", "botok", "བཀྲ་ཤིས་བདེ་ལེགས་ཞུས་རྒྱུ་ཡིན།", "བཀྲ་ཤིས་བདེ་ལེགས་ ཞུས་ ། ཡིན"),
]
MODULES = {"icu": "icu"}


@pytest.mark.parametrize("lang, name, sentence, words", SENTENCES, ids=[row[0] for row in SENTENCES])
def test_a_sentence_of_each_language(lang, name, sentence, words):
    assert choose_segmenter(lang, {}) == name
    if find_spec(MODULES.get(name, name)) is None:
        pytest.skip(f"no segmenter of {LANGUAGES[lang].name}: pip install {' '.join(SEGMENTERS[name].distributions)}")
    try:
        found = load_segmenter(name, lang)(sentence)
    except UserError as error:
        if "has no word list" not in str(error):
            raise
        pytest.skip(str(error))
    assert set(words.split()) <= set(found)
    assert all(word == word.strip() != "" for word in found)
    assert "".join(found) == sentence.replace(" ", "").replace("\u200b", "")
    assert set(SEGMENTERS[name].distributions) <= set(segmenter_versions(name))


def test_every_language_without_spaces_has_a_package_or_an_error():
    for code, row in LANGUAGES.items():
        if row.spaced:
            assert choose_segmenter(code, {}) == segmenters.SPACES and code not in DEFAULT_SEGMENTERS
        elif code not in DEFAULT_SEGMENTERS:
            with pytest.raises(UserError, match=f"no segmenter is known for it; .*--segmenter {code}=characters"):
                choose_segmenter(code, {})
    assert set(DEFAULT_SEGMENTERS.values()) == set(SEGMENTERS)


def test_characters_only_by_name():
    assert choose_segmenter("shn", {"shn": "characters"}) == "characters"
    assert load_segmenter("characters", "ja")("東京tower") == ["東", "京", "tower"]
    with pytest.raises(UserError, match="segmenter ja=mecab: choose one of characters, botok"):
        choose_segmenter("ja", {"ja": "mecab"})


@pytest.mark.parametrize("name", SEGMENTERS)
def test_a_missing_package_is_named_with_its_cure(name, monkeypatch):
    module = MODULES.get(name, name)
    for loaded in [key for key in sys.modules if key.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setitem(sys.modules, module, None)
    load_segmenter.cache_clear()
    with pytest.raises(UserError, match=f"pip install {SEGMENTERS[name].distributions[0]}"):
        load_segmenter(name, "ja")
    load_segmenter.cache_clear()


def test_versions_of_a_missing_package(monkeypatch):
    def absent(name):
        raise segmenters.PackageNotFoundError(name)

    monkeypatch.setattr(segmenters, "version", absent)
    with pytest.raises(UserError, match="segmenter fugashi: .*pip install fugashi ipadic"):
        segmenter_versions("fugashi")
    assert segmenter_versions("spaces") == {}
