"""What readers share: required files, lines, tables, random halves."""

import csv
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mc2_hpc.curation.sampling import hash_keys
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.pictures import EXTENSIONS


def required(path: Path, what: str) -> Path:
    """The path, if there is such a file or folder.

    Raises:
        UserError: there is not.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder; {what}")
    return path


def read_lines(path: Path, what: str) -> list[str]:
    """Lines of a UTF-8 text file, stripped; a last empty one is none.

    Raises:
        UserError: no such file, or not UTF-8.
    """
    try:
        # Not splitlines(): it would part a caption at U+2028 and the like.
        text = required(path, what).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error})") from None
    lines = [line.strip() for line in text.split("\n")]
    return lines[:-1] if lines and not lines[-1] else lines


def read_csv(path: Path, columns: Sequence[str], what: str) -> list[dict[str, str]]:
    """Rows of a CSV file with a header.

    Raises:
        UserError: no such file, or it lacks a column.
    """
    with open(required(path, what), encoding="utf-8-sig", newline="") as stream:
        reader = csv.DictReader(stream)
        missing = [column for column in columns if column not in (reader.fieldnames or [])]
        if missing:
            raise UserError(f"{path}: no column {missing[0]!r}; there are {', '.join(reader.fieldnames or [])}")
        return list(reader)


def pictures_below(folder: Path) -> list[str]:
    """Relative paths of all pictures in and below a folder, sorted."""
    found = (
        path for path in required(folder, "pictures should lie there").rglob("*") if path.suffix.lower() in EXTENSIONS
    )
    return sorted(str(path.relative_to(folder)) for path in found)


def shuffled(names: Sequence[str], seed: int = 0) -> npt.NDArray[np.int64]:
    """A permutation that depends on the names and the seed alone, not on their order."""
    return np.argsort(hash_keys([f"{seed}/{name}" for name in names]), kind="stable")
