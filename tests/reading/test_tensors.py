"""Headers of safetensors files: checked against the file, and rejected quickly."""

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from mc2_hpc.errors import UserError
from mc2_hpc.reading.tensors import read_header


def packed(header: object, payload: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + payload


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_header(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file(
        {"w": torch.zeros(2, 3), "h": torch.zeros(4, dtype=torch.bfloat16), "s": torch.zeros(())}, path, {"k": "v"}
    )
    found = read_header(path)
    assert {name: (info.dtype, info.shape, info.num_elements) for name, info in found.items()} == {
        "w": ("F32", (2, 3), 6),
        "h": ("BF16", (4,), 4),
        "s": ("F32", (), 1),
    }
    save_file({}, path)
    assert read_header(path) == {}


WRONG = {
    "empty": (b"", "cut off"),
    "text": (b"not tensors at all", "cut off"),
    "header longer than the file": (b"\xff" * 8 + b"{}", "cut off"),
    "not JSON": (packed(b"{"), "ends too early"),
    "a list": (packed([]), "expected an object, found a list"),
    "a name twice": (packed(b'{"a": {}, "a": {}}'), "'a' occurs twice"),
    "no offsets": (packed({"a": {"dtype": "F32", "shape": [2]}}), "a: $: 'data_offsets' is missing"),
    "shape of texts": (packed({"a": {**entry(), "shape": "ab"}}, bytes(8)), "$.shape: expected a list, found text"),
    "shape of booleans": (packed({"a": {**entry(), "shape": [True]}}, bytes(8)), "$.shape[0]: expected a whole number"),
    "a negative size": (packed({"a": entry(shape=(-2,))}, bytes(8)), "$.shape[0]: expected int >= 0"),
    "unknown type": (packed({"a": entry("F33")}, bytes(8)), "unknown type 'F33'"),
    "offsets and shape": (packed({"a": entry(shape=(3,))}, bytes(8)), "a: its offsets do not fit its shape and type"),
    "huge shape": (packed({"a": entry(shape=(2**40, 2**40))}, bytes(8)), "a: its offsets do not fit"),
    "a gap": (packed({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "b: its offsets do not fit"),
    "overlap": (packed({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "b: its offsets do not fit"),
    "cut off": (packed({"a": entry()}, bytes(7)), "its tensors have 8 bytes, the file 7"),
    "more at the end": (packed({"a": entry()}, bytes(9)), "its tensors have 8 bytes, the file 9"),
    "deep": (packed(b'{"a": ' + b"[" * 100_000), "nested too deeply"),
    "digits": (packed(b'{"a": ' + b"1" * 5000 + b"}"), "a number with too many digits"),
}


@pytest.mark.parametrize("content, message", WRONG.values(), ids=WRONG)
def test_damaged_files(tmp_path, content, message):
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UserError) as error:
        read_header(path)
    assert "a.safetensors: damaged safetensors file (" in str(error.value)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_pipe_does_not_wait(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="is a named pipe; name a file"):
        read_header(tmp_path / "a.safetensors")
