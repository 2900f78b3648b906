"""What the fuzz lane does to files of ``torch.save``."""

import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


class _Command:
    """Unpickled without care, this ends the process in a way that the lane counts as a fault."""

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return _end, ("code of a file was run",)


def _end(message: str) -> None:
    raise SystemExit(message)


_VALUES: tuple[Any, ...] = (None, "text", 3, True, [1.0], float("nan"), {}, _Command())


def change_saved(path: Path, rng: random.Random) -> str:
    """Change one tensor, the names, or how the whole is packed."""
    weights = torch.load(path, weights_only=True)
    name = rng.choice(sorted(weights))
    kind = rng.choice(["value", "type", "shape", "sparse", "views", "removed", "name", "whole", "packed"])
    found: Any = weights
    if kind == "value":
        weights[name] = rng.choice(_VALUES)
    elif kind == "type":
        weights[name] = weights[name].to(rng.choice([torch.int64, torch.bool, torch.complex64, torch.float16]))
    elif kind == "shape":
        weights[name] = weights[name][None]
    elif kind == "sparse":
        weights[name] = weights[name].to_sparse()
    elif kind == "views":
        weights[name] = torch.zeros(()).expand(weights[name].shape)
    elif kind == "removed":
        del weights[name]
    elif kind == "name":
        weights[rng.choice([3, "", "a\nb", "x" * 10_000, ("a",)])] = weights.pop(name)
    elif kind == "whole":
        found = rng.choice([{"state_dict": rng.choice(_VALUES)}, {"model": weights}, [weights], _Command()])
    torch.save(found, path)
    if kind == "packed":
        with zipfile.ZipFile(path) as archive:
            parts = [(entry, archive.read(entry)) for entry in archive.infolist()]
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry, data in parts:
                archive.writestr(entry.filename, data)
    return f"{name} {kind}"
