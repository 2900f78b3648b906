"""What a source is: a table, a folder of images, WebDataset shards, or files whose rows hold images."""

from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

from mc2_hpc.errors import UserError
from mc2_hpc.ingestion.rows import is_image_type
from mc2_hpc.ingestion.table import SUFFIXES
from mc2_hpc.reading.json_file import Foreign, read_json
from mc2_hpc.reading.parquet_file import open_parquet
from mc2_hpc.shard_paths import Names, list_shards, split_names, walk_files

_STATE, _DICT = "state.json", "dataset_dict.json"
_ROW_FILES = (".arrow", ".parquet")


class Kind(Enum):
    """Kinds of sources."""

    TABLES = auto()
    """Tables that name image files."""
    FOLDER = auto()
    """Image files with caption files beside them."""
    TARS = auto()
    """WebDataset shards."""
    ROWS = auto()
    """Arrow or Parquet files that hold the images."""


@dataclass(frozen=True)
class Source:
    """A source that was recognised."""

    kind: Kind
    files: tuple[Path, ...]
    """The tables or row files, in order; empty for the other kinds."""
    folder: Path
    """The folder of images, or the one that names in a table are relative to."""


class _DataFile(Foreign):
    filename: str


class _State(Foreign):
    """``state.json`` of ``datasets.Dataset.save_to_disk``."""

    _data_files: list[_DataFile]
    _indices_data_files: list[_DataFile] | None = None


class _Splits(Foreign):
    """``dataset_dict.json`` of ``datasets.DatasetDict.save_to_disk``."""

    splits: list[str]


def recognise(names: Names) -> Source:
    """What a source is, by its files.

    Args:
        names: a folder, file, pattern or list, see :mod:`mc2_hpc.shard_paths`.

    Raises:
        UserError: nothing is there, or nothing that is known.
    """
    singles = split_names(names)
    path = Path(singles[0]).expanduser()
    if len(singles) > 1 or not path.is_dir():
        return _of_files(list_shards(names, *SUFFIXES, *_ROW_FILES, ".tar"))
    if (path / _DICT).is_file():
        splits = ", ".join(str(path / split) for split in read_json(path / _DICT, _Splits).splits)
        raise UserError(f"{path}: holds several splits; name one of {splits}")
    if (path / _STATE).is_file():
        return Source(Kind.ROWS, _saved_files(path), path.absolute())
    suffixes = {found.suffix.lower() for found in walk_files(path)}
    for suffix in (".tar", *_ROW_FILES):
        if suffix in suffixes:
            return _of_files(list_shards(names, suffix))
    return Source(Kind.FOLDER, (), path.absolute())


def _of_files(files: list[Path]) -> Source:
    suffixes = sorted({file.suffix.lower() for file in files})
    folder = files[0].absolute().parent
    paths = tuple(file.absolute() for file in files)
    if suffixes == [".tar"]:
        return Source(Kind.TARS, (), folder)
    if suffixes == [".arrow"] or (suffixes == [".parquet"] and _holds_images(files[0])):
        _check_one_split(files)
        return Source(Kind.ROWS, paths, folder)
    if set(suffixes) <= set(SUFFIXES):
        return Source(Kind.TABLES, paths, folder)
    raise UserError(
        f"{files[0]}: not a known kind of source (files that end in {', '.join(suffixes)}); give a folder, a table "
        f"({', '.join(SUFFIXES)}), .tar shards, or .arrow or .parquet files with images"
    )


def _holds_images(path: Path) -> bool:
    with open_parquet(path) as file:
        return any(is_image_type(field.type) for field in file.schema_arrow)


def _check_one_split(files: list[Path]) -> None:
    """``train-00000-of-00002.parquet`` and ``test-...`` are different data."""
    splits = sorted({file.name.partition("-")[0] for file in files if "-of-" in file.name})
    if len(splits) > 1:
        raise UserError(
            f"{files[0].parent}: holds several splits ({', '.join(splits)}); name the files of one, such as "
            f"'{files[0].parent}/{splits[-1]}-*{files[0].suffix}'"
        )


def _saved_files(folder: Path) -> tuple[Path, ...]:
    state = read_json(folder / _STATE, _State, what="the state.json of a `datasets` folder")
    if state._indices_data_files:
        raise UserError(f"{folder}: its rows are selected by an index; save it again after flatten_indices()")
    names = [file.filename for file in state._data_files]
    if not names or any(name != Path(name).name for name in names):
        raise UserError(f"{folder / _STATE}: names no data files, or files in other folders")
    return tuple(folder.absolute() / name for name in names)
