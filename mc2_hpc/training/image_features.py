"""``mc2 features``: the features of a run's images under its image tower, for training with that tower frozen; or of
its images and captions under a teacher.

Takedown lists are not applied here but in training, which still reads every image from its tar to compare its hash: a
list may grow after the features are computed.
"""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from mc2_hpc.config import RunConfig
from mc2_hpc.data.decode import TrainTransform
from mc2_hpc.data.features import (
    FeatureFacts,
    check_facts,
    check_shard_names,
    feature_file,
    load_features,
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
from mc2_hpc.evaluation.dual_encoders.protocol import encode_texts
from mc2_hpc.models.clip import CLIP, build_clip
from mc2_hpc.precision import Precision
from mc2_hpc.training.distillation import check_same, load_teacher
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


@dataclass(frozen=True)
class _Encoder:
    """What the features are of. E is their width."""

    facts: FeatureFacts
    width: int
    dtype: torch.dtype
    images: Callable[[Tensor], Tensor]
    """Features (b, E) of uint8 (b, 3, S, S) images on the device."""
    texts: Callable[[Sequence[str]], Tensor] | None
    """Features (n, E) of captions; None: none are computed."""

    @property
    def stored(self) -> torch.dtype | None:
        """As :func:`~mc2_hpc.data.features.load_features` asks for it."""
        return None if self.texts is None else self.dtype


def compute_features(config: RunConfig, ranks: Ranks, *, batch: int) -> tuple[Path, int]:
    """Compute the features of all images of ``data.train`` into ``data.features``; returns that folder and the number
    of shards that were not there yet or have changed, over all ranks. Collective.

    The ranks divide the shards. Every shard's file is written atomically, so the same call continues after a crash.

    Args:
        batch: images encoded at a time.

    Raises:
        UserError: a setting is missing, the folder has features of another model or preprocessing, storage does not
            answer or, after all others, some shards could not be read.
    """
    if config.data.features is None:
        raise UserError("data.features is not set: name a folder for the features; or a --teacher")
    with initial_source(config, None, ranks) as source:
        arch = architecture(config, source)
        clip = build_clip(arch, seed=config.seed)
        if source is not None:
            load_initial_weights(clip, source)
    facts = _facts(clip, config)
    clip.set_backends(config.model, ranks.device.type)
    clip.vision.to(ranks.device)
    precision = Precision(config.precision)

    def encode(pixels: Tensor) -> Tensor:
        return clip.encode_image(normalise(pixels, precision.dtype), normalize=True)

    encoder = _Encoder(facts, arch.embed_dim, torch.float32, encode, None)
    folder = Path(config.data.features)
    return folder, _compute(encoder, folder, config, ranks, batch)


def compute_teacher_features(config: RunConfig, teacher: str, ranks: Ranks, *, batch: int) -> tuple[Path, int]:
    """Compute the features of all images of ``data.train``, and of every caption that training may draw of them, into
    ``distill.features``. Otherwise as :func:`compute_features`.

    Args:
        teacher: folder of the model.
    """
    if config.distill is None or config.distill.features is None:
        raise UserError("distill.features is not set: name a folder for the teacher's features")
    model = load_teacher(teacher, config, ranks)
    check_same(f"--teacher {teacher}", model.identity, ranks)
    facts = FeatureFacts.of(config.data, config.precision, teacher=model.identity, image_size=model.facts.image_size)
    precision = Precision(config.precision)

    def encode(texts: Sequence[str]) -> Tensor:
        with precision.autocast(ranks.device):
            return encode_texts(model, texts, batch=batch)

    encoder = _Encoder(facts, encode(["."]).shape[1], precision.dtype, model.encode_pixels, encode)
    folder = Path(config.distill.features)
    return folder, _compute(encoder, folder, config, ranks, batch)


def _compute(encoder: _Encoder, folder: Path, config: RunConfig, ranks: Ranks, batch: int) -> int:
    on_first_rank(ranks, lambda: write_facts(folder, encoder.facts, encoder.width))
    sources = open_sources(config.data)
    for source in sources:
        check_shard_names(source.shards.names)
    fields = {source.name: sorted(source.captions) for source in config.data.sources}
    shards = [
        _Shard(source.shards, number, feature_file(folder / source.name, name), fields.get(source.name, []))
        for source in sources
        for number, name in enumerate(source.shards.names)
    ]
    todo = _outdated(encoder, shards, ranks)
    unreadable: dict[str, str] = {}
    for first in range(0, len(todo), ranks.world_size):
        error: Exception | None = None
        for place in todo[first + ranks.rank : first + ranks.rank + 1]:
            try:
                _compute_shard(encoder, config, shards[place], ranks.device, batch)
            except ShardError as failure:
                unreadable[shards[place].name] = str(failure)
            except CannotReach as failure:
                error = UserError(str(failure))
            except Exception as failure:  # whatever it is, the other ranks must know
                error = failure
        # After every shard, so that no rank waits longer for another than that takes, and an error ends all at once.
        first_error(error)
    _check_all_read(unreadable, ranks)
    return len(todo)


@dataclass(frozen=True)
class _Shard:
    """A shard, and where its features are."""

    shards: ShardSet
    number: int
    path: Path
    fields: Sequence[str]
    """That captions are drawn from."""

    @property
    def name(self) -> str:
        return self.shards.names[self.number]

    def stamp(self) -> str:
        """Another one if the shard's files or the caption fields have changed; errors as of the shards' own."""
        return f"{self.shards.stamp(self.number)} {self.fields}"


def _outdated(encoder: _Encoder, shards: Sequence[_Shard], ranks: Ranks) -> list[int]:
    """Places of the shards whose features are missing, damaged, or of other images and captions. Collective.

    Raises:
        UserError: storage does not answer.
    """
    own: list[int] = []
    error: Exception | None = None
    try:
        own = [n for n in range(ranks.rank, len(shards), ranks.world_size) if not _is_current(encoder, shards[n])]
    except CannotReach as failure:
        error = UserError(str(failure))
    except Exception as failure:  # whatever it is, the other ranks must know
        error = failure
    first_error(error)
    # Gathered before the first is computed, which the others might already see.
    found: list[Any] = [None] * ranks.world_size
    dist.all_gather_object(found, own)
    return sorted(place for part in found for place in part)


def _is_current(encoder: _Encoder, shard: _Shard) -> bool:
    if not shard.path.is_file():
        return False
    try:
        stored = load_features(shard.path, encoder.width, encoder.stored)
    except UserError:
        logger.warning("%s: computing its features again: they are damaged", shard.name)
        return False
    try:
        if stored.has_stamp(shard.stamp()):
            return True
        opened = shard.shards.open(shard.number)  # it may only have moved
        if stored.are_of(opened, _image_hashes(opened), _texts(opened) if encoder.texts is not None else ()):
            return True
    except ShardError:
        return False  # computing says why
    logger.warning("%s: computing its features again: it has changed", shard.name)
    return False


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
    return FeatureFacts.of(
        config.data, config.precision, image_tower=digest.hexdigest(), image_size=clip.arch.vision.image_size
    )


def _compute_shard(encoder: _Encoder, config: RunConfig, place: _Shard, device: torch.device, batch: int) -> None:
    """Raises ShardError if it or one of its images or captions cannot be read now: its file would say so forever."""
    stamp, shard = place.stamp(), place.shards.open(place.number)
    hashes, reasons = _image_hashes(shard), dict[int, Drop]()
    features = torch.zeros(len(hashes), encoder.width, dtype=encoder.dtype)
    for first, images in _decoded(shard, hashes, encoder.facts, config, batch):
        for row, image in enumerate(images, first):
            if isinstance(image, Dropped):
                if image.reason == Drop.READ_ERROR:
                    raise ShardError(f"image {row}: {image.detail}")
                reasons[row] = image.reason
                log_skip(image.reason, f"{place.name}, image {row}", image.detail)
        good = [image for image in images if isinstance(image, Tensor)]
        rows = [row for row, image in enumerate(images, first) if not isinstance(image, Dropped)]
        if rows:
            with torch.inference_mode(), Precision(config.precision).autocast(device):
                features[rows] = encoder.images(torch.stack(good).to(device)).to(features)
    texts: tuple[list[str], Tensor] | None = None
    if encoder.texts is not None:
        captions = _texts(shard)
        encoded = encoder.texts(captions) if captions else torch.zeros(0, encoder.width)
        texts = captions, encoded.to(encoder.dtype)
    write_features(place.path, hashes, features, reasons, texts=texts, images_digest=shard.images_digest, stamp=stamp)
    logger.info("%s: features of %d images", place.name, len(hashes) - len(reasons))


def _texts(shard: Shard) -> list[str]:
    """The different captions that training may draw. Raises ShardError if some cannot be read now."""
    found: dict[str, None] = {}
    for index in range(shard.num_keys):
        try:
            found.update(dict.fromkeys(shard.read_texts(index)))
        except Dropped as skip:
            if skip.reason == Drop.READ_ERROR:
                raise ShardError(f"captions of image {index}: {skip.detail}") from None
    return list(found)


def _image_hashes(shard: Shard) -> npt.NDArray[np.uint64]:
    """The hash of each image's key, in the order of :meth:`Shard.read_image`: that of the first row with it."""
    rows = shard.row_hashes()
    _, firsts = np.unique(rows, return_index=True)
    hashes = rows[np.sort(firsts)]
    if len(hashes) != shard.num_keys:
        raise UserError(f"{shard.name}: two of its keys have the same hash; rename one")
    return hashes


def _decoded(
    shard: Shard, hashes: npt.NDArray[np.uint64], facts: FeatureFacts, config: RunConfig, batch: int
) -> Iterator[tuple[int, list[Tensor | Dropped]]]:
    """The first row and the images of each batch, as in the first epoch; the next batch is decoded meanwhile."""
    data = config.data
    assert facts.image_size is not None
    transform = TrainTransform(facts.image_size, data.crop_scale, data.seed, facts.decode, data.max_image_pixels)

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
