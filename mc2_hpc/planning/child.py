"""Sets up a process that traces; such a process alone imports this module, and importing it is all there is to do.

The process sees no GPU, so that a plan is the same on every machine, and DeepSpeed neither looks for one nor says so.
"""

import logging
import os
import warnings
from importlib import import_module

os.environ.update(CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu")  # read when DeepSpeed is imported

import deepspeed

deepspeed.logger.setLevel(logging.WARNING)
# DeepSpeed calls collectives by deprecated names; users can do nothing about that.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

# Most of a trace's time would go to these imports, which the fork server does once for all.
import_module("deepspeed.runtime.zero.muon.muon_optimizer")  # DeepSpeed's own, at its first use
import_module("mc2_hpc.planning.trace")
