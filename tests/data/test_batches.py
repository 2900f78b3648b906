"""Incomplete batches and shares cannot be created; joining keeps lane order."""

import dataclasses
from typing import Any

import pytest
import torch

from mc2_hpc.data.batches import Batch, Share, join
from mc2_hpc.data.crop import Box, EncodedCrop
from mc2_hpc.data.dali import Jpegs
from mc2_hpc.data.lanes import check_ranks, deal
from mc2_hpc.data.stream import Position
from mc2_hpc.errors import UserError


def share(keys: str, *, width: int = 8, lane: int = 0, **changes: Any) -> Share:
    values: dict[str, Any] = {
        "pixels": torch.full((len(keys), 3, 4, 4), lane, dtype=torch.uint8),
        "tokens": torch.full((len(keys), width), 7),
        "lengths": [width - 1] * len(keys),
        "keys": list(keys),
        "langs": ["en"] * len(keys),
        "sources": [""] * len(keys),
        "position": {lane: Position(0, 0, len(keys))},
        "skipped": {"caption_empty": 1},
    }
    return Share(**{**values, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"langs": ["en"]},
        {"tokens": torch.zeros((3, 8))},
        {"lengths": [8]},
        {"pixels": torch.zeros((1, 3, 4, 4), dtype=torch.uint8)},
        {"jpegs": Jpegs.pack({0: EncodedCrop(b"x", Box(0, 0, 1, 1))})},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_does_not_fit_together_is_not_made(changes: dict[str, Any]) -> None:
    share("ab")
    with pytest.raises(AssertionError, match="per sample"):
        share("ab", **changes)


def test_a_batch_has_an_image_per_sample_and_does_not_change() -> None:
    batch = join([share("ab")], pad_id=1, pin=False)
    with pytest.raises(AssertionError, match="one image per sample"):
        dataclasses.replace(batch, images=batch.images[:1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.images = torch.zeros(0)  # type: ignore[misc]


def test_shares_are_joined_in_order_and_padded() -> None:
    batch = join([share("ab"), share("c", width=16, lane=5)], pad_id=1, pin=False)
    assert isinstance(batch, Batch) and batch.keys == ["a", "b", "c"] and batch.langs == ["en"] * 3
    assert batch.tokens.tolist() == [[7] * 8 + [1] * 8] * 2 + [[7] * 16]
    assert batch.lengths == [7, 7, 15]
    assert batch.images[:, 0, 0, 0].tolist() == [0, 0, 5]
    assert batch.position == {0: (0, 0, 2), 5: (0, 0, 1)} and batch.skipped == {"caption_empty": 2}


def test_lanes_are_dealt_out_whole() -> None:
    for lanes in (range(7), list(range(3, 20))):
        for count in range(1, len(lanes) + 1):
            parts = [list(deal(lanes, index, count)) for index in range(count)]
            assert [lane for part in parts for lane in part] == list(lanes)
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(UserError, match="^--slurm: 8 ranks but data.lanes=7: every rank needs at least one lane"):
        check_ranks(8, 7, where="--slurm: ")
