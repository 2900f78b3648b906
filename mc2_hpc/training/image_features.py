"""``mc2 features``: the features of a run's images under its image tower, for training with that tower frozen.

Takedown lists are not applied here but in training, which still reads every image from its tar to compare its hash: a
list may grow after the features are computed.
"""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from mc2_hpc.config import RunConfig
from mc2_hpc.data.decode import TrainTransform, resolve_backend
from mc2_hpc.data.features import (
    FeatureFacts,
    check_facts,
    check_shard_names,
    feature_file,
    write_facts,
    write_features,
)
from mc2_hpc.data.locations import ShardSet
from mc2_hpc.data.normalise import normalise
from mc2_hpc.data.pools import open_sources
from mc2_hpc.data.remote import CannotReach
from mc2_hpc.data.shards import Shard
from mc2_hpc.data.skips import ShardError
from mc2_hpc.distributed import Ranks, first_error, on_first_rank
from mc2_hpc.drops import Drop, Dropped, log_skip
from mc2_hpc.errors import UserError
from mc2_hpc.models.clip import CLIP, build_clip
from mc2_hpc.precision import Precision
from mc2_hpc.training.initial import architecture, initial_source, load_initial_weights

logger = logging.getLogger(__name__)


def check_features(clip: CLIP, config: RunConfig, ranks: Ranks) -> None:
    """Check that a run's stored features are those of its image tower and settings. Collective.

    Raises:
        UserError: they are not.
    """
    if config.data.features is not None:
        folder = Path(config.data.features)
        on_first_rank(ranks, lambda: check_facts(folder, _facts(clip, config)))


def compute_features(config: RunConfig, ranks: Ranks, *, batch: int) -> int:
    """Compute the features of all images of ``data.train`` into ``data.features``, and return the number of shards that
    were not there yet, over all ranks. Collective.

    The ranks divide the shards. Every shard's file is written atomically, so the same call continues after a crash.

    Args:
        batch: images encoded at a time.

    Raises:
        UserError: a setting is missing, the folder has features of another model or preprocessing, storage does not
            answer or, after all others, some shards could not be read.
    """
    if config.data.features is None:
        raise UserError("data.features is not set: name a folder for the features")
    folder = Path(config.data.features)
    with initial_source(config, None, ranks) as source:
        arch = architecture(config, source)
        clip = build_clip(arch, seed=config.seed)
        if source is not None:
            load_initial_weights(clip, source)
    on_first_rank(ranks, lambda: write_facts(folder, _facts(clip, config), arch.embed_dim))
    (images,) = open_sources(config.data, urls=False)  # the config allows no features of a mix
    shards = images.shards
    check_shard_names(shards.names)
    clip.set_backends(config.model, ranks.device.type)
    clip.vision.to(ranks.device)
    todo: list[Any] = [[n for n, name in enumerate(shards.names) if not feature_file(folder, name).is_file()]]
    dist.broadcast_object_list(todo, src=0)  # the others might already see what the first rank writes next
    unreadable: dict[str, str] = {}
    for first in range(0, len(todo[0]), ranks.world_size):
        error: Exception | None = None
        for number in todo[0][first + ranks.rank : first + ranks.rank + 1]:
            try:
                _compute_shard(clip, config, shards, number, folder, ranks.device, batch)
            except ShardError as failure:
                unreadable[shards.names[number]] = str(failure)
            except CannotReach as failure:
                error = UserError(str(failure))
            except Exception as failure:  # whatever it is, the other ranks must know
                error = failure
        # After every shard, so that no rank waits longer for another than that takes, and an error ends all at once.
        first_error(error)
    _check_all_read(unreadable, ranks)
    return len(todo[0])


def _check_all_read(unreadable: Mapping[str, str], ranks: Ranks) -> None:
    """
    Args:
        unreadable: this rank's shards that could not be read, and why.
    """
    found: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(found, unreadable)
    every = sorted((name, why) for part in found for name, why in part.items())
    if every:
        name, why = every[0]
        raise UserError(
            f"{len(every)} shards could not be read, such as {name}: {why}; restore or remove them and run mc2 "
            f"features again, which computes only what is missing"
        )


