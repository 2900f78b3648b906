"""Features of a set's images and texts, computed once by all ranks together, with a model of any library.

D embedding width.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mc2_hpc.distributed import Ranks, first_error
from mc2_hpc.drops import Drop, Dropped, log_skip
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.dual_encoders import DualEncoder, open_dual_encoder
from mc2_hpc.evaluation.dual_encoders.protocol import encode_texts, finite
from mc2_hpc.evaluation.images import Images
from mc2_hpc.models.formats import Format
from mc2_hpc.models.weights import write_tensors
from mc2_hpc.threads import one_torch_thread

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with the number of images encoded by this rank, and its total."""

_FORMAT = "2"
"""Part of the name of cached features: increase it when image preprocessing changes."""

_MAX_THREADS = 16


def _nothing() -> None:
    """Default action between two batches."""


@dataclass(frozen=True)
class ImageFeatures:
    """Features of a set's images; those that could not be decoded have none."""

    features: Tensor
    """Unit-length float32 (n, D); zero for images without a feature."""
    usable: Tensor
    """bool (n,)."""
    reasons: Counter[str] | None = None
    """Why the others have none, as reasons of ``mc2_hpc.data.skips``; None if not recorded."""

    def skipped(self) -> dict[str, int]:
        """Images without a feature, by reason."""
        if self.reasons is not None:
            return dict(self.reasons)
        count = int((~self.usable).sum())
        return {"image_undecodable": count} if count else {}


