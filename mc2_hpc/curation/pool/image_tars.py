"""The tar of a shard's images, as curation reads it from pools and shards."""

from functools import cached_property
from pathlib import Path
from types import TracebackType

from mc2_hpc.errors import UserError
from mc2_hpc.samples import Listing, group_members
from mc2_hpc.tar import LocalFile, Member, TarError, list_members


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
            raise UserError(f"{self.path}: {member.name} cannot be read ({error}); fetch or write it again") from None

    def __enter__(self) -> "TarIndex":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._file  # closes it
