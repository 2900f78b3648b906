"""Frozen parameters: a whole tower (LiT, arXiv 2111.07991), its first blocks, or all of it but its adapters (LoRA)."""

import logging

from mc2_hpc.config import FreezeConfig, RunConfig
from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import CLIP
from mc2_hpc.models.depth import depth_of, num_layers, tower_of
from mc2_hpc.models.lora import Adapters, is_adapter
from mc2_hpc.models.presets import ClipArchitecture

logger = logging.getLogger(__name__)


def adapters_of(config: RunConfig) -> Adapters | None:
    """The adapters that a run trains."""
    return None if config.lora is None else Adapters(**vars(config.lora))


def frozen_depths(arch: ClipArchitecture, config: FreezeConfig) -> dict[str, int]:
    """The greatest frozen depth of ``vision`` and ``text``, below 0 for none.

    Raises:
        UserError: a tower has fewer blocks than are to be frozen.
    """
    return {tower: config.depth(tower, num_layers(arch, tower)) for tower in ("vision", "text")}


def check_frozen(arch: ClipArchitecture, config: RunConfig) -> None:
    """Check early whether a run can freeze and adapt what it says; logs a warning if that has random weights.

    Raises:
        UserError: a tower has fewer blocks than are to be frozen, or is narrower than its adapters.
    """
    frozen_depths(arch, config.freeze)
    check_adapters(arch, config)
    if config.model.init_from is None:
        if config.lora is not None:
            logger.warning("lora adapts random weights, which stay frozen: model.init_from is not set")
        for tower in ("vision", "text"):
            if (value := getattr(config.freeze, tower)) is not None:
                logger.warning("freeze.%s=%s, but model.init_from is not set: random weights stay frozen", tower, value)


def check_adapters(arch: ClipArchitecture, config: RunConfig) -> None:
    """
    Raises:
        UserError: a tower is narrower than its adapters.
    """
    adapters = adapters_of(config)
    for tower in adapters.towers if adapters is not None else ():
        assert adapters is not None
        if adapters.rank > (width := getattr(arch, tower).width):
            raise UserError(f"lora.rank={adapters.rank}: the {tower} tower is only {width} wide; lower it")


def freeze(clip: CLIP, config: FreezeConfig) -> None:
    """Let the frozen parameters require no gradient. Of an adapted tower, only the adapters are trained.

    The inputs of a tower require none either, so autograd keeps nothing of its frozen part.

    Raises:
        UserError: a tower has fewer blocks than are to be frozen.
    """
    deepest = frozen_depths(clip.arch, config)
    adapted = {tower_of(name) for name, _ in clip.named_parameters() if is_adapter(name)}
    for name, parameter in clip.named_parameters():
        tower = tower_of(name)
        if tower is None:
            parameter.requires_grad_(name != "logit_scale" or not config.logit_scale)
        elif tower in adapted:
            parameter.requires_grad_(is_adapter(name))
        else:
            parameter.requires_grad_(depth_of(name, num_layers(clip.arch, tower)) > deepest[tower])
