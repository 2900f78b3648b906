"""Codes of an encoder's features: the signs of 256 random projections, of which each 64 are a hash.

The recipe's hash (Meta CLIP 2, appendix A.2) with any encoder: a copy-detection model such as SSCD, or a CLIP model.
Two features at an angle of a differ in each bit with probability a / pi (Charikar, STOC 2002). Before the sign is
taken, the mean over all images is subtracted from each projection: the features of many encoders, CLIP's among them,
all point roughly the same way, and their signs would be nearly the same.

An image has four codes, each with another 64 of the 256 bits as its hash, so that a copy is found if any of the four
hashes is near. Projections are whole numbers, and so the mean does not depend on the order of the images.
"""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from mc2_hpc.compiling import compiled
from mc2_hpc.curation.copies.codes import pack_bits
from mc2_hpc.curation.copies.linking import ENTRY, WORDS, Entries, bit_count
from mc2_hpc.curation.filters import sources_of
from mc2_hpc.draws import hash_keys, random_uint64
from mc2_hpc.errors import UserError
from mc2_hpc.jobs.named import Named, constructor_options, describe, import_object, to_plain

CLIP = "mc2_hpc.evaluation.image_features.ClipFeatures"
"""The encoder for folders of models."""
NUM_PROJECTIONS = 64 * WORDS
_SCALE = 1 << 20
_WITHOUT_DIRECTION = 16
_FORM = "--features FOLDER, or --features package.module.Class key=value ..."


class Encoder(Protocol):
    """Images to features. Created once per process. May have a method ``sources()`` with digests of the files that it
    reads, by name; they are recorded, and the same in every run on a folder."""

    def encode(self, images: Sequence[Image.Image]) -> npt.NDArray[np.floating]:
        """Features ``(n, D)`` of images in RGB, of any length but zero."""
        ...


def parse_encoder(words: Sequence[str]) -> Named:
    """An encoder from the words of ``--features``: a model folder, or a class with options of the types it declares.

    Raises:
        UserError: malformed words, no such folder or class, or options that it does not have.
    """
    name, *options = words
    if Path(name).exists():
        name, options = CLIP, [f"model={Path(name).absolute()}", *options]
    kind = import_object(name)
    if not isinstance(kind, type) or not callable(getattr(kind, "encode", None)):
        raise UserError(f"--features {name}: an encoder is a class with a method encode(images); see docs/images.md")
    return Named(name, constructor_options(kind, options, f"--features {name}", form=_FORM))


def load_encoder(named: Named) -> Encoder:
    """An instance of the encoder.

    Raises:
        UserError: its constructor rejects the options.
    """
    try:
        return Named(named.name, named.arguments or {}).load()
    except UserError:
        raise
    except Exception as error:  # whatever the constructor does
        raise UserError(f"--features {named.name}: constructing it failed: {describe(error)}") from error


def encoder_settings(named: Named | None) -> dict[str, Any]:
    """What a stage records of its encoder: its name and options and, if it has a method ``sources()``, the digests of
    the files that it reads. It is constructed here, so that a missing or damaged one is refused before any work.

    Raises:
        UserError: see :func:`load_encoder` and :func:`~mc2_hpc.curation.filters.sources_of`.
    """
    if named is None:
        return {"encoder": None}
    sources = sources_of(f"--features {named.name}", load_encoder(named))
    return {"encoder": to_plain(named), **({"encoder_sources": sources} if sources else {})}


def projections_of(encoder: Encoder, images: Sequence[Image.Image]) -> npt.NDArray[np.int32]:
    """Projections of the images' features at unit length, ``(n, NUM_PROJECTIONS)``.

    Raises:
        UserError: the encoder raises, or does not return a finite feature, other than zero, per image.
    """
    name = type(encoder).__qualname__
    try:
        features: Any = encoder.encode(images)
    except UserError:
        raise
    except Exception as error:  # whatever the encoder does
        raise UserError(f"{name}: encode raised {describe(error)}") from error
    features = np.asarray(features)
    if features.ndim != 2 or len(features) != len(images) or features.dtype.kind != "f":
        raise UserError(f"{name}: encode must return floats ({len(images)}, D), not {features.dtype} {features.shape}")
    features = features.astype(np.float64)
    length = np.linalg.norm(features, axis=1, keepdims=True)
    if not np.isfinite(length).all() or not length.all():
        raise UserError(f"{name}: a feature is not finite, or zero")
    return np.rint(features / length @ _directions(features.shape[1]) * _SCALE).astype(np.int32)


def nearest_features(
    words: npt.NDArray[np.uint64], against: npt.NDArray[np.uint64], *, max_distance: int, max_check: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each of ``words`` ``(n, WORDS)``, the index of the nearest copy in ``against`` ``(m, WORDS)``, -1 if there is
    none, and the bits of 256 in which they differ.

    Copies are those that :func:`~mc2_hpc.curation.copies.linking.link` links. All pairs are compared; ties go to the
    first.
    """
    return _nearest(np.ascontiguousarray(words), np.ascontiguousarray(against), max_distance, max_check)


@compiled
def _nearest(words, against, max_distance, max_check):
    index, distance = np.full(len(words), -1), np.full(len(words), 64 * WORDS + 1)
    for row in range(len(words)):
        for other in range(len(against)):
            total = 0
            for word in range(WORDS):
                total += bit_count(words[row, word] ^ against[other, word])
            if total < distance[row] and total <= max_distance + max_check:
                for word in range(WORDS):
                    bits = bit_count(words[row, word] ^ against[other, word])
                    if bits <= max_distance and total - bits <= max_check:
                        index[row], distance[row] = other, total
    return index, distance


@lru_cache(maxsize=1)
def _directions(width: int) -> npt.NDArray[np.float64]:
    """Random directions ``(width, NUM_PROJECTIONS)`` of elements 1 and -1, the same everywhere and always."""
    rows = hash_keys([str(row) for row in range(width)])
    words = [random_uint64(rows, seed=0, epoch=word, purpose="projection") for word in range(WORDS)]
    bits = np.unpackbits(np.stack(words, axis=1).astype(">u8").view(np.uint8), axis=1)
    return np.where(bits, 1.0, -1.0)


def centre_of(projections: Iterable[npt.NDArray[np.int32]]) -> npt.NDArray[np.int64]:
    """The mean of projections ``(n, NUM_PROJECTIONS)`` given in parts, as if some more images had none.

    Without these, the centre of a few images would be so near each of them that their signs are noise.
    """
    total, count = np.zeros(NUM_PROJECTIONS, np.int64), _WITHOUT_DIRECTION
    for part in projections:
        total += part.sum(axis=0, dtype=np.int64)
        count += len(part)
    return total // count


def feature_words(projections: npt.NDArray[np.int32], centre: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    """Bits of features, ``(n, WORDS)``: on which side of the centre each projection is."""
    return pack_bits(projections > centre)


def feature_codes(
    projections: npt.NDArray[np.int32], centre: npt.NDArray[np.int64], images: npt.NDArray[np.integer]
) -> Entries:
    """The codes of images by their numbers ``(n,)``: four for each."""
    words = feature_words(projections, centre)
    entries = np.zeros((WORDS, len(words)), ENTRY)
    for first in range(WORDS):
        entries[first]["words"] = np.roll(words, -first, axis=1)
        entries[first]["image"] = images
    return entries.reshape(-1)
