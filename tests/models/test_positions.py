"""Tables of positions are interpolated as open_clip interpolates them."""

from types import ModuleType, SimpleNamespace

import pytest
import torch

from mc2_hpc.models.positions import image_positions, text_positions

WIDTH = 24
GRIDS = [7, 12, 14, 16, 24, 27, 28]
"""Of 224 px at patch 32; 384 at 32; 224 at 16 and 14; 256 at 16; 384 at 16; 378 and 392 at 14."""


def table(rows: int) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("new", GRIDS)
def test_image_positions_are_open_clips(open_clip: ModuleType, new: int) -> None:
    """At seven sizes, each from all seven: up, down and unchanged."""
    for old in GRIDS:
        ours = image_positions(table(1 + old**2), 1 + new**2)
        weights = {"visual.positional_embedding": table(1 + old**2)}
        model = SimpleNamespace(visual=SimpleNamespace(grid_size=(new, new)))
        open_clip.model.resize_pos_embed(weights, model)
        torch.testing.assert_close(ours, weights["visual.positional_embedding"], atol=1e-6, rtol=0)
        assert torch.equal(ours[0], table(1 + old**2)[0])  # the class token's row


@pytest.mark.parametrize(("old", "new"), [(77, 77), (77, 32), (32, 77), (77, 128)])
def test_text_positions_are_open_clips(open_clip: ModuleType, old: int, new: int) -> None:
    weights = {"positional_embedding": table(old)}
    model = SimpleNamespace(positional_embedding=table(new))
    open_clip.model.resize_text_pos_embed(weights, model)
    torch.testing.assert_close(text_positions(table(old), new), weights["positional_embedding"], atol=1e-6, rtol=0)


def test_a_table_that_is_no_square_grid() -> None:
    with pytest.raises(ValueError, match="1 \\+ the square of a grid's side"):
        image_positions(table(49), 1 + 12**2)
