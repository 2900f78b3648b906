"""A covering array of the step's switches: every two values of two switches meet in some run of 20 steps.

TRITON_INTERPRET=1 python -m torch.distributed.run --standalone --nproc-per-node 2 covering_worker.py OUT
"""

import functools
import itertools
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from mc2_hpc.config import RunConfig, config_from_dict, config_to_dict
from mc2_hpc.distributed import process_group
from mc2_hpc.models import packed_captions
from mc2_hpc.models.clip import CLIP
from tests.training import zero_worker

SWITCHES: dict[str, tuple[Any, ...]] = {
    "zero.stage": (0, 1, 2, 3),
    "zero.reduction": ("all_reduce", "scatter"),
    "loss.backend": ("tiled", "triton", "reference"),
    "model.recompute": ("none", "selective", "full"),
    "loss.kind": ("softmax", "sigmoid"),
    "loss.exchange": ("all_gather", "ring"),
    "model.norm": ("torch", "triton"),
    "model.activation": ("torch", "triton"),
    "model.embedding": ("sharded", "dense"),
    "model.text_packing": (True, False),
    "model.compile": (False, True),
    "micro_batch": (0, 4),
}
"""``model.attention`` has one value here: xformers runs on a GPU only. What travels in bf16 is rounded, so
``tests/training/test_wire.py`` has ``zero.reduce_dtype`` and ``zero.gather_dtype``."""

Row = dict[str, Any]


def allowed(row: Mapping[str, Any]) -> bool:
    """Compiled blocks take neither Triton kernels nor ZeRO 3, and only ZeRO 1 and 2 scatter (configs refuse both)."""
    if row.get("zero.reduction") == "scatter" and row.get("zero.stage") in (0, 3):
        return False
    if row.get("model.compile") and row.get("zero.stage") == 3:
        return False
    return not (row.get("model.compile") and "triton" in (row.get("model.norm"), row.get("model.activation")))


def pairs(switches: Mapping[str, Sequence[Any]], possible: Callable[[Row], bool]) -> set[frozenset[tuple[str, Any]]]:
    """Every two values of two switches that are allowed together."""
    return {
        frozenset({(one, a), (other, b)})
        for one, other in itertools.combinations(switches, 2)
        for a in switches[one]
        for b in switches[other]
        if possible({one: a, other: b})
    }


def covering_array(switches: Mapping[str, Sequence[Any]], possible: Callable[[Row], bool]) -> list[Row]:
    """Rows in which all :func:`pairs` occur: greedily, each switch takes the value that adds most new ones."""
    order = list(switches)
    every = [(name, value) for name in order for value in switches[name]]
    missing, rows = pairs(switches, possible), []
    while missing:
        # The first missing pair in a fixed order, so that the array is always the same.
        row = dict(next(pair for pair in itertools.combinations(every, 2) if frozenset(pair) in missing))
        for name in order:
            if name not in row:
                choices = [value for value in switches[name] if possible({**row, name: value})]
                new = [sum(frozenset({(name, v), item}) in missing for item in row.items()) for v in choices]
                row[name] = choices[new.index(max(new))]
        missing -= {frozenset(pair) for pair in itertools.combinations(row.items(), 2)}
        rows.append({name: row[name] for name in order})
    return rows


ROWS = covering_array(SWITCHES, allowed)


def run_config(row: Row) -> RunConfig:
    """The tiny run with these switches, and an activation that has a kernel; a block per tower, because interpreted
    kernels are slow."""
    values = config_to_dict(zero_worker.run_config(0))
    values["model"]["quick_gelu"] = True
    values["model"]["vision"]["layers"] = values["model"]["text"]["layers"] = 1
    for key, value in row.items():
        section, _, name = key.rpartition(".")
        (values[section] if section else values)[name] = value
    if values["zero"]["reduction"] == "scatter":
        values["zero"]["bucket_elements"] = 5000  # several messages
    return config_from_dict(values)


def main(out: Path, wanted: list[str]) -> None:
    torch.set_num_threads(1)
    packed_captions.LEAST_PLACES = 1  # these batches are too small for packing to pay
    # Graphs are captured and differentiated as for Inductor, whose own compiler takes a minute for each.
    CLIP.compile_blocks = functools.partialmethod(CLIP.compile_blocks, backend="aot_eager")  # type: ignore[method-assign,assignment]
    rows = {}
    with process_group(timeout_s=240) as ranks:
        for number, row in enumerate(ROWS):
            if wanted and str(number) not in wanted:
                continue
            config = run_config(row)
            share = zero_worker.BATCH // ranks.world_size
            rows[number], weights = zero_worker.train(
                config,
                ranks,
                num_micro=share // config.micro_batch if config.micro_batch else 1,
                recompute=config.model.recompute,
                packed=config.model.text_packing,
                backends=True,
            )
            torch._dynamo.reset()
            if ranks.is_first:
                save_file(weights, out / f"{number}.safetensors")
        if ranks.is_first:
            (out / "rows.json").write_text(json.dumps(rows), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
