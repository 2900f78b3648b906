"""Parquet files are checked before a column is used: regular, whole, each column once and of the expected type."""

import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.reading.parquet_file import IDS, INTEGER, TEXT, TEXT_OR_INTEGER, TEXTS, ColumnType, open_parquet

TYPES = {
    "string": (pa.array(["a"]), {"TEXT", "TEXT_OR_INTEGER"}),
    "large_string": (pa.array(["a"], pa.large_string()), {"TEXT", "TEXT_OR_INTEGER"}),
    "dictionary": (pa.array(["a"]).dictionary_encode(), {"TEXT", "TEXT_OR_INTEGER"}),
    "null": (pa.nulls(1), {"TEXT", "TEXT_OR_INTEGER"}),
    "binary": (pa.array([b"a"]), set()),
    "int64": (pa.array([1]), {"INTEGER", "TEXT_OR_INTEGER"}),
    "bool": (pa.array([True]), set()),
    "double": (pa.array([1.0]), set()),
    "list<string>": (pa.array([["a"]]), {"TEXTS"}),
    "list<uint32>": (pa.array([[1]], pa.list_(pa.uint32())), {"IDS"}),
    "list<int64>": (pa.array([[1]]), set()),
    "list<bool>": (pa.array([[True]]), set()),
}
EXPECTED = {"TEXT": TEXT, "TEXT_OR_INTEGER": TEXT_OR_INTEGER, "INTEGER": INTEGER, "TEXTS": TEXTS, "IDS": IDS}


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("expected", EXPECTED)
@pytest.mark.parametrize("name", TYPES)
def test_types_are_exact(tmp_path, name, expected, optional):
    values, fits = TYPES[name]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": values, "other": [1]}), path)
    columns = {"x": EXPECTED[expected]}
    required, optional_columns = ({}, columns) if optional else (columns, {})
    if expected in fits:
        with open_parquet(path, required, optional=optional_columns) as file:
            assert file.read(["x"]).num_rows == 1
    else:
        with (
            pytest.raises(UserError, match=r"a.parquet: column 'x' is .*, must be "),
            open_parquet(path, required, optional=optional_columns),
        ):
            pass


def test_exactly_one_type(tmp_path):
    pq.write_table(pa.table({"x": pa.array(["a"], pa.large_string())}), tmp_path / "a.parquet")
    with (
        pytest.raises(UserError, match="column 'x' is large_string, must be string"),
        open_parquet(tmp_path / "a.parquet", {"x": ColumnType.exactly(pa.string())}),
    ):
        pass


def test_columns_that_are_missing_or_repeated(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table([pa.array(["a"]), pa.array(["b"])], names=["x", "x"]), path)
    with pytest.raises(UserError, match="a.parquet: not captions: no column 'y'; its columns are x, x$"):
        open_parquet(path, {"y": TEXT}, what="captions").__enter__()
    with pytest.raises(UserError, match="a.parquet: has 2 columns 'x'; rewrite it with one"):
        open_parquet(path, optional={"x": TEXT}).__enter__()
    with open_parquet(path, optional={"y": TEXT}) as file:
        assert file.metadata.num_rows == 1


def test_files_that_are_not_parquet(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "text").write_text("PAR1 not really PAR1")
    for name, message in (("pipe", "is a named pipe"), ("none", "no such file"), ("text", "cannot be read as Parquet")):
        with pytest.raises(UserError, match=message) as error, open_parquet(tmp_path / name):
            pass
        assert "\n" not in str(error.value)


def test_damage_behind_the_footer_is_one_line_too(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"x": ["some words"] * 2000}), path, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[10:60] = bytes(50)
    path.write_bytes(data)
    with pytest.raises(UserError, match="a.parquet: cannot be read as Parquet") as error, open_parquet(path) as file:
        file.read()
    assert "\n" not in str(error.value)
