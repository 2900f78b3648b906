"""Which columns of a table hold the image, the captions, their language and the key."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import shown

IMAGE_NAMES = (
    *("image", "img", "picture", "file_name", "filename", "filepath", "file_path", "image_path", "path"),
    *("image_name", "image_file", "file", "jpg", "png", "webp"),
)
CAPTION_NAMES = ("caption", "captions", "text", "texts", "title", "alt_text", "description", "sentence", "sentences")
LANG_NAMES = ("lang", "language", "locale")
KEY_NAMES = ("key",)


@dataclass(frozen=True)
class Columns:
    """The names that a user gives; empty ones are recognised by :data:`IMAGE_NAMES` and the like."""

    image: str = ""
    captions: tuple[str, ...] = ()
    lang: str = ""
    key: str = ""

    def found_in(self, names: Sequence[str], where: object) -> "Columns":
        """The columns of the table ``where``, which has columns ``names``; ``lang`` and ``key`` stay empty without one.

        Raises:
            UserError: a column is missing.
        """
        captions = self.captions or (_first(CAPTION_NAMES, names),)
        found = Columns(
            self.image or _first(IMAGE_NAMES, names),
            captions,
            self.lang or _first(LANG_NAMES, names),
            self.key or _first(KEY_NAMES, names),
        )
        for flag, column in (("--image-column", found.image), *(("--caption-column", name) for name in captions)):
            if column not in names:
                raise UserError(_missing(flag, column, names, where))
        for flag, column in (("--lang-column", found.lang), ("--key-column", found.key)):
            if column and column not in names:
                raise UserError(_missing(flag, column, names, where))
        return found

    def all(self) -> list[str]:
        """The names of all columns, each once."""
        return list(dict.fromkeys(name for name in (self.image, *self.captions, self.lang, self.key) if name))


def _first(known: Collection[str], names: Sequence[str]) -> str:
    """The column whose name comes first in ``known``, in any case; empty if there is none."""
    by_name = {name.strip().lower(): name for name in reversed(names)}
    return next((by_name[name] for name in known if name in by_name), "")


def _missing(flag: str, column: str, names: Sequence[str], where: object) -> str:
    there = ", ".join(shown(name)[:40] for name in names[:20]) or "none"
    said = f"no column {column!r}" if column else f"name the right column with {flag}"
    return f"{shown(str(where))}: {said}; its columns are {there}"
