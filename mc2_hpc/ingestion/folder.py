"""A folder of images, at any depth, with a caption file of the same name beside each."""

from collections import Counter
from pathlib import Path

import pyarrow as pa

from mc2_hpc.drops import Drop
from mc2_hpc.errors import UserError
from mc2_hpc.ingestion.listing import SCHEMA
from mc2_hpc.samples import group_members, is_unicode
from mc2_hpc.shard_paths import walk_files
from mc2_hpc.tar import Member


def list_folder(folder: Path) -> tuple[pa.Table, Counter[str]]:
    """The listing of the folder's images, by the rules of :mod:`mc2_hpc.samples`, and what was left out by reason.

    Raises:
        UserError: the folder cannot be read, or no image in it has a caption file.
    """
    names = [str(path.relative_to(folder)) for path in walk_files(folder)]
    readable = [name for name in names if is_unicode(name)]
    listing = group_members(Member(name, 0, 0) for name in readable)
    drops = listing.drops
    if len(readable) < len(names):
        drops[Drop.CAPTION_NOT_UTF8] += len(names) - len(readable)
    rows = []
    for sample in listing.samples.values():
        if sample.image is None:
            drops[Drop.IMAGE_MISSING] += 1
        elif sample.caption is None and sample.record is None:
            drops[Drop.CAPTION_MISSING] += 1
        else:
            files = (member.name if member is not None else None for member in (sample.caption, sample.record))
            rows.append((sample.key, sample.image.name, None, None, *files))
    if not rows:
        found = listing.describe_others() if not listing.samples else "no image has a .txt or .json of the same name"
        raise UserError(f"{folder}: {found}; if a table has the captions: mc2 data pack TABLE --images {folder}")
    columns = dict(zip(SCHEMA.names, zip(*rows, strict=True), strict=True))
    return pa.table({name: pa.array(column, SCHEMA.field(name).type) for name, column in columns.items()}), drops
