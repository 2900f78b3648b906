"""Files of torch.save: tensors are read, code never runs, and whatever else is in them is one clear line."""

import argparse
import os
import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mc2_hpc.errors import UserError
from mc2_hpc.reading.torch_file import read_torch_file

WEIGHTS = {
    "a.weight": torch.arange(6.0).view(2, 3),
    "half": torch.ones(2, dtype=torch.bfloat16),
    "scale": torch.ones(()),
}


class Code:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (str(self.path), os.O_CREAT)


def refused(path: Path, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        read_torch_file(path)
    assert "\n" not in str(error.value) and str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize("wrap", [lambda w: w, lambda w: {"epoch": 3, "state_dict": w, "optimizer": {"step": [1]}}])
def test_named_tensors_are_read(tmp_path: Path, wrap) -> None:
    torch.save(wrap({**WEIGHTS, "p": torch.nn.Parameter(torch.ones(3)), "t": WEIGHTS["a.weight"].T}), tmp_path / "w.pt")
    found = read_torch_file(tmp_path / "w.pt")
    assert found.keys() == {*WEIGHTS, "p", "t"} and not found["p"].requires_grad
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in WEIGHTS.items()
    )
    assert torch.equal(found["t"], WEIGHTS["a.weight"].T)


def test_code_is_named_and_does_not_run(tmp_path: Path) -> None:
    for name, content, message in (
        (
            "code.pt",
            {"a": Code(tmp_path / "ran")},
            r"it needs posix.open, which would run code of the file; if you trust",
        ),
        (
            "args.bin",
            {**WEIGHTS, "args": argparse.Namespace(lr=1)},
            "it needs argparse.Namespace, which would run code",
        ),
        ("model.pth", torch.nn.Linear(2, 2), r"it needs torch.nn.modules.linear.Linear, which would"),
    ):
        torch.save(content, tmp_path / name)
        refused(tmp_path / name, message)
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Code(tmp_path / "ran")))
    refused(tmp_path / "plain.pt", "damaged, or not in PyTorch's zip format")
    assert not (tmp_path / "ran").exists()


def test_what_is_not_a_tensor_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    for content, message in (
        ({"a": 3}, "'a' is not a tensor, but a value of type int"),
        ({"a": {"b": torch.ones(1)}}, "'a' is not a tensor, but a value of type dict"),
        ([torch.ones(1)], "has no named tensors, but a value of type list"),
        ({3: torch.ones(1)}, "has a tensor without a name, under 3"),
        ({"a\nb": torch.ones(1)}, "has a tensor without a name, under 'a"),
        ({"a": torch.ones(2, 2).to_sparse()}, "'a' is not a dense tensor in the file"),
        ({"a": torch.empty(9, device="meta")}, "'a' is not a dense tensor in the file"),
        ({"a": torch.ones(1).expand(1 << 40)}, "'a' has more elements than the file has numbers for it"),
    ):
        torch.save(content, path)
        refused(path, message)


def test_archives_of_other_kinds(tmp_path: Path) -> None:
    torch.save(WEIGHTS, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    refused(tmp_path / "old.pt", "damaged, or not in PyTorch's zip format .*; if you trust the file, save its weights")
    torch.save(WEIGHTS, tmp_path / "w.pt")
    with (
        zipfile.ZipFile(tmp_path / "w.pt") as source,
        zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for name in source.namelist():
            target.writestr(name, source.read(name))
    refused(tmp_path / "small.pt", "a compressed archive")
    with zipfile.ZipFile(tmp_path / "other.pt", "w") as target:
        target.writestr("notes.txt", "none")
    refused(tmp_path / "other.pt", "an archive without weights")
    refused(tmp_path, "is a folder; name a file")


@given(places=st.lists(st.tuples(st.integers(0, 1 << 16), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_damage_is_one_line(places: list[tuple[int, int]], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "damaged.pt"
    torch.save(WEIGHTS, path)
    data = bytearray(path.read_bytes())
    for place, value in places:
        data[place % len(data)] = value
    path.write_bytes(data)
    try:
        assert all(isinstance(tensor, torch.Tensor) for tensor in read_torch_file(path).values())
    except UserError as error:
        assert "\n" not in str(error)
