"""Split text into words, for languages with and without spaces between words.

Languages with spaces are split at the spaces. Every language without them needs a segmenter from its own package;
otherwise there is an error. Single characters replace words only if requested by name.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from mc2_hpc.errors import UserError
from mc2_hpc.metadata.languages import LANGUAGES, is_spaced
from mc2_hpc.metadata.ngrams import Segmenter, Spacing, split_words
from mc2_hpc.metadata.scripts import is_punctuation, is_unspaced

SPACES = "spaces"
"""The recipe's rule: white space separates words; punctuation marks and characters of unspaced scripts are words."""
CHARACTERS = "characters"
"""The same rule, by the name that requests it for a language without spaces."""

_TSHEG = "\u0f0b\u0f0c"
"""Punctuation in Unicode, but written between the syllables of a Tibetan word."""
_ZERO_WIDTH_SPACE = "\u200b"


@dataclass(frozen=True, kw_only=True)
class SegmenterPackage:
    """How a segmenter package is loaded."""

    distributions: tuple[str, ...]
    """What to install; their versions go into the data card."""
    load: Callable[[str], Segmenter]
    """Maps a language code to a function that splits a run of text without spaces and punctuation."""


def _fugashi(lang: str) -> Segmenter:
    tagger = import_module("fugashi").GenericTagger(import_module("ipadic").MECAB_ARGS)
    return lambda text: [word.surface for word in tagger(text)]


def _pythainlp(lang: str) -> Segmenter:
    tokenize = import_module("pythainlp.tokenize").word_tokenize
    return lambda text: tokenize(text, engine="newmm")


def _rjieba(lang: str) -> Segmenter:
    return import_module("rjieba").cut


def _khmercut(lang: str) -> Segmenter:
    return import_module("khmercut").tokenize


def _laonlp(lang: str) -> Segmenter:
    return import_module("laonlp.tokenize").word_tokenize


def _icu(lang: str) -> Segmenter:
    icu = import_module("icu")
    words = icu.BreakIterator.createWordInstance(icu.Locale(lang))

    def segment(text: str) -> list[str]:
        utf16 = icu.UnicodeString(text)  # ICU counts in UTF-16 units
        words.setText(utf16)
        ends = [0, *words]
        return [str(utf16[start:end]) for start, end in zip(ends, ends[1:], strict=False)]

    return segment


def _botok(lang: str) -> Segmenter:
    config = import_module("botok.config")
    if not (Path(config.DEFAULT_BASE_PATH) / config.DEFAULT_DIALECT_PACK).is_dir():
        raise UserError(
            f"botok has no word list in {config.DEFAULT_BASE_PATH}; let it download one: "
            "python -c 'import botok; botok.WordTokenizer()'"
        )
    tokenizer: Any = import_module("botok").WordTokenizer()
    return lambda text: [token["text"] for token in tokenizer.tokenize(text, split_affixes=False)]


SEGMENTERS: Mapping[str, SegmenterPackage] = {
    "botok": SegmenterPackage(distributions=("botok",), load=_botok),
    "fugashi": SegmenterPackage(distributions=("fugashi", "ipadic"), load=_fugashi),
    "icu": SegmenterPackage(distributions=("pyicu",), load=_icu),
    "khmercut": SegmenterPackage(distributions=("khmercut",), load=_khmercut),
    "laonlp": SegmenterPackage(distributions=("laonlp",), load=_laonlp),
    "pythainlp": SegmenterPackage(distributions=("pythainlp",), load=_pythainlp),
    "rjieba": SegmenterPackage(distributions=("rjieba",), load=_rjieba),
}
"""Every package by name."""

DEFAULT_SEGMENTERS: Mapping[str, str] = {
    "bo": "botok",
    "dz": "botok",
    "gan": "rjieba",
    "ja": "fugashi",
    "km": "khmercut",
    "lo": "laonlp",
    "my": "icu",
    "th": "pythainlp",
    "wuu": "rjieba",
    "zh": "rjieba",
    "zh_classical": "rjieba",
    "zh_yue": "rjieba",
}
"""Package for each language without spaces; no package is known for the others."""


def choose_segmenter(lang: str, choices: Mapping[str, str]) -> str:
    """Name of the segmenter for ``lang``: the choice in ``choices``, spaces, or the language's package.

    Raises:
        UserError: no such segmenter, or the language has no spaces and no package.
    """
    names = (CHARACTERS, *SEGMENTERS)
    if lang in choices:
        if choices[lang] not in names:
            raise UserError(f"segmenter {lang}={choices[lang]}: choose one of {', '.join(names)}")
        return choices[lang]
    if is_spaced(lang):
        return SPACES
    if lang not in DEFAULT_SEGMENTERS:
        raise UserError(
            f"{LANGUAGES[lang].name} is written without spaces and no segmenter is known for it; "
            f"count single characters with --segmenter {lang}={CHARACTERS}"
        )
    return DEFAULT_SEGMENTERS[lang]


@cache
def load_segmenter(name: str, lang: str) -> Segmenter:
    """The segmenter ``name`` as a function of a line of text, loaded once per process.

    Packages get runs of text between spaces, zero-width spaces and punctuation, so that their words never span these;
    runs in other scripts are not split.

    Raises:
        UserError: a package is missing; the message has the command that installs it.
    """
    if name in (SPACES, CHARACTERS):
        return split_words
    package = SEGMENTERS[name]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # some print a greeting
            segment = package.load(lang)
    except ImportError as error:
        raise UserError(
            f"{LANGUAGES[lang].name if lang in LANGUAGES else lang} needs a segmenter ({error}): "
            f"pip install {' '.join(package.distributions)}, or --segmenter {lang}={CHARACTERS}"
        ) from None
    spacing = Spacing(lambda char: is_punctuation(char) and char not in _TSHEG)
    spacing[ord(_ZERO_WIDTH_SPACE)] = " "
    return lambda text: list(_words(text.translate(spacing).split(), segment))


def _words(runs: Sequence[str], segment: Segmenter) -> Iterator[str]:
    for run in runs:
        if any(map(is_unspaced, run)):
            yield from filter(None, map(str.strip, segment(run)))
        else:
            yield run


def segmenter_versions(name: str) -> dict[str, str]:
    """Installed version of each distribution of a segmenter, and of the system's ICU; empty for the built-in rules.

    Raises:
        UserError: a distribution is missing.
    """
    distributions = SEGMENTERS[name].distributions if name in SEGMENTERS else ()
    try:
        versions = {distribution: version(distribution) for distribution in distributions}
        return {**versions, "libicu": import_module("icu").ICU_VERSION} if name == "icu" else versions
    except PackageNotFoundError as error:
        raise UserError(f"segmenter {name}: {error}; pip install {' '.join(distributions)}") from None
