"""The language table: one row per Wikipedia, joining the code systems of language id, Wikipedia and the wordnets.

``languages.tsv`` has a row for every Wikipedia: those of May 2024 (the recipe's 330, and 13 that are closed), and the
21 opened since then, as of August 2026. A row's code is Wikipedia's (with ``_`` for ``-``). Its *curation language* is
the name of its texts in the rest of the product: the ``lang`` column of a pool and the file ``metadata/<code>.json``.
It is the row's own code, except for

- another register or orthography of a language, or a dialect without its own ISO 639-3 code: Simple English,
  Taraškievica, Classical Chinese, Dutch Low Saxon, Banyumasan (Javanese), Tarantino (Neapolitan), Western Armenian;
- a member of the same ISO 639-3 macrolanguage, in the same script, that language id cannot distinguish from it: Gan
  (Chinese), Moroccan Arabic, Võro (Estonian), Latgalian (Latvian), Komi-Permyak (Komi), Banjar (Malay).

These are merged into the language named in the ``curation`` column.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files

OTHER = "other"
"""Curation language of Wikipedias in languages that lid.176 does not know, if a build is told to merge them."""


@dataclass(frozen=True, slots=True)
class Language:
    """A language and its codes in other systems."""

    code: str
    name: str
    script: str
    """ISO 15924 code of the script its Wikipedia is mainly written in."""
    spaced: bool
    """Whether words are separated by spaces: determines how a corpus is split and how bigrams are joined."""
    lid: tuple[str, ...]
    """Labels of fastText's lid.176 and of py3langid; none if the models do not know the language."""
    wiki: str
    """Prefix of Wikipedia's database name: the dump is ``<wiki>wiki-<date>-pages-articles.xml.bz2``."""
    wordnet: tuple[str, ...]
    """Codes in the Open Multilingual Wordnet; ``eng`` is Princeton's, ``als`` is Albanian."""
    curation: str
    """Code of the language that this Wikipedia's entries are merged into; its own code if not merged."""
    iso: tuple[str, ...]
    """ISO 639-3 codes: the language's own; then those of members that models use to name a macrolanguage (``ara``,
    ``arb``), and of members without a Wikipedia that models distinguish from it (``apc``)."""

    @property
    def domain(self) -> str:
        """The subdomain of wikipedia.org."""
        return self.code.replace("_", "-")


def _read_table() -> dict[str, Language]:
    lines = files(__package__).joinpath("languages.tsv").read_text(encoding="utf-8").splitlines()
    table = {}
    for line in lines[1:]:
        code, name, script, spaced, lid, wiki, wordnet, curation, iso = line.split("\t")
        table[code] = Language(
            code=code,
            name=name,
            script=script,
            spaced=spaced == "yes",
            lid=_codes(lid),
            wiki=wiki,
            wordnet=_codes(wordnet),
            curation=curation,
            iso=_codes(iso),
        )
    return table


def _codes(cell: str) -> tuple[str, ...]:
    return tuple(cell.split(",")) if cell else ()


LANGUAGES: dict[str, Language] = _read_table()
"""Every known language by code, in code order."""

_BY_LID = {label: row.curation for row in LANGUAGES.values() for label in row.lid}
_BY_ISO = {iso: row.curation for row in LANGUAGES.values() for iso in row.iso}
_ROW_BY_ISO = {iso: row.code for row in LANGUAGES.values() for iso in row.iso}
_BY_WORDNET = {wordnet: row.code for row in LANGUAGES.values() for wordnet in row.wordnet}
_BY_SCRIPT = {("az", "Arab"): "azb", ("ku", "Arab"): "ckb", ("pa", "Arab"): "pnb"}
"""Languages whose Wikipedias differ by script, by their code without a script."""
_BY_WIKI = {row.wiki: row.code for row in LANGUAGES.values()}