def _facts(clip: CLIP, config: RunConfig) -> FeatureFacts:
    digest = hashlib.sha256()
    for name, tensor in sorted(clip.vision.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().cpu().numpy().data)
    return FeatureFacts(
        image_tower=digest.hexdigest(),
        image_size=clip.arch.vision.image_size,
        decode=resolve_backend(config.data.decode, "train"),
        crop_scale=config.data.crop_scale,
        seed=config.data.seed,
        max_image_pixels=config.data.max_image_pixels,
        precision=Precision(config.precision).untrained,
    )


def _compute_shard(
    clip: CLIP, config: RunConfig, shards: ShardSet, number: int, folder: Path, device: torch.device, batch: int
) -> None:
    """Raises ShardError if it or one of its images cannot be read now: its file would say so forever."""
    name, shard = shards.names[number], shards.open(number)
    hashes, reasons = _image_hashes(shard), dict[int, Drop]()
    features = torch.zeros(len(hashes), clip.arch.embed_dim)
    for first, images in _decoded(shard, hashes, clip.arch.vision.image_size, config, batch):
        for row, image in enumerate(images, first):
            if isinstance(image, Dropped):
                if image.reason == Drop.READ_ERROR:
                    raise ShardError(f"image {row}: {image.detail}")
                reasons[row] = image.reason
                log_skip(image.reason, f"{name}, image {row}", image.detail)
        rows = [row for row, image in enumerate(images, first) if not isinstance(image, Dropped)]
        if rows:
            features[rows] = _encode(clip, [image for image in images if isinstance(image, Tensor)], config, device)
    write_features(feature_file(folder, name), hashes, features, reasons, num_bytes=shard.num_bytes)
    logger.info("%s: features of %d images", name, len(hashes) - len(reasons))


def _image_hashes(shard: Shard) -> npt.NDArray[np.uint64]:
    """The hash of each image's key, in the order of :meth:`Shard.read_image`: that of the first row with it."""
    rows = shard.row_hashes()
    _, firsts = np.unique(rows, return_index=True)
    hashes = rows[np.sort(firsts)]
    if len(hashes) != shard.num_keys:
        raise UserError(f"{shard.name}: two of its keys have the same hash; rename one")
    return hashes


def _decoded(
    shard: Shard, hashes: npt.NDArray[np.uint64], size: int, config: RunConfig, batch: int
) -> Iterator[tuple[int, list[Tensor | Dropped]]]:
    """The first row and the images of each batch, as in the first epoch; the next batch is decoded meanwhile."""
    data = config.data
    backend = resolve_backend(data.decode, "train")
    transform = TrainTransform(size, data.crop_scale, data.seed, backend, data.max_image_pixels)

    def load(row: int) -> Tensor | Dropped:
        try:
            image = transform(shard.read_image(row), hashes[row], 0)
        except Dropped as skip:
            return skip
        assert isinstance(image, Tensor)
        return image

    # One torch thread for each: an image is too small to split.
    with ThreadPoolExecutor(max(1, data.workers), "decode", torch.set_num_threads, (1,)) as pool:
        ahead: list[Future[Tensor | Dropped]] = []
        place = 0
        for first in range(0, len(hashes) + batch, batch):
            waiting, ahead = ahead, [pool.submit(load, row) for row in range(first, min(first + batch, len(hashes)))]
            if waiting:
                yield place, [each.result() for each in waiting]
            place = first


@torch.inference_mode()
def _encode(clip: CLIP, images: Sequence[Tensor], config: RunConfig, device: torch.device) -> Tensor:
    precision = Precision(config.precision)
    with precision.autocast(device):
        pixels = normalise(torch.stack(list(images)).to(device), precision.dtype)
        return clip.encode_image(pixels, normalize=True).cpu()
