"""open_clip's own training program on a model config of ours: ``open_clip_train.main`` with one more model known.

    torchrun ... peer_open_clip_train.py MODEL_CONFIG_FOLDER '["--model", "..."]'

The arguments of ``open_clip_train.main`` come as one JSON list: torchrun would take some of them for its own.
"""

import functools
import json
import sys

import torch

from mc2_hpc.peers import import_open_clip

open_clip = import_open_clip()
open_clip.add_model_config(sys.argv[1])

if not torch.cuda.is_available():
    # It names the CPU as a device to DDP, which DDP refuses: on CPUs no device may be named.
    ddp = torch.nn.parallel.DistributedDataParallel
    torch.nn.parallel.DistributedDataParallel = functools.wraps(ddp, updated=())(
        lambda *args, device_ids=None, **kwargs: ddp(*args, **kwargs)
    )

from open_clip_train.main import main  # noqa: E402  # after open_clip can be imported

main(json.loads(sys.argv[2]))
