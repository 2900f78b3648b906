"""JSON as typed values, and one-line errors with the place."""

import json
from typing import Any

import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.reading.json_file import ANYTHING, Count, File, Foreign, Name, as_type, read_fields, read_json


class Part(File):
    size: Count
    names: list[str] = []


class Whole(File):
    name: Name
    share: float = 0.5
    part: Part | None = None
    parts: dict[str, Part] = {}
    fast: bool = False


class Theirs(Foreign):
    size: int = 3


@pytest.fixture
def read(tmp_path):
    def read(content, kind: Any = Whole, **words):
        path = tmp_path / "file.json"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_json(path, kind, **words)

    return read


def test_a_value_of_its_schema(read, tmp_path):
    found = read(
        '\ufeff{"name": "a.b-1", "share": 1, "part": {"size": 0, "names": ["x"]}, "parts": {"k": {"size": 2}}}'
    )
    assert found == Whole(name="a.b-1", share=1.0, part=Part(size=0, names=["x"]), parts={"k": Part(size=2)})
    assert read('{"size": 4, "other": [1e5, {"deep": null}]}', Theirs).size == 4
    assert read("[1, null]", ANYTHING) == [1, None]
    assert read_fields(tmp_path / "file.json", list[int | None]) == [1, None]
    (tmp_path / "w.json").write_text('{"name": "x"}')
    assert read_fields(tmp_path / "w.json", Whole)["parts"] == {}


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"name": "x", "fast": 1}', "$.fast: expected true or false, found a whole number"),
        ('{"name": "x", "part": {"size": true}}', "$.part.size: expected a whole number, found true or false"),
        ('{"name": "x", "part": {"size": 1.0}}', "$.part.size: expected a whole number, found a number"),
        ('{"name": "x", "part": {"size": -1}}', "$.part.size: expected int >= 0"),
        ('{"name": "x", "part": {"size": "1"}}', "$.part.size: expected a whole number, found text"),
        ('{"name": "x", "part": {"size": 1, "names": "ab"}}', "$.part.names: expected a list, found text"),
        ('{"name": "x", "part": {"size": 1, "names": [3]}}', "$.part.names[0]: expected text, found a whole number"),
        ('{"name": "x", "parts": {"a": {"size": 1}, "b": {}}}', "$.parts[...]: 'size' is missing"),
        ('{"name": "x", "share": "0.5"}', "$.share: expected a number, found text"),
        ('{"name": "x", "share": NaN}', "not valid JSON: line 1: invalid character"),
        ('{"name": "x",\n "share": Infinity}', "not valid JSON: line 2: invalid character"),
        ('{"name": "x", "share": 1e999}', "$.share: number out of range"),
        ('{"name": "../x"}', "$.name: expected str matching regex"),
        ('{"name": null}', "$.name: expected text, found null"),
        ("{}", "$: 'name' is missing"),
        ('{"name": "x", "more": 1}', "$: unknown key 'more'"),
        ('{"name": "x", "name": "y"}', "the key 'name' occurs twice in one object"),
        ("[]", "$: expected an object, found a list"),
        ("", "not valid JSON: it is empty"),
        ('{"name": "x"', "not valid JSON: it ends too early"),
        ('{"name": "x",}', "not valid JSON: line 1: trailing comma in object"),
        ('{"name": "x"} x', "not valid JSON: line 1: trailing characters"),
        (b'{"name":\n "\xff"}', "file.json, line 2: byte 0xff is not UTF-8; save the file as UTF-8"),
        ('{"name": "\\ud800"}', "not valid JSON: $.name: has a lone surrogate"),
    ],
)
def test_one_line_with_the_place(read, content, message):
    with pytest.raises(UserError) as error:
        read(content)
    assert f"file.json{'' if message.startswith('file.json') else ': '}" in str(error.value)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_key_of_a_value_among_like_ones(read):
    with pytest.raises(UserError, match=r"\$\.b\.size: expected a whole number, found null"):
        read('{"a": {"size": 1}, "b": {"size": null}}', dict[str, Part])


@pytest.mark.parametrize("kind", [Whole, Theirs, ANYTHING, list[int]])
@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        '{"a":' * 100_000,
        "[" + "1" * 5000 + "]",
        '{"size": ' + "1" * 5000 + "}",
        '{"name": "x", "other": ' + "1" * 5000 + "}",
        '{"other": ' + "[" * 50_000 + "]" * 50_000 + "}",
    ],
    ids=["lists", "objects", "digits", "digits of a field", "digits of another field", "closed lists"],
)
def test_depth_and_digits_are_bounded(read, kind, content):
    with pytest.raises(UserError) as error:
        read(content, kind)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_depth_behind_a_wrong_value_is_bounded(read):
    """The key of the wrong value is looked up in a second reading, which goes deeper."""
    deep = "[" * 50_000 + "]" * 50_000
    with pytest.raises(UserError, match="file.json: nested too deeply"):
        read('{"a": {"size": null}, "b": ' + deep + "}", dict[str, Part])


def test_size_is_bounded(read):
    with pytest.raises(UserError, match="file.json: larger than 10 bytes"):
        read(json.dumps(list(range(100))), list[int], most=10)


def test_what_it_is_and_how_to_get_a_good_one(read):
    with pytest.raises(UserError, match=r"file.json: not a card: \$: expected an object, found a list; write it anew$"):
        read("[]", what="a card", cure="write it anew")


def test_a_part_of_what_is_read_already():
    assert as_type({"size": 3}, Part, "f").size == 3
    with pytest.raises(UserError, match=r"^f: \$\.size: expected a whole number, found true or false$"):
        as_type({"size": True}, Part, "f")


@pytest.mark.parametrize("kind", [ANYTHING, dict[str, Any], dict[str, dict[str, list[float]]]])
def test_a_number_out_of_range_is_found_below_any_keys(tmp_path, kind):
    (tmp_path / "a.json").write_text('{"x": {"y": [18446744073709551615, 1e300]}, "a": {"b": [1, 1e999]}}')
    with pytest.raises(UserError, match=r"a.json: \$\.a\.b\[1\]: number out of range"):
        read_json(tmp_path / "a.json", kind)
