"""Frozen parameters: a whole tower (LiT, arXiv 2111.07991), or its first blocks."""

import logging

from mc2_hpc.config import FreezeConfig, RunConfig
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.depth import depth_of, num_layers, tower_of
from mc2_hpc.models.presets import ClipArchitecture

logger = logging.getLogger(__name__)


def frozen_depths(arch: ClipArchitecture, config: FreezeConfig) -> dict[str, int]:
    """The greatest frozen depth of ``vision`` and ``text``, below 0 for none.

    Raises:
        UserError: a tower has fewer blocks than are to be frozen.
    """
    return {tower: config.depth(tower, num_layers(arch, tower)) for tower in ("vision", "text")}


def check_frozen(arch: ClipArchitecture, config: RunConfig) -> None:
    """Check early whether a run can freeze what it says; logs a warning if that has random weights.

    Raises:
        UserError: a tower has fewer blocks than are to be frozen.
    """
    frozen_depths(arch, config.freeze)
    if config.model.init_from is None:
        for tower in ("vision", "text"):
            if (value := getattr(config.freeze, tower)) is not None:
                logger.warning("freeze.%s=%s, but model.init_from is not set: random weights stay frozen", tower, value)


def freeze(clip: CLIP, config: FreezeConfig) -> None:
    """Let the frozen parameters require no gradient.

    The inputs of a tower require none either, so autograd keeps nothing of its frozen part.

    Raises:
        UserError: a tower has fewer blocks than are to be frozen.
    """
    deepest = frozen_depths(clip.arch, config)
    for name, parameter in clip.named_parameters():
        tower = tower_of(name)
        if tower is None:
            parameter.requires_grad_(name != "logit_scale" or not config.logit_scale)
        else:
            parameter.requires_grad_(depth_of(name, num_layers(clip.arch, tower)) > deepest[tower])