@cache
def code_of_lid(label: str) -> str:
    """Curation language of a language-id model's label; a label without a row is its own code.

    Labels are those of lid.176 or py3langid, Wikipedia's codes, or ISO 639-3, with or without a script (``arb_Arab``,
    as in the NLLB and GlotLID models). ``als`` is lid.176's Alemannic; ``als_Latn`` is ISO's Albanian.
    """
    if label in _BY_LID:
        return _BY_LID[label]
    if label in LANGUAGES:
        return LANGUAGES[label].curation
    iso, _, script = label.partition("_")
    return _BY_ISO.get(iso, label) if not script or (len(script) == 4 and script.istitle()) else label


@lru_cache(maxsize=1 << 12)
def code_of_tag(tag: str) -> str | None:
    """Curation language of a code in any common system; None for a code without a row.

    Accepted, in upper or lower case, with hyphens or underscores: our own codes and the labels of :func:`code_of_lid`;
    BCP 47 (``zh-Hant-HK``, ``pt-BR``, ``iw``); ISO 639-1, 639-2 (``ger``) and 639-3; FLORES (``eng_Latn``); POSIX
    locales (``pt_BR.UTF-8``). Region and variant do not matter; a script does only if each has its own Wikipedia.
    """
    tag = re.split("[.@]", tag.strip(), maxsplit=1)[0]
    plain = code_of_lid(tag.lower().replace("-", "_"))
    if plain in LANGUAGES:
        return plain
    from langcodes import Language as Tag  # imported here: most pools use our codes
    from langcodes import LanguageTagError

    try:
        written, standard = Tag.get(tag, normalize=False), Tag.get(tag)
    except LanguageTagError:
        return None
    names = [*(written.extlangs or ()), written.language, standard.language, standard.prefer_macrolanguage().language]
    for name in filter(None, names):
        code = _BY_ISO.get(name) or code_of_lid(name)
        if code in LANGUAGES:
            return _BY_SCRIPT.get((code, standard.script or ""), code)
    return None


def is_language_code(tag: str) -> bool:
    """Whether a tag names a language: one with a row, :data:`OTHER`, or any other that BCP 47 has registered."""
    if tag == OTHER or code_of_tag(tag) is not None:
        return True
    from langcodes import Language as Tag
    from langcodes import LanguageTagError

    try:
        return Tag.get(tag).is_valid()
    except LanguageTagError:
        return False


def known_code(tag: str | None, known: Collection[str]) -> str | None:
    """The language in ``known`` (a metadata folder's languages) that a pool's ``tag`` refers to; None if there is none.

    A tag that is in ``known`` as it is stands for itself, so that languages without a row need no code of ours. A tag
    without a file maps to :data:`OTHER` if that file exists and lid.176 does not know the language.
    """
    if tag is None or tag in known:
        return tag
    code = code_of_tag(tag)
    if code is None or code in known:
        return code
    merged = curation_code(code, merge_unknown=True)
    return merged if merged in known else None


def curation_code(code: str, *, merge_unknown: bool = False) -> str:
    """Curation language of a Wikipedia code; a code without a row is its own.

    Args:
        merge_unknown: return :data:`OTHER` if lid.176 has no label for the curation language.
    """
    if code not in LANGUAGES:
        return code
    curation = LANGUAGES[code].curation
    return OTHER if merge_unknown and not LANGUAGES[curation].lid else curation


def code_of_wordnet(wordnet: str) -> str | None:
    """Our code for an Open Multilingual Wordnet code, either its own or ISO 639-3; None without a row."""
    return _BY_WORDNET.get(wordnet) or _ROW_BY_ISO.get(wordnet)


def code_of_folder(name: str) -> str:
    """Our code for a folder's name, which may also be Wikipedia's subdomain or database prefix, or ISO 639-3, in upper
    or lower case; otherwise the name itself."""
    code = name.replace("-", "_").lower()
    return code if code in LANGUAGES else _BY_WIKI.get(code) or _ROW_BY_ISO.get(code, name)


def is_spaced(code: str) -> bool:
    """Whether the language separates words with spaces; true for a language without a row."""
    return LANGUAGES[code].spaced if code in LANGUAGES else True