class Encoder:
    """Images and texts to unit-length features, with the work divided among the ranks."""

    def __init__(
        self,
        dual: DualEncoder,
        ranks: Ranks,
        *,
        batch: int = 64,
        cache: Path | None = None,
        precision: str = "fp32",
        threads: int | None = None,
        between: Callable[[], None] = _nothing,
    ) -> None:
        """
        Args:
            batch: images, or texts, encoded at a time.
            cache: folder of cached features; None disables caching.
            precision: ``fp32``, or ``bf16`` for autocast.
            threads: that decode the next batch while the model runs this one; 0 decodes between batches. None: 0 if
                the model runs on the CPU, which it keeps busy by itself, otherwise a share of the machine's cores.
            between: called before every batch, equally often on every rank, so it may communicate; an exception that
                it raises on all ranks ends the work.
        """
        self.dual = dual
        self.ranks = ranks
        self.identity = hashlib.sha256(f"{dual.identity} {precision}".encode()).hexdigest()
        self._batch = batch
        self._cache = cache
        self._half = precision == "bf16"
        self._threads = _decoding_threads(ranks) if threads is None else threads
        self._between = between

    @classmethod
    def load(
        cls,
        source: str | Path,
        ranks: Ranks,
        *,
        eval_resize: str | None = None,
        batch: int = 64,
        cache: Path | None = None,
        precision: str = "fp32",
        ema: bool = False,
    ) -> "Encoder":
        """The encoder of a model folder in any format (see :func:`open_dual_encoder`).

        Raises:
            UserError: no model can be loaded, or it cannot compute in that precision.
        """
        dual = open_dual_encoder(source, ranks.device, eval_resize=eval_resize, ema=ema)
        if precision != "fp32" and dual.facts.format == Format.ONNX:
            raise UserError(f"{source}: an ONNX model computes as it was exported; leave out --precision {precision}")
        return cls(dual, ranks, batch=batch, cache=cache, precision=precision)

    @property
    def writes(self) -> bool:
        """Whether this rank writes the common results."""
        return self.ranks.is_first

    def images(self, images: Images, progress: Progress | None = None) -> ImageFeatures:
        """Features of every image, on the CPU, the same on every rank. Collective.

        Raises:
            UserError: no image can be decoded, or a feature is not finite or has length zero.
        """
        path = self._cached(images)
        found = _read_features(path, len(images)) if path is not None and path.is_file() else None
        if self._all_agree(found is not None):
            assert found is not None
            return found
        share, reasons = self._share_of_images(images, progress)
        reasons = self._summed(reasons)
        if sum(reasons.values()) == len(images):
            counts = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common())
            raise UserError(f"none of {len(images)} images can be decoded, such as {images.name(0)} ({counts})")
        features = finite(self._gathered(share, len(images)), "images", num_missing=sum(reasons.values()))
        usable = features.abs().sum(1) > 0
        if path is not None and self.ranks.is_first:
            _keep_features(path, ImageFeatures(features, usable, reasons))
        return ImageFeatures(features, usable, reasons)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit-length float32 (n, D) on the CPU, the same on every rank. Collective.

        Raises:
            UserError: there are no texts, or a feature is not finite.
        """
        if not texts:
            raise UserError("no texts to encode")
        # Sorted by length, because a batch is padded to its longest; every rank gets some of each length.
        ordered = sorted(dict.fromkeys(texts), key=lambda text: (len(text), text))
        own = ordered[self.ranks.rank :: self.ranks.world_size]
        parts: list[Tensor] = []
        error = None
        size = 4 * self._batch
        with self.autocast():
            for start in self._starts(len(ordered), size):
                self._between()
                if error is not None or start >= len(own):
                    continue
                try:
                    parts.append(encode_texts(self.dual, own[start : start + size], batch=size))
                except UserError as failure:
                    error = failure
        first_error(error)
        features = self._gathered(torch.cat(parts) if parts else None, len(ordered))
        row = {text: index for index, text in enumerate(ordered)}
        return features[torch.tensor([row[text] for text in texts])]

    def preprocess(self, images: Images, indices: Sequence[int]) -> list[Any]:
        """Preprocessed images; those that cannot be decoded are left out."""
        with one_torch_thread():
            return [found for index in indices if not isinstance(found := self._load(images, index), Dropped)]

    def autocast(self) -> torch.autocast:
        """The autocast context for this encoder's precision."""
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16, enabled=self._half)

    @torch.inference_mode()
    def _share_of_images(self, images: Images, progress: Progress | None) -> tuple[Tensor | None, Counter[str]]:
        """This rank's features (own, D), zero for images without one, or None if none of its images has one; and counts
        of images without a feature, by reason."""
        own = range(self.ranks.rank, len(images), self.ranks.world_size)
        loaded = self._loaded(images, [own[i : i + self._batch] for i in range(0, len(own), self._batch)])
        reasons: Counter[str] = Counter()
        share: Tensor | None = None
        with self.autocast():  # entered once: it caches the cast weights
            for start in self._starts(len(images), self._batch):
                self._between()
                if start >= len(own):
                    continue
                batch = next(loaded)
                good = [place for place, found in enumerate(batch, start) if not isinstance(found, Dropped)]
                reasons.update(found.reason for found in batch if isinstance(found, Dropped))
                if good:
                    features = self.dual.encode_images([batch[place - start] for place in good]).cpu()
                    share = features.new_zeros(len(own), features.shape[1]) if share is None else share
                    share[good] = features
                if progress is not None:
                    progress(min(start + self._batch, len(own)), len(own))
        return share, reasons

    def _starts(self, total: int, size: int) -> range:
        """Where batches begin in the largest rank's share of ``total``; a smaller share may have fewer."""
        return range(0, -(-total // self.ranks.world_size), size)

    def _loaded(self, images: Images, batches: Sequence[range]) -> Iterator[list[Any]]:
        """The batches in order: preprocessed images, or the reason why there is none."""
        if not self._threads:
            for batch in batches:
                with one_torch_thread():
                    found = [self._load(images, index) for index in batch]
                yield found
            return
        # One torch thread per decoding thread: an image is too small to split.
        with one_torch_thread(), ThreadPoolExecutor(self._threads, "decode", torch.set_num_threads, (1,)) as pool:
            ahead: list[Future[Any]] = []
            for batch in (*batches, range(0)):
                waiting, ahead = ahead, [pool.submit(self._load, images, index) for index in batch]
                if waiting:
                    yield [future.result() for future in waiting]

    def _load(self, images: Images, index: int) -> Any:
        try:
            return self.dual.preprocess(images.read(index))
        except Dropped as found:
            skip = found
        except OSError as error:
            skip = Dropped(Drop.READ_ERROR, str(error))
        log_skip(skip.reason, images.name(index), skip.detail)
        return skip

    def _cached(self, images: Images) -> Path | None:
        if self._cache is None:
            return None
        name = hashlib.sha256(f"{_FORMAT} {self.identity} {images.fingerprint()}".encode()).hexdigest()
        return self._cache / f"{name[:32]}.safetensors"

    def _all_agree(self, value: bool) -> bool:
        """Whether it holds on every rank: a file may appear on one node before another."""
        if self.ranks.world_size == 1:
            return value
        word = torch.tensor(int(value), device=self.ranks.device)
        dist.all_reduce(word, dist.ReduceOp.MIN)
        return bool(word)

    def _summed(self, counts: Counter[str]) -> Counter[str]:
        """The sum over the ranks."""
        if self.ranks.world_size == 1:
            return counts
        parts: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(parts, counts)
        return sum(parts, Counter())

    def _gathered(self, share: Tensor | None, total: int) -> Tensor:
        """(total, D) on the CPU from every rank's rows ``rank::world_size``; zeros for a rank with none."""
        world_size, device = self.ranks.world_size, self.ranks.device
        if world_size == 1:
            assert share is not None
            return share
        width = torch.tensor(share.shape[1] if share is not None else 0, device=device)
        dist.all_reduce(width, dist.ReduceOp.MAX)
        largest = -(-total // world_size)
        padded = torch.zeros(largest, int(width), device=device)
        if share is not None:
            padded[: len(share)] = share.to(device)
        gathered = padded.new_empty(world_size, *padded.shape)
        dist.all_gather_into_tensor(gathered.view(-1, int(width)), padded)
        # Row i of rank r is number i * world_size + r.
        return gathered.transpose(0, 1).reshape(-1, int(width))[:total].cpu()


def _decoding_threads(ranks: Ranks) -> int:
    if ranks.device.type == "cpu":
        return 0
    on_this_machine = min(ranks.world_size, torch.cuda.device_count())
    return max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // on_this_machine))


def _keep_features(path: Path, found: ImageFeatures) -> None:
    tensors = {
        "features": found.features,
        "usable": found.usable,
        "reasons": torch.frombuffer(bytearray(json.dumps(found.reasons).encode()), dtype=torch.uint8),
    }
    write_tensors(path, {**tensors, "checksum": _checksum(tensors)})


def _read_features(path: Path, count: int) -> ImageFeatures | None:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        logger.warning("%s: damaged features (%s): recomputing them", path, error)
        return None
    checksum = tensors.pop("checksum", None)
    if set(tensors) != {"features", "usable", "reasons"} or len(tensors["features"]) != count:
        logger.warning("%s: features of another set: recomputing them", path)
        return None
    if checksum is None or not torch.equal(checksum, _checksum(tensors)):
        logger.warning("%s: damaged features (checksum): recomputing them", path)
        return None
    reasons = Counter(json.loads(bytes(tensors["reasons"].numpy())))
    return ImageFeatures(tensors["features"], tensors["usable"], reasons)


def _checksum(tensors: Mapping[str, Tensor]) -> Tensor:
    """SHA-256 of the tensors' values, uint8 (32,)."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return torch.frombuffer(bytearray(digest.digest()), dtype=torch.uint8)
