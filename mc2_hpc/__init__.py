"""mc2_hpc: a trainer for worldwide CLIP models (Meta CLIP 2, arXiv 2507.22062)."""

__version__ = "0.2.0"
