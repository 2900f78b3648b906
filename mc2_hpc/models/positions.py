"""Tables of positions for another image size or context length, interpolated as open_clip does when it loads weights.

Shape suffixes: N rows of a table, W width.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mc2_hpc.models.presets import ClipArchitecture

IMAGE_POSITIONS, TEXT_POSITIONS = "vision.positional_embedding", "text.positional_embedding"
"""Names in ``CLIP.state_dict()``."""


def num_image_positions(arch: ClipArchitecture) -> int:
    """Rows of the image tower's table: the class token and the patches."""
    return 1 + arch.vision.num_patches


def image_positions(table_NW: Tensor, num_rows: int) -> Tensor:
    """The image tower's table for another number of patches: bicubic with antialias over the square grid of patches
    (open_clip's ``resize_pos_embed``); the class token's row is kept.

    Args:
        table_NW: (1 + grid^2, W), the class token first.
        num_rows: 1 + the square of the new grid's side.

    Raises:
        ValueError: one of the grids is not square.
    """
    grids = [math.isqrt(rows - 1) for rows in (table_NW.shape[0], num_rows)]
    if [1 + grid**2 for grid in grids] != [table_NW.shape[0], num_rows]:
        raise ValueError(f"{table_NW.shape[0]} to {num_rows} positions: both must be 1 + the square of a grid's side")
    if grids[0] == grids[1]:
        return table_NW
    patches_1WGG = table_NW[1:].unflatten(0, (1, grids[0], grids[0])).permute(0, 3, 1, 2)
    resized_1WGG = F.interpolate(
        patches_1WGG, size=(grids[1], grids[1]), mode="bicubic", antialias=True, align_corners=False
    )
    return torch.cat([table_NW[:1], resized_1WGG[0].flatten(1).t()])


def text_positions(table_NW: Tensor, num_rows: int) -> Tensor:
    """The text tower's table for another context length: linear (open_clip's ``resize_text_pos_embed``)."""
    if table_NW.shape[0] == num_rows:
        return table_NW
    return F.interpolate(table_NW.t()[None], size=num_rows, mode="linear", align_corners=False)[0].t()


RESIZED = {IMAGE_POSITIONS: image_positions, TEXT_POSITIONS: text_positions}
"""How each table of positions gets another number of rows."""


def describe_resizing(old: ClipArchitecture, new: ClipArchitecture) -> list[str]:
    """What the tables of positions of ``old`` are interpolated to in ``new``, for the log."""
    said = []
    (old_side, old_grid), (new_side, new_grid) = ((arch.vision.image_size, arch.vision.grid) for arch in (old, new))
    if old_grid != new_grid:
        patches = f"({old_grid} x {old_grid} patches) to {new_side} px ({new_grid} x {new_grid})"
        said.append(f"image positions: {old_side} px {patches}")
    if old.text.context_length != new.text.context_length:
        said.append(f"text positions: {old.text.context_length} to {new.text.context_length} tokens")
    return said
