"""Content addresses: a digest of everything that determines a result, so that each result is computed only once."""

import hashlib
import json
from pathlib import Path
from typing import Any

from mc2_hpc import __version__
from mc2_hpc.errors import UserError
from mc2_hpc.storage import file_sha256


def address(**decisive: Any) -> str:
    """16 hex digits that identify JSON-ready values and the version of this program."""
    text = json.dumps({"version": __version__, **decisive}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def content(path: str | Path) -> str:
    """Hex SHA-256 of a file, or of all files below a folder and their names, without hidden files.

    Raises:
        UserError: no such path.
    """
    path = Path(path)
    if path.is_file():
        return file_sha256(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder")
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    listing = [f"{file.relative_to(path)} {file_sha256(file)}" for file in files]
    return hashlib.sha256("\n".join(listing).encode("utf-8", "surrogateescape")).hexdigest()
