"""WinoGAViL: a cue, some images, and which of them go with it."""

from pathlib import Path
from typing import Annotated

import msgspec

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.images import ImageFiles
from mc2_hpc.evaluation.sets.files import read_csv
from mc2_hpc.evaluation.tasks import Association, Round
from mc2_hpc.reading.json_file import parse_json

_FileName = Annotated[str, msgspec.Meta(pattern="^[^/]+$")]
"""Part of a file's name, so it must not lead out of the folder."""
_COLUMNS = ("ID", "cue", "candidates", "associations")


def winogavil(path: Path, images: str = "winogavil_images") -> Association:
    """The release's ``winogavil_dataset.csv`` and, unpacked, ``winogavil_images/<candidate>.jpg``.

    Columns: ``ID``, ``cue``, ``candidates`` and ``associations`` (JSON lists of names). The cue is written as by the
    authors and DataComp: in lower case after "A", or "An" before a vowel.
    """
    file = path / "winogavil_dataset.csv"
    rows = read_csv(file, _COLUMNS, "the rounds of WinoGAViL")
    rounds = [(row, _names(row, "candidates", file), _names(row, "associations", file)) for row in rows]
    for row, candidates, associations in rounds:
        if not row["cue"].strip() or not associations or not set(associations) <= set(candidates):
            raise UserError(f"{file}: round {row['ID']} has no cue, or associations that are not candidates")
    names = sorted({name for _, candidates, _ in rounds for name in candidates})
    number = {name: index for index, name in enumerate(names)}
    return Association(
        images=ImageFiles(path / images, [f"{name}.jpg" for name in names]),
        rounds=[
            Round(
                cue=_cue(row["cue"]),
                candidates=[number[name] for name in candidates],
                associated=[number[name] for name in associations],
            )
            for row, candidates, associations in rounds
        ],
    )


def _names(row: dict[str, str], column: str, file: Path) -> list[str]:
    """Names in a cell, each once."""
    source = f"{file}: {column} of round {row['ID']}"
    return list(dict.fromkeys(parse_json(row[column].encode(), list[_FileName], source, what="a JSON list of names")))


def _cue(cue: str) -> str:
    cue = cue.strip().lower()
    return f"{'An' if cue[0] in 'aeiou' else 'A'} {cue}"
