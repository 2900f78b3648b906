"""The language table: one row a language, joining the code systems of language id, Wikipedia and the wordnets.

``code`` is the name by which the rest of the product knows the language: the ``lang`` column of a pool and the file
``metadata/<code>.json``. It is Wikipedia's code wherever there is a Wikipedia.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Language:
    """A language and what others call it."""

    code: str
    name: str
    script: str
    """ISO 15924 code of the script its Wikipedia is written in."""
    spaced: bool
    """Whether words are separated by spaces: decides how bigrams are joined."""
    lid: str | None
    """Label of fastText's lid.176 model; None where the model does not know the language."""
    wiki: str | None
    """Wikipedia's code (``<wiki>wiki-...-pages-articles.xml.bz2``)."""
    wordnet: str | None
    """Code in the Open Multilingual Wordnet; ``eng`` is Princeton's."""


def _rows() -> tuple[Language, ...]:
    spaced = [
        # code, name, script, OMW code
        ("af", "Afrikaans", "Latn", None),
        ("am", "Amharic", "Ethi", None),
        ("ar", "Arabic", "Arab", "arb"),
        ("az", "Azerbaijani", "Latn", None),
        ("be", "Belarusian", "Cyrl", None),
        ("bg", "Bulgarian", "Cyrl", "bul"),
        ("bn", "Bengali", "Beng", None),
        ("bs", "Bosnian", "Latn", None),
        ("ca", "Catalan", "Latn", "cat"),
        ("ceb", "Cebuano", "Latn", None),
        ("ckb", "Central Kurdish", "Arab", None),
        ("cs", "Czech", "Latn", None),
        ("cy", "Welsh", "Latn", None),
        ("da", "Danish", "Latn", "dan"),
        ("de", "German", "Latn", None),
        ("el", "Greek", "Grek", "ell"),
        ("en", "English", "Latn", "eng"),
        ("eo", "Esperanto", "Latn", None),
        ("es", "Spanish", "Latn", "spa"),
        ("et", "Estonian", "Latn", None),
        ("eu", "Basque", "Latn", "eus"),
        ("fa", "Persian", "Arab", "fas"),
        ("fi", "Finnish", "Latn", "fin"),
        ("fr", "French", "Latn", "fra"),
        ("ga", "Irish", "Latn", None),
        ("gl", "Galician", "Latn", "glg"),
        ("gu", "Gujarati", "Gujr", None),
        ("he", "Hebrew", "Hebr", "heb"),
        ("hi", "Hindi", "Deva", None),
        ("hr", "Croatian", "Latn", "hrv"),
        ("hu", "Hungarian", "Latn", None),
        ("hy", "Armenian", "Armn", None),
        ("id", "Indonesian", "Latn", "ind"),
        ("is", "Icelandic", "Latn", "isl"),
        ("it", "Italian", "Latn", "ita"),
        ("jv", "Javanese", "Latn", None),
        ("ka", "Georgian", "Geor", None),
        ("kk", "Kazakh", "Cyrl", None),
        ("kn", "Kannada", "Knda", None),
        ("ko", "Korean", "Kore", None),
        ("ky", "Kyrgyz", "Cyrl", None),
        ("la", "Latin", "Latn", None),
        ("lt", "Lithuanian", "Latn", "lit"),
        ("lv", "Latvian", "Latn", None),
        ("mk", "Macedonian", "Cyrl", None),
        ("ml", "Malayalam", "Mlym", None),
        ("mn", "Mongolian", "Cyrl", None),
        ("mr", "Marathi", "Deva", None),
        ("ms", "Malay", "Latn", "zsm"),
        ("ne", "Nepali", "Deva", None),
        ("nl", "Dutch", "Latn", "nld"),
        ("nn", "Norwegian Nynorsk", "Latn", "nno"),
        ("no", "Norwegian Bokmål", "Latn", "nob"),
        ("or", "Odia", "Orya", None),
        ("pa", "Punjabi", "Guru", None),
        ("pl", "Polish", "Latn", "pol"),
        ("ps", "Pashto", "Arab", None),
        ("pt", "Portuguese", "Latn", "por"),
        ("ro", "Romanian", "Latn", "ron"),
        ("ru", "Russian", "Cyrl", None),
        ("sd", "Sindhi", "Arab", None),
        ("si", "Sinhala", "Sinh", None),
        ("sk", "Slovak", "Latn", "slk"),
        ("sl", "Slovenian", "Latn", "slv"),
        ("sq", "Albanian", "Latn", "als"),
        ("sr", "Serbian", "Cyrl", None),
        ("su", "Sundanese", "Latn", None),
        ("sv", "Swedish", "Latn", "swe"),
        ("sw", "Swahili", "Latn", None),
        ("ta", "Tamil", "Taml", None),
        ("te", "Telugu", "Telu", None),
        ("tg", "Tajik", "Cyrl", None),
        ("tl", "Tagalog", "Latn", None),
        ("tr", "Turkish", "Latn", None),
        ("tt", "Tatar", "Cyrl", None),
        ("ug", "Uyghur", "Arab", None),
        ("uk", "Ukrainian", "Cyrl", None),
        ("ur", "Urdu", "Arab", None),
        ("uz", "Uzbek", "Latn", None),
        ("vi", "Vietnamese", "Latn", None),
        ("yi", "Yiddish", "Hebr", None),
        ("yo", "Yoruba", "Latn", None),
    ]
    unspaced = [
        ("bo", "Tibetan", "Tibt", None),
        ("ja", "Japanese", "Jpan", "jpn"),
        ("km", "Khmer", "Khmr", None),
        ("lo", "Lao", "Laoo", None),
        ("my", "Burmese", "Mymr", None),
        ("th", "Thai", "Thai", "tha"),
        ("zh", "Chinese", "Hani", "cmn"),
    ]
    rows = [Language(c, n, s, True, c, c, w) for c, n, s, w in spaced]
    rows += [Language(c, n, s, False, c, c, w) for c, n, s, w in unspaced]
    rows += [
        Language("simple", "Simple English", "Latn", True, None, "simple", None),
        Language("als", "Alemannic", "Latn", True, "als", "als", None),  # not OMW's `als`, which is Albanian
        Language("zh_yue", "Cantonese", "Hani", False, "yue", "zh_yue", None),
        Language("zh_classical", "Classical Chinese", "Hani", False, None, "zh_classical", None),
        Language("wuu", "Wu Chinese", "Hani", False, "wuu", "wuu", None),
        Language("dz", "Dzongkha", "Tibt", False, None, "dz", None),
    ]
    return tuple(sorted(rows, key=lambda row: row.code))


LANGUAGES: dict[str, Language] = {row.code: row for row in _rows()}
"""Every known language by code, in code order."""

_BY_LID = {row.lid: row.code for row in LANGUAGES.values() if row.lid is not None}


def code_of_lid(label: str) -> str:
    """Our code for a label of lid.176; a label without a row is its own code."""
    return _BY_LID.get(label, label)


def is_spaced(code: str) -> bool:
    """Whether the language separates words by spaces; true for a language without a row."""
    return LANGUAGES[code].spaced if code in LANGUAGES else True
