"""A WebDataset shard, with its captions in the tar or in a table beside it, as samples."""

from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from mc2_hpc.caption_tables import KEY, LANG, TEXT, is_caption_table
from mc2_hpc.curation.pool.captions import PoolShard, iter_captions
from mc2_hpc.curation.pool.image_tars import TarIndex
from mc2_hpc.drops import Drop, Dropped
from mc2_hpc.errors import UserError
from mc2_hpc.ingestion.samples import Sample
from mc2_hpc.samples import ByKey, Caption
from mc2_hpc.samples import Sample as Members
from mc2_hpc.tar import Member


def tar_samples(name: str, tar: Path, index: TarIndex, drops: Counter[str]) -> Iterator[Sample]:
    """The samples of an open tar in the order of their keys; what is left out before is counted in ``drops``.

    Raises:
        UserError: the tar has no samples, or its table cannot be read.
    """
    listing = index.listing
    drops.update(listing.drops)
    if index.members and not listing.samples and not listing.drops:
        raise UserError(f"{tar}: {listing.describe_others()}")
    table = tar.with_suffix(".parquet")
    if is_caption_table(table):
        yield from _with_table(PoolShard(name, table, tar), index, drops)
        return
    for sample in sorted(listing.samples.values(), key=lambda sample: sample.key):
        yield _of_members(index, sample)


def _of_members(index: TarIndex, sample: Members) -> Sample:
    def captions() -> list[Caption | Dropped]:
        if sample.caption is None and sample.record is None:
            return []
        try:
            return [*index.captions_of(sample)]
        except UserError as error:
            raise Dropped(Drop.READ_ERROR, str(error)) from None

    return Sample(sample.key, sample.image.name if sample.image else "", _image(index, sample.image), captions)


def _with_table(shard: PoolShard, index: TarIndex, drops: Counter[str]) -> Iterator[Sample]:
    texts: dict[str, list[Caption | Dropped]] = {}
    for rows, dropped in iter_captions(shard):
        drops.update(dropped)
        langs = rows[LANG].to_pylist() if LANG in rows.column_names else [None] * len(rows)
        for key, text, lang in zip(rows[KEY].to_pylist(), rows[TEXT].to_pylist(), langs, strict=True):
            texts.setdefault(key, []).append(Caption(text.strip(), lang or ""))
    images = ByKey((sample.key, sample.image) for sample in index.listing.samples.values() if sample.image is not None)
    used = set()
    for key in sorted(texts):
        image = images.get(key)
        used.add(image)
        yield Sample(key, image.name if image else "", _image(index, image), partial(list, texts[key]))
    for sample in index.listing.samples.values():
        if sample.image is not None and sample.image not in used:
            drops[Drop.CAPTION_MISSING] += 1


def _image(index: TarIndex, member: Member | None) -> Callable[[], bytes]:
    def read() -> bytes:
        if member is None:
            raise Dropped(Drop.IMAGE_MISSING)
        return _read(index, member)

    return read


def _read(index: TarIndex, member: Member) -> bytes:
    try:
        return index.read(member)
    except UserError as error:
        raise Dropped(Drop.READ_ERROR, str(error)) from None
