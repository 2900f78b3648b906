"""The tar of a shard's images, as its writer left it: what curation reads from pools and shards."""

from functools import cached_property
from pathlib import Path
from types import TracebackType

from mc2_hpc.errors import UserError
from mc2_hpc.samples import Listing, group_members
from mc2_hpc.tar import LocalFile, Member, TarError, list_members


class TarIndex:
    """Members of a tar; read them in any order.

    No index is kept beside the tar, as the loader does it: curation reads a tar once or twice, in full.

    Raises:
        UserError: not a tar, damaged, or cut short (data missing, or no end-of-archive mark).
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
            raise UserError(f"{path}: not a whole tar ({error}); fetch or write it again") from None

    @cached_property
    def listing(self) -> Listing:
        """The samples that the members make, and what was left aside."""
        return group_members(self.members)

    def read(self, member: Member) -> bytes:
        """Content of a member.

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
        del self._file  # which closes it
