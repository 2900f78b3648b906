"""What the fuzz lane does to arrays and to the headers of safetensors files."""

import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np

from tests.fuzz.json_mutations import RAW, RAW_VALUES, changed


def change_npy(path: Path, rng: random.Random) -> str:
    if path.suffix == ".npz":
        with np.load(path) as file:
            arrays = dict(file)
        name = rng.choice(list(arrays))
        arrays[name], what = _other_array(arrays[name], rng)
        if rng.random() < 0.2:
            del arrays[name]
        np.savez(path, **arrays)
        return f"{name}: {what}"
    array, what = _other_array(np.load(path), rng)
    np.save(path, array)
    return what


def _other_array(array: Any, rng: random.Random) -> tuple[Any, str]:
    kind = rng.choice(
        ["float64", "int8", "two dimensions", "longer", "shorter", "none", "scalar", "texts", "not finite"]
    )
    if kind in ("float64", "int8"):
        return array.astype(kind), kind
    if kind == "not finite" and array.dtype.kind == "f":
        return np.full_like(array, np.nan), kind
    others = {
        "two dimensions": array.reshape(1, *array.shape),
        "longer": np.concatenate([array, array]),
        "shorter": array[:-1],
        "none": array[:0],
        "scalar": np.array(array.sum()),
        "texts": array.astype(str),
    }
    return others.get(kind, array[:-1]), kind


def change_safetensors(path: Path, rng: random.Random) -> str:
    """Change the header like :func:`change_json`, or the type, shape or number of tensors."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    names = [name for name in header if name != "__metadata__"]
    kind = rng.choice(["header", "header", "type", "removed", "fp16", "int32", "not finite", "more"])
    name = rng.choice(names)
    raw, what = "", f"{name} {kind}"
    if kind == "header":
        raw = rng.choice(RAW_VALUES) if rng.random() < 0.3 else ""
        header, what = changed(header, rng, raw)
    elif kind == "type":
        header[name]["dtype"] = rng.choice(["F16", "I64", "BOOL", "F33", "I32"])
    elif kind == "removed":
        del header[name]
    elif kind in ("fp16", "int32"):
        header, body = _recast(header, body, kind)
    elif kind == "not finite":
        body = b"\xff" * len(body)
    else:
        header["extra"] = {"dtype": "F32", "shape": [1], "data_offsets": [len(body), len(body) + 4]}
        body += bytes(4)
    text = json.dumps(header).replace(f'"{RAW}"', raw).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)
    return what


def _recast(header: Any, body: bytes, kind: str) -> tuple[Any, bytes]:
    new, parts, end = {}, [], 0
    for name, entry in header.items():
        if name == "__metadata__" or entry["dtype"] != "F32":
            continue
        begin, stop = entry["data_offsets"]
        part = (
            np.frombuffer(body[begin:stop], np.float32).astype({"fp16": np.float16, "int32": np.int32}[kind]).tobytes()
        )
        new[name] = {
            "dtype": {"fp16": "F16", "int32": "I32"}[kind],
            "shape": entry["shape"],
            "data_offsets": [end, end + len(part)],
        }
        parts.append(part)
        end += len(part)
    return new, b"".join(parts)
