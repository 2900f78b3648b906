"""Metadata on disk: a folder of ``<lang>.json``, each a list of distinct strings whose positions are the entry ids."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import check_regular
from mc2_hpc.reading.json_file import Foreign, read_json
from mc2_hpc.storage import write_json

CARD = "card.json"
_MOST_BYTES = 1 << 30


class Card(Foreign):
    """The part of ``card.json`` that a later build reads: what each language was built from."""

    languages: dict[str, dict[str, Any]]


def write_entries(path: Path, entries: Sequence[str]) -> None:
    """Write a language's entries in the release's file format, one per line, atomically."""
    write_json(path, list(entries))


def read_entries(path: str | Path) -> list[str]:
    """Read a language's entries.

    Raises:
        UserError: not a JSON list of strings, or empty; or an entry is blank, repeated or not encodable as UTF-8.
    """
    entries = read_json(path, list[str], most=_MOST_BYTES, what="metadata, a list of texts")
    check_entries(entries, str(path))
    return entries


def check_entries(entries: Sequence[str], where: str) -> None:
    """Raise a :class:`UserError` that starts with ``where`` for entries that a matcher cannot use.

    Raises:
        UserError: there are no entries, or one is blank, repeated or not encodable; it is named with its position.
    """
    if not entries:
        raise UserError(f"{where}: no entries; a language needs at least one")
    first: dict[str, int] = {}
    for position, entry in enumerate(entries):
        if not entry.strip():
            raise UserError(f"{where}: entry {position} is blank; remove it")
        if entry in first:
            raise UserError(f"{where}: entries {first[entry]} and {position} are both {entry!r}; remove one")
        first[entry] = position
    try:
        "".join(entries).encode()
    except UnicodeEncodeError:
        bad = next(position for position, entry in enumerate(entries) if not _encodable(entry))
        raise UserError(f"{where}: entry {bad} ({entries[bad]!r}) contains a lone surrogate; remove it") from None


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def metadata_files(folder: str | Path) -> dict[str, Path]:
    """``{language code: file}`` of a metadata folder, in code order.

    Raises:
        UserError: there is no such folder, no language in it, or a language's file is not a regular one or too large.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such metadata folder; build one with `mc2 metadata build`")
    found = {path.stem: path for path in folder.glob("*.json") if path.name != CARD and not path.name.startswith(".")}
    if not found:
        raise UserError(f"{folder}: no <language>.json in this metadata folder; build some with `mc2 metadata build`")
    for path in found.values():  # before they are hashed or read
        if check_regular(path) > _MOST_BYTES:
            raise UserError(f"{path}: larger than {_MOST_BYTES:,} bytes, the limit for a language's entries")
    return dict(sorted(found.items()))
