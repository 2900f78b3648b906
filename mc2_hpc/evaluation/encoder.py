"""A checkpoint as evaluation uses it: features of pictures and texts, computed by all ranks, once.

D embedding width, S image side.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mc2_hpc.data.decode import EvalTransform, one_torch_thread
from mc2_hpc.data.normalise import normalise
from mc2_hpc.data.skips import log_skip
from mc2_hpc.data.tokenizer import Tokenizer
from mc2_hpc.distributed import Ranks, first_error
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.features import DualEncoder, Tokenize, encode_texts
from mc2_hpc.evaluation.pictures import Pictures
from mc2_hpc.models.weights import TOKENIZER_FILE, ModelCard, load_clip, resolve_checkpoint, write_tensors
from mc2_hpc.precision import Precision
from mc2_hpc.storage import file_sha256

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with pictures encoded by this rank, and its pictures in all."""

_FORMAT = "1"
"""Part of every cached feature's name: raise it when pictures come to be prepared in another way."""

_MAX_THREADS = 16


def _nothing() -> None:
    """What is done between two batches where nobody asks for anything."""


@dataclass(frozen=True)
class PictureFeatures:
    """Features of a set's pictures; those that could not be decoded have none."""

    features: Tensor
    """Unit-length float32 (n, D), zero where there is none."""
    usable: Tensor
    """bool (n,)."""

    def skipped(self) -> dict[str, int]:
        """``{"undecodable_picture": n}``, or nothing."""
        count = int((~self.usable).sum())
        return {"undecodable_picture": count} if count else {}


