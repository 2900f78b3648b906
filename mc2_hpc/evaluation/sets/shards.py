"""Image-text shards as training reads them: curated shards and plain WebDataset tars, local or remote."""

from collections import Counter
from pathlib import Path

from mc2_hpc.data.locations import ShardSet, find_shards
from mc2_hpc.data.remote import CannotReach
from mc2_hpc.data.shards import Shard
from mc2_hpc.data.skips import ShardError
from mc2_hpc.drops import Drop, Dropped, log_skip
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.images import ShardImages, digest
from mc2_hpc.evaluation.tasks import Captions, Retrieval
from mc2_hpc.samples import Caption
from mc2_hpc.shard_paths import Names


def shards(path: Names) -> Retrieval:
    """Every image in the shards with all of its captions; unusable samples are counted as in training.

    Args:
        path: any form of ``data.train``: a folder, file, pattern, list or address (``mc2_hpc.data.locations``).
    """
    found = find_shards(path)
    skipped: Counter[str] = Counter()
    places: list[tuple[int, int]] = []
    texts: dict[str, list[str]] = {}
    owners: dict[str, list[int]] = {}
    marks = []
    for number, name in enumerate(found.names):
        shard = _opened(found, number, skipped)
        if shard is None:
            continue
        marks.append([name, *_stamp(name), digest(shard.row_hashes().tolist())])
        for place in range(shard.num_keys):
            captions = _captions(shard, place, skipped)
            for caption in captions:
                texts.setdefault(caption.lang, []).append(caption.text)
                owners.setdefault(caption.lang, []).append(len(places))
            places += [(number, place)] if captions else []
    if not places:
        counts = ", ".join(f"{reason} {count}" for reason, count in skipped.most_common())
        raise UserError(f"{path}: no image can be used; everything was skipped: {counts or 'unreadable'}")
    languages = {lang: Captions(texts=texts[lang], images=owners[lang]) for lang in sorted(texts)}
    images = ShardImages(found, places, digest([marks, places]))
    return Retrieval(images=images, languages=languages, pooled=True, skipped=dict(+skipped))


def _opened(found: ShardSet, number: int, skipped: Counter[str]) -> Shard | None:
    try:
        shard = found.open(number)
    except ShardError as error:
        log_skip(Drop.SHARD_UNREADABLE, found.names[number], str(error))
        skipped[Drop.SHARD_UNREADABLE] += 1
        return None
    except CannotReach as error:
        raise UserError(f"{found.names[number]}: {error}") from None
    skipped.update(shard.drops)
    return shard


def _captions(shard: Shard, place: int, skipped: Counter[str]) -> list[Caption]:
    try:
        return shard.read_captions(place)
    except Dropped as skip:
        log_skip(skip.reason, f"{shard.name}, image {place}", skip.detail)
        skipped[skip.reason] += 1
        return []


def _stamp(name: str) -> list[int]:
    """Size and modification time of a local shard; a remote shard is identified only by its keys."""
    if "://" in name:
        return []
    status = Path(name).stat()
    return [status.st_size, status.st_mtime_ns]
