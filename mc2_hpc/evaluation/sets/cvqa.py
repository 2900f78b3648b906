"""CVQA: culturally diverse questions about pictures, with four options each, in the local language and in English."""

import ast
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.pictures import PictureColumn
from mc2_hpc.evaluation.sets.files import required
from mc2_hpc.evaluation.tasks import Choice, Question

_COLUMNS = ("image", "ID", "Subset", "Question", "Translated Question", "Options", "Translated Options", "Label")
_VARIANTS = {"LOCAL": ("Question", "Options"), "EN": ("Translated Question", "Translated Options")}


def cvqa(path: Path) -> Choice:
    """The Parquet files of the set, in or below ``path``.

    Columns: ``image`` (a struct with ``bytes``), ``ID``, ``Subset`` (such as ``('Spanish', 'Argentina')``),
    ``Question`` and ``Translated Question``, ``Options`` and ``Translated Options`` (lists of strings), ``Label`` (the
    right option, from 0).
    """
    files = [path] if path.is_file() else sorted(required(path, "CVQA's Parquet files").rglob("*.parquet"))
    if not files:
        raise UserError(f"{path}: no *.parquet there; CVQA comes as Parquet files")
    table = pa.concat_tables([_read(file) for file in files])
    rows = table.drop_columns(["image"]).to_pylist()
    variants: dict[str, list[Question]] = {variant: [] for variant in _VARIANTS}
    for number, row in enumerate(rows):
        for variant, (question, options) in _VARIANTS.items():
            if row["Label"] is None or not 0 <= row["Label"] < len(row[options]):
                raise UserError(f"{path}: question {row['ID']} has no right option (label {row['Label']})")
            variants[variant].append(
                Question(
                    picture=number,
                    options=[f"{row[question]} {option}" for option in row[options]],
                    answer=row["Label"],
                    group=_group(row["Subset"]),
                )
            )
    pictures = PictureColumn(_bytes(table["image"]), [str(row["ID"]) for row in rows])
    return Choice(pictures=pictures, variants=variants)


def _read(file: Path) -> pa.Table:
    try:
        names = pq.read_schema(file).names
        missing = [name for name in _COLUMNS if name not in names]
        if missing:
            raise UserError(f"{file}: no column {missing[0]!r}; not CVQA")
        return pq.read_table(file, columns=list(_COLUMNS))
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{file}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None


def _bytes(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return pa.chunked_array([chunk.field("bytes") for chunk in column.chunks], pa.binary())


def _group(subset: str) -> str:
    """``Spanish, Argentina`` of ``('Spanish', 'Argentina')``."""
    try:
        parts = ast.literal_eval(subset)
    except (ValueError, SyntaxError):
        return subset
    return ", ".join(parts) if isinstance(parts, tuple) else subset
