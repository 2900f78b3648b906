"""mc2_hpc: a trainer for worldwide CLIP models (Meta CLIP 2, arXiv 2507.22062).

clip = mc2_hpc.load("runs/my-run")  # see mc2_hpc.evaluation.loading
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mc2_hpc.evaluation.loading import load

__version__ = "0.2.0"
__all__ = ["__version__", "load"]

# Imported on first access: the command line must answer before torch has loaded.
_LAZY = {"load": "mc2_hpc.evaluation.loading"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
