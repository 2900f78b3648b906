"""The tar of a shard's images, as curation reads it from pools and shards."""

from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from types import TracebackType

from mc2_hpc.drops import Drop
from mc2_hpc.errors import UserError
from mc2_hpc.reading.files import shown
from mc2_hpc.samples import (
    JPEG_EXTENSIONS,
    LARGEST_RECORD,
    ByKey,
    Caption,
    Listing,
    Sample,
    captions_of,
    group_members,
)
from mc2_hpc.tar import LocalFile, Member, TarError, escapes, fits_tar_name, list_members


class TarIndex:
    """Members of a tar, readable in any order.

    Unlike the loader, curation keeps no index beside the tar, because it reads a tar once or twice, in full.

    Raises:
        UserError: not a tar, damaged, or truncated (data or the end-of-archive mark is missing).
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = LocalFile(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
        try:
            self.members: list[Member] = list_members(self._file)
            """Regular files in order."""
        except (TarError, OSError) as error:
            raise UserError(f"{path}: not a complete tar ({error}); fetch or write it again") from None

    @cached_property
    def listing(self) -> Listing:
        """The samples that the members form, and what was left out."""
        return group_members(self.members)

    def read(self, member: Member) -> bytes:
        """The content of a member.

        Raises:
            UserError: the tar has shrunk, or can no longer be read.
        """
        try:
            return self._file.read(member.offset, member.size)
        except OSError as error:
            raise UserError(
                f"{self.path}: {shown(member.name)} cannot be read ({error}); fetch or write it again"
            ) from None

    def captions_of(self, sample: Sample) -> list[Caption]:
        """The captions of a sample that has a caption or a record, see :func:`mc2_hpc.samples.captions_of`. No more of
        either is read than decides that it is too large.

        Raises:
            Dropped: there is no usable caption.
            UserError: see :meth:`read`.
        """
        parts = [
            None if member is None else self.read(member._replace(size=min(member.size, LARGEST_RECORD + 1)))
            for member in (sample.caption, sample.record)
        ]
        return captions_of(*parts)

    def __enter__(self) -> "TarIndex":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._file  # closes it


def writable_images(listing: Listing, keys: Iterable[str]) -> tuple[dict[str, Member], dict[str, Drop], int]:
    """Which of a tar's images belong to ``keys`` and can be written to another tar under :func:`packed_name`.

    Returns:
        the images by key, in the order of the keys; the reason (``image_missing``, ``name_unsafe``, ``name_too_long``)
        of every other key; and the number of images that belong to no key
    """
    in_tar = [(sample.key, sample.image) for sample in listing.samples.values() if sample.image is not None]
    by_key = ByKey(in_tar)
    found: dict[str, Member] = {}
    missing: dict[str, Drop] = {}
    used = set()
    for key in keys:
        image = by_key.get(key)
        if image is None:
            missing[key] = Drop.IMAGE_MISSING
            continue
        used.add(image.name)
        if escapes(key):
            missing[key] = Drop.NAME_UNSAFE
        elif not fits_tar_name(packed_name(key, image)):
            missing[key] = Drop.NAME_TOO_LONG
        else:
            found[key] = image
    return found, missing, len(in_tar) - len(used)


def packed_name(key: str, image: Member) -> str:
    """The name of a key's image in a tar that curation writes: the key and the format's usual extension."""
    extension = image.name.rpartition(".")[2].lower()
    return f"{key}.{'jpg' if extension in JPEG_EXTENSIONS else extension}"
