"""open_clip's own training program with one of our model configs: ``open_clip_train.main`` after registering it.

    torchrun ... peer_open_clip_train.py MODEL_CONFIG_FOLDER '["--model", "..."]'

The arguments of ``open_clip_train.main`` are passed as one JSON list, because torchrun would parse some of them itself.
"""

import functools
import json
import sys

import torch

from mc2_hpc.conversion.peers import import_open_clip

open_clip = import_open_clip()
open_clip.add_model_config(sys.argv[1])

if not torch.cuda.is_available():
    # open_clip passes the CPU to DDP as a device, which DDP refuses: on CPUs device_ids must be None.
    ddp = torch.nn.parallel.DistributedDataParallel
    torch.nn.parallel.DistributedDataParallel = functools.wraps(ddp, updated=())(
        lambda *args, device_ids=None, **kwargs: ddp(*args, **kwargs)
    )

from open_clip_train.main import main  # noqa: E402  # after open_clip can be imported

main(json.loads(sys.argv[2]))
