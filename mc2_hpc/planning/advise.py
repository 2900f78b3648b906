"""What to change: other values of settings that keep a run's arithmetic, each traced and predicted like the config."""

from collections.abc import Sequence

from mc2_hpc.config import RunConfig, setting, with_settings
from mc2_hpc.planning.plan import Plan

MOST = 3
"""How many changes are recommended."""
_CHOICES: dict[str, tuple[object, ...]] = {
    "model.recompute": ("none", "selective", "full"),
    "zero.stage": (1, 2),
    "model.embedding": ("sharded",),
    "model.text_packing": (True,),
    "micro_batch": (0,),
}


def alternatives(config: RunConfig) -> dict[str, RunConfig]:
    """Configs with one setting changed, by its ``key=value``."""
    found = {}
    for key, choices in _CHOICES.items():
        for choice in choices:
            if setting(config, key) != choice:
                shown = str(choice).lower() if isinstance(choice, bool) else choice
                found[f"{key}={shown}"] = with_settings(config, {key: choice}, "alternative")
    return found


def best_changes(plan: Plan, others: Sequence[tuple[str, Plan]]) -> list[tuple[str, Plan]]:
    """At most :data:`MOST` changes that fit and are predicted to be faster, the fastest first.

    If the plan itself does not fit, everything that fits counts as faster.
    """
    better = [
        (name, other)
        for name, other in others
        if other.fits and (not plan.fits or other.step.seconds < 0.995 * plan.step.seconds)
    ]
    return sorted(better, key=lambda change: change[1].step.seconds)[:MOST]
