"""NPY and NPZ files: type, dimensions and length, and damaged headers."""

import io
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from mc2_hpc.errors import UserError
from mc2_hpc.reading.arrays import map_array, open_npz


def npy(header: str, payload: bytes = b"") -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + payload


def saved(array, **options) -> bytes:
    data = io.BytesIO()
    np.save(data, array, **options)
    return data.getvalue()


def test_a_mapped_array(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3, dtype=np.float32))
    found = map_array(tmp_path / "a.npy", np.float32, length=3)
    assert found.tolist() == [0, 1, 2] and not found.flags.writeable


MANY_MAPS = """
import resource, sys
import numpy as np
from mc2_hpc.reading.arrays import map_array

hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
maps = [map_array(sys.argv[1], np.float32) for _ in range(100)]
print(sum(float(each.sum()) for each in maps))
"""


def test_more_maps_than_files_may_be_open(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(3, dtype=np.float32))
    command = [sys.executable, "-c", MANY_MAPS, str(tmp_path / "a.npy")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert (done.stdout, done.stderr) == ("300.0\n", "")


HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000,), }"
WRONG = [
    (b"", "not readable as an array"),
    (b"text", "not readable as an array"),
    (b"PK\x03\x04 and no archive behind it", "not readable as an array"),
    (saved(np.arange(3.0)), "has float64 of shape (3,), expected float32 of one dimension"),
    (saved(np.zeros((3, 2), np.float32)), "has float32 of shape (3, 2), expected float32 of one dimension"),
    (saved(np.zeros(4, np.float32)), "has 4 numbers, expected 3"),
    (saved(np.zeros(3, np.float32))[:-1], "not readable as an array"),
    (saved(np.array([{}], object)), "not readable as an array"),
    (npy(HUGE), "not readable as an array"),
    (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }"), "not readable as an array"),
    (npy("{'descr': '<f4', 'fortran_order': False, 'shape': " + "(" * 100), "not readable as an array"),
]


@pytest.mark.parametrize("content, message", WRONG, ids=range(len(WRONG)))
def test_bad_arrays(tmp_path, content, message):
    (tmp_path / "a.npy").write_bytes(content)
    with pytest.raises(UserError) as error:
        map_array(tmp_path / "a.npy", np.float32, length=3, cure="make it again")
    assert message in str(error.value) and "a.npy: " in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).endswith("; make it again")


@pytest.mark.parametrize("content, message", WRONG, ids=range(len(WRONG)))
def test_bad_arrays_in_an_archive(tmp_path, content, message):
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", content)
    with pytest.raises(UserError) as error, open_npz(tmp_path / "a.npz", cure="make it again") as arrays:
        arrays.read("x", np.float32, length=3)
    assert message in str(error.value) and "a.npz: x: " in str(error.value) and "\n" not in str(error.value)


def test_an_archive(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(3, dtype=np.uint32), y=np.zeros((2, 2)))
    with open_npz(tmp_path / "a.npz") as arrays:
        assert arrays.names == ["x", "y"]
        assert arrays.read("x", np.uint32, length=3).tolist() == [0, 1, 2]
        assert arrays.read("y", np.float64, ndim=2).shape == (2, 2)
        with pytest.raises(UserError, match="a.npz: z: is missing"):
            arrays.read("z", np.uint32)


def test_damaged_archives(tmp_path):
    path = tmp_path / "a.npz"
    np.savez(path, x=np.arange(100))
    whole = path.read_bytes()
    np.savez_compressed(tmp_path / "packed.npz", x=np.zeros(10**6))
    for content, message in (
        (b"", "not readable as arrays"),
        (whole[:-30], "not readable as arrays"),
        (whole[:300] + b"\xff" + whole[301:], "Bad CRC-32"),
        ((tmp_path / "packed.npz").read_bytes(), "is compressed"),
        (saved(np.arange(3)), "not readable as arrays"),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError, match=message), open_npz(path) as arrays:
            arrays.read("x", np.int64)
    with pytest.raises(UserError, match="is a folder"), open_npz(tmp_path):
        pass
