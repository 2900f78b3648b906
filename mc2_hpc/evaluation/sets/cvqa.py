"""CVQA: culturally diverse questions about images, with four options each, in the local language and in English."""

import ast
from pathlib import Path
from typing import Any

import pyarrow as pa

from mc2_hpc.errors import UserError, first_line
from mc2_hpc.evaluation.images import ImageColumn
from mc2_hpc.evaluation.sets.files import encoded_images, read_parquet, required
from mc2_hpc.evaluation.tasks import Choice, Question
from mc2_hpc.reading.parquet_file import ANY, INTEGER, TEXT, TEXT_OR_INTEGER, TEXTS

_COLUMNS = {
    "image": ANY,
    "ID": TEXT_OR_INTEGER,
    "Subset": TEXT,
    "Question": TEXT,
    "Translated Question": TEXT,
    "Options": TEXTS,
    "Translated Options": TEXTS,
    "Label": INTEGER,
}
_VARIANTS = {"LOCAL": ("Question", "Options"), "EN": ("Translated Question", "Translated Options")}


def cvqa(path: Path) -> Choice:
    """The Parquet files of the set, in or below ``path``.

    Columns: ``image`` (a struct with ``bytes``), ``ID``, ``Subset`` (such as ``('Spanish', 'Argentina')``),
    ``Question`` and ``Translated Question``, ``Options`` and ``Translated Options`` (lists of strings), ``Label`` (the
    correct option, from 0).
    """
    files = [path] if path.is_file() else sorted(required(path, "CVQA's Parquet files").rglob("*.parquet"))
    if not files:
        raise UserError(f"{path}: no *.parquet; CVQA comes as Parquet files")
    try:
        table = pa.concat_tables([read_parquet(file, _COLUMNS, "a part of CVQA") for file in files])
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: its Parquet files differ in their columns ({first_line(error)})") from None
    rows = table.drop_columns(["image"]).to_pylist()
    variants: dict[str, list[Question]] = {variant: [] for variant in _VARIANTS}
    for number, row in enumerate(rows):
        for variant, (question, options) in _VARIANTS.items():
            variants[variant].append(_question(row, question, options, number, path))
    images = ImageColumn(encoded_images(table["image"], path), [str(row["ID"]) for row in rows])
    return Choice(images=images, variants=variants)


def _question(row: dict[str, Any], question: str, options: str, image: int, path: Path) -> Question:
    asked, choices, answer = row[question], row[options], row["Label"]
    if asked is None or not choices or None in choices:
        raise UserError(f"{path}: question {row['ID']} has no text in {question!r} or {options!r}")
    if answer is None or not 0 <= answer < len(choices):
        raise UserError(f"{path}: question {row['ID']} has no correct option (label {answer})")
    return Question(
        image=image,
        options=[f"{asked} {option}" for option in choices],
        answer=answer,
        group=_group(str(row["Subset"])),
    )


def _group(subset: str) -> str:
    """``Spanish, Argentina`` from ``('Spanish', 'Argentina')``."""
    try:
        parts = ast.literal_eval(subset)
    except (ValueError, SyntaxError):
        return subset
    return ", ".join(parts) if isinstance(parts, tuple) else subset
