"""Samples of any source, checked and written as one shard."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import simplejpeg

from mc2_hpc.caption_tables import KEY, LANG, TEXT
from mc2_hpc.curation.fetching.stored import plain_jpeg_shape, store
from mc2_hpc.curation.matched import write_matched
from mc2_hpc.curation.pool.copying import remove_shard
from mc2_hpc.curation.pool.language_id import LanguageIdentifier, make_identifier
from mc2_hpc.drops import Drop, Dropped, log_skip
from mc2_hpc.images import MAX_PIXELS, load_rgb, open_image
from mc2_hpc.jobs import stats_path
from mc2_hpc.reading.json_file import Count, Foreign
from mc2_hpc.samples import IMAGE_EXTENSIONS, Caption, is_unicode, pairing_key
from mc2_hpc.storage import atomic_path, write_json
from mc2_hpc.tar import escapes, fits_tar_name, write_tar

NO_LANGUAGE = "(none)"
"""In counters: captions without a language."""
_PLAIN_EXTENSIONS = ("ppm", "pgm", "pbm", "pnm", "tga")
"""Images that are recognised with the help of their name: their content has no signature, or a very short one."""


class Sample(NamedTuple):
    """An image and its captions, not read yet. Both functions raise Dropped."""

    key: str
    name: str
    """Of the image in its source, for messages and for its extension."""
    image: Callable[[], bytes]
    captions: Callable[[], list[Caption | Dropped]]
    """A caption that cannot be used is the reason instead; none at all is ``caption_missing``."""


class PackStats(Foreign):
    """``stats/<shard>.json`` of a folder of packed shards."""

    images: Count
    texts: Count
    formats: dict[str, Count]
    languages: dict[str, Count]
    drops: dict[str, Count]


@dataclass(frozen=True)
class PackOptions:
    """How samples become a shard."""

    language_id: str | None = None
    """Identifies the language of captions that do not name theirs; None leaves them without."""
    lang: str = ""
    """The language of captions that do not name theirs, instead of identifying it."""
    resize: int | None = None
    """Longest side of the stored images; None keeps their bytes."""


@dataclass
class _Kept:
    """What a shard keeps, and what it drops."""

    rows: list[tuple[str, str, str]] = field(default_factory=list)
    formats: Counter[str] = field(default_factory=Counter)
    drops: Counter[str] = field(default_factory=Counter)
    images: int = 0

    def drop(self, sample: Sample, dropped: Dropped) -> None:
        """Count a drop; log the first few of each reason."""
        self.drops[dropped.reason] += 1
        log_skip(dropped.reason, sample.name or sample.key, dropped.detail)


def write_samples(
    out: Path, shard: str, samples: Iterable[Sample], options: PackOptions, *, drops: Counter[str], made_of: str
) -> None:
    """Write ``<shard>.tar``, ``<shard>.parquet`` and ``stats/<shard>.json`` of the usable samples.

    Every sample is kept or counted under one reason; so is every other caption of an image that is kept. The same
    samples give the same bytes. One image is in memory at a time, and the captions of all.

    Args:
        samples: in the order of the tar.
        drops: what was left out before, by reason; may grow while the samples are read.
        made_of: recorded in the counters, see :class:`~mc2_hpc.ingestion.pack.PackFiles`.
    """
    kept = _Kept(drops=drops)
    with atomic_path(out / f"{shard}.tar") as temporary:
        write_tar(temporary, _files(samples, options, kept))
    languages = _languages(kept.rows, options)
    if kept.images:
        write_matched(out / f"{shard}.parquet", _table(kept.rows, languages))
    else:
        remove_shard(out, shard)
    stats = {
        "images": kept.images,
        "texts": len(kept.rows),
        "formats": dict(kept.formats),
        "languages": dict(Counter(lang or NO_LANGUAGE for lang in languages)),
        "drops": dict(kept.drops),
        "made_of": made_of,
    }
    write_json(stats_path(out, shard), stats)


def _files(samples: Iterable[Sample], options: PackOptions, kept: _Kept) -> Iterator[tuple[str, bytes]]:
    seen: set[str] = set()
    for sample in samples:
        try:
            _check_key(sample.key)
            if pairing_key(sample.key) in seen:
                raise Dropped(Drop.IMAGE_REPEATED, f"key {sample.key}")
            data = sample.image()
            captions, unusable = _usable(sample)
            data, extension = checked_image(data, sample.name, options.resize)
            name = f"{sample.key}.{extension}"
            if not fits_tar_name(name):
                raise Dropped(Drop.NAME_TOO_LONG)
        except Dropped as dropped:
            kept.drop(sample, dropped)
            continue
        seen.add(pairing_key(sample.key))
        for caption in unusable:
            kept.drop(sample, caption)
        kept.images += 1
        kept.formats[extension] += 1
        kept.rows += [(sample.key, text, lang) for text, lang in captions]
        yield name, data


def _check_key(key: str) -> None:
    if not key:
        raise Dropped(Drop.KEY_MISSING)
    if not is_unicode(key):
        raise Dropped(Drop.CAPTION_NOT_UTF8, "the key")
    if escapes(key):
        raise Dropped(Drop.NAME_UNSAFE)
    if key.rpartition("/")[2].startswith("."):
        raise Dropped(Drop.NAME_UNSAFE, "hidden, so readers of shards would ignore it")


def _usable(sample: Sample) -> tuple[list[Caption], list[Dropped]]:
    """The distinct captions that can be used, sorted, and why the others cannot.

    Raises:
        Dropped: there is none; the reason is that of the first.
    """
    found = sample.captions()
    if not found:
        raise Dropped(Drop.CAPTION_MISSING)
    captions: dict[str, Caption] = {}
    bad: list[Dropped] = []
    for caption in found:
        if isinstance(caption, Dropped):
            bad.append(caption)
        elif caption.text in captions:
            bad.append(Dropped(Drop.CAPTION_REPEATED, caption.text[:60]))
        else:
            captions[caption.text] = caption
    if not captions:
        raise bad[0]
    return [captions[text] for text in sorted(captions)], bad


def checked_image(data: bytes, name: str, resize: int | None) -> tuple[bytes, str]:
    """What to store of an image, and the extension of its format. Its pixels are decoded, so that what is stored can be
    trained on.

    Args:
        name: its file name, if it has one; decides only for formats without a signature.
        resize: longest side in pixels; a larger image, and any that is not upright, becomes a smaller JPEG.

    Raises:
        Dropped: see :func:`mc2_hpc.curation.fetching.stored.store`.
    """
    extension = name.rpartition(".")[2].lower()
    try:
        stored = store(data, resize)
    except Dropped as dropped:
        if dropped.reason != Drop.NOT_AN_IMAGE or extension not in _PLAIN_EXTENSIONS:
            raise _with_known_name(dropped, extension) from None
        load_rgb(open_image(data))
        return data, extension
    if stored.data is data:
        _decode(data)
    return stored.data, stored.extension


def _with_known_name(dropped: Dropped, extension: str) -> Dropped:
    """A file that is named as an image and is not one counts as a damaged image, as in training."""
    if dropped.reason == Drop.NOT_AN_IMAGE and extension in IMAGE_EXTENSIONS:
        return Dropped(Drop.IMAGE_UNDECODABLE, dropped.detail or "no known image format")
    return dropped


def _decode(data: bytes) -> None:
    """Decode an image in the cheapest way that finds damage; raises Dropped."""
    shape = plain_jpeg_shape(data)
    if shape is not None and shape[0] * shape[1] <= MAX_PIXELS:
        try:
            simplejpeg.decode_jpeg(data, min_height=1, min_width=1)  # at an eighth of its size
            return
        except ValueError:
            pass  # Pillow tolerates some damage, and names the rest, as in training
    load_rgb(open_image(data))


def _languages(rows: list[tuple[str, str, str]], options: PackOptions) -> list[str]:
    """The language of each row; empty if unknown."""
    langs = [lang or options.lang for _, _, lang in rows]
    unknown = [number for number, lang in enumerate(langs) if not lang]
    if options.language_id is not None and unknown:
        found = _identifier(options.language_id).identify([rows[number][1] for number in unknown])
        for number, lang in zip(unknown, found, strict=True):
            langs[number] = lang
    return langs


@lru_cache(maxsize=1)
def _identifier(name: str) -> LanguageIdentifier:
    """Cached, because loading a model can take longer than packing a shard."""
    return make_identifier(name)


def _table(rows: list[tuple[str, str, str]], languages: list[str]) -> pa.Table:
    columns = {KEY: [key for key, _, _ in rows], TEXT: [text for _, text, _ in rows]}
    if any(languages):
        columns[LANG] = [lang or None for lang in languages]  # type: ignore[misc]
    return pa.table({name: pa.array(values, pa.string()) for name, values in columns.items()})