class Encoder:
    """Pictures and texts to unit-length features, shared out over the ranks."""

    def __init__(
        self,
        model: DualEncoder,
        tokenize: Tokenize,
        transform: EvalTransform,
        *,
        image_size: int,
        identity: str,
        ranks: Ranks,
        card: ModelCard | None = None,
        batch: int = 64,
        cache: Path | None = None,
        precision: torch.dtype = torch.float32,
        threads: int | None = None,
        between: Callable[[], None] = _nothing,
    ) -> None:
        """
        Args:
            identity: of the weights and of how pictures are prepared: the cache's key beside the set's own.
            card: what the model is, for a checkpoint of ours.
            batch: pictures, or texts, encoded at a time.
            cache: folder of features computed before; None keeps none.
            precision: float32, or bfloat16 for autocast.
            threads: that decode the next batch while the model has this one; 0 decodes in between. None: 0 where the
                model computes on the CPU, which it keeps busy alone, else a share of the machine's cores.
            between: called before every batch, equally often on every rank, so it may communicate; what it raises on
                all ranks ends the work.
        """
        self.model = model
        self.tokenize = tokenize
        self.identity = identity
        self.card = card
        self._transform = transform
        self._image_size = image_size
        self.ranks = ranks
        self._batch = batch
        self._cache = cache
        self._precision = precision
        self._threads = _decoding_threads(ranks) if threads is None else threads
        self._between = between

    @classmethod
    def load(
        cls,
        checkpoint: str | Path,
        ranks: Ranks,
        *,
        batch: int = 64,
        cache: Path | None = None,
        precision: str = "fp32",
    ) -> "Encoder":
        """The encoder of a checkpoint or run folder of ours.

        Raises:
            UserError: no checkpoint or no tokenizer in it.
        """
        folder = resolve_checkpoint(checkpoint)
        model, card = load_clip(folder)
        if not (folder / TOKENIZER_FILE).is_file():
            raise UserError(
                f"{folder}: no {TOKENIZER_FILE} beside the weights; copy the run's sentencepiece model there"
            )
        tokenizer = Tokenizer(folder / TOKENIZER_FILE, card.tokenizer_style, card.arch.text.context_length)
        size, mode = card.arch.vision.image_size, card.arch.eval_resize
        return cls(
            model.to(ranks.device),
            tokenizer.encode,
            EvalTransform(size, mode),
            image_size=size,
            identity=checkpoint_hash(folder, card, precision),
            ranks=ranks,
            card=card,
            batch=batch,
            cache=cache,
            precision=Precision(precision).dtype,
        )

    @property
    def writes(self) -> bool:
        """Whether this rank writes what all have found."""
        return self.ranks.is_first

    def pictures(self, pictures: Pictures, progress: Progress | None = None) -> PictureFeatures:
        """Features of every picture, on the CPU, the same on every rank. Collective.

        Raises:
            UserError: not one picture can be decoded, or a feature is not finite.
        """
        path = self._cached(pictures)
        found = _read_features(path, len(pictures)) if path is not None and path.is_file() else None
        if self._all_agree(found is not None):
            assert found is not None
            return found
        features = self._gathered(self._share_of_pictures(pictures, progress), len(pictures))
        if not bool(torch.isfinite(features).all()):
            raise UserError("the model gives non-finite features for some pictures: no number of them would hold")
        usable = features.abs().sum(1) > 0
        if not usable.any():
            raise UserError(f"none of {len(pictures)} pictures can be decoded, such as {pictures.name(0)}")
        if path is not None and self.ranks.is_first:
            write_tensors(path, {"features": features, "usable": usable})
        return PictureFeatures(features, usable)

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit-length float32 (n, D) on the CPU, the same on every rank. Collective.

        Raises:
            UserError: there are no texts, or a feature is not finite.
        """
        if not texts:
            raise UserError("no texts to encode")
        # Of like length together, since a batch is padded to its longest; every rank gets some of each length.
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
                    texts_of_batch = own[start : start + size]
                    parts.append(encode_texts(self.model, self.tokenize, texts_of_batch, device=self.ranks.device))
                except UserError as failure:
                    error = failure
        first_error(error)
        share = torch.cat(parts) if parts else None
        features = self._gathered(share, len(ordered))
        row = {text: index for index, text in enumerate(ordered)}
        return features[torch.tensor([row[text] for text in texts])]

    def pixels(self, pictures: Pictures, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Pictures as the model sees them, uint8 (n, 3, S, S), and which of them could be decoded, bool (n,)."""
        with one_torch_thread():
            return _stacked([self._load(pictures, index) for index in indices])

    def autocast(self) -> torch.autocast:
        """The context of the precision that this encoder computes in."""
        half = self._precision != torch.float32
        return torch.autocast(self.ranks.device.type, dtype=torch.bfloat16, enabled=half)

    @torch.inference_mode()
    def _share_of_pictures(self, pictures: Pictures, progress: Progress | None) -> Tensor | None:
        """This rank's features (own, D), zero for pictures that cannot be decoded; None where no one is its own."""
        own = range(self.ranks.rank, len(pictures), self.ranks.world_size)
        loaded = self._loaded(pictures, [own[i : i + self._batch] for i in range(0, len(own), self._batch)])
        parts: list[Tensor] = []
        with self.autocast():  # once: it keeps the weights that it has cast
            for start in self._starts(len(pictures), self._batch):
                self._between()
                if start >= len(own):
                    continue
                images, good = next(loaded)
                features = self.model.encode_image(normalise(images.to(self.ranks.device)), normalize=True)
                parts.append(features.float().cpu() * good[:, None])
                if progress is not None:
                    progress(min(start + self._batch, len(own)), len(own))
        return torch.cat(parts) if parts else None

    def _starts(self, total: int, size: int) -> range:
        """Where batches begin in the largest rank's share of ``total``; a smaller share may end before the last."""
        return range(0, -(-total // self.ranks.world_size), size)

    def _loaded(self, pictures: Pictures, batches: Sequence[range]) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches in order (see :meth:`pixels`)."""
        if not self._threads:
            yield from (self.pixels(pictures, batch) for batch in batches)
            return
        # One torch thread a decoding thread: a picture is too small to share.
        with one_torch_thread(), ThreadPoolExecutor(self._threads, "decode", torch.set_num_threads, (1,)) as pool:
            ahead: list[Future[tuple[Tensor, bool]]] = []
            for batch in (*batches, range(0)):
                waiting, ahead = ahead, [pool.submit(self._load, pictures, index) for index in batch]
                if waiting:
                    yield _stacked([future.result() for future in waiting])

    def _load(self, pictures: Pictures, index: int) -> tuple[Tensor, bool]:
        try:
            return self._transform(pictures.read(index)), True
        except Dropped as skip:
            log_skip(skip.reason, pictures.name(index), skip.detail)
        except OSError as error:
            log_skip(Drop.READ_ERROR, pictures.name(index), str(error))
        return torch.zeros(3, self._image_size, self._image_size, dtype=torch.uint8), False

    def _cached(self, pictures: Pictures) -> Path | None:
        if self._cache is None:
            return None
        name = hashlib.sha256(f"{_FORMAT} {self.identity} {pictures.fingerprint()}".encode()).hexdigest()
        return self._cache / f"{name[:32]}.safetensors"

    def _all_agree(self, value: bool) -> bool:
        """Whether it holds on every rank: a file may show on one node earlier than on another."""
        if self.ranks.world_size == 1:
            return value
        word = torch.tensor(int(value), device=self.ranks.device)
        dist.all_reduce(word, dist.ReduceOp.MIN)
        return bool(word)

    def _gathered(self, share: Tensor | None, total: int) -> Tensor:
        """(total, D) on the CPU from every rank's rows ``rank::world_size``."""
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
        # Row i of rank r is picture i * world_size + r.
        return gathered.transpose(0, 1).reshape(-1, int(width))[:total].cpu()


def _stacked(loaded: Sequence[tuple[Tensor, bool]]) -> tuple[Tensor, Tensor]:
    return torch.stack([image for image, _ in loaded]), torch.tensor([usable for _, usable in loaded])


def _decoding_threads(ranks: Ranks) -> int:
    if ranks.device.type == "cpu":
        return 0
    on_this_machine = min(ranks.world_size, torch.cuda.device_count())
    return max(1, min(_MAX_THREADS, (os.cpu_count() or 1) // on_this_machine))


def checkpoint_hash(folder: Path, card: ModelCard, precision: str) -> str:
    """Hex digest of a checkpoint's weights, tokenizer and architecture, and of the precision it is evaluated in."""
    files = sorted([*folder.glob("model.*safetensors"), folder / TOKENIZER_FILE])
    parts = [repr(card), precision, *(f"{file.name} {file_sha256(file)}" for file in files)]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _read_features(path: Path, count: int) -> PictureFeatures | None:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        logger.warning("%s: damaged features (%s): computing them again", path, error)
        return None
    if set(tensors) != {"features", "usable"} or len(tensors["features"]) != count:
        logger.warning("%s: features of another set: computing them again", path)
        return None
    return PictureFeatures(tensors["features"], tensors["usable"])
