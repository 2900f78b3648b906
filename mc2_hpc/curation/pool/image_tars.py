"""The tar of a shard's images, as its writer left it: what curation reads from pools and shards."""

from collections import Counter
from pathlib import Path
from types import TracebackType

from mc2_hpc.errors import UserError
from mc2_hpc.tar import LocalFile, TarError, list_members

JPEG_EXTENSIONS = ("jpg", "jpeg")
_OTHER_IMAGES = ("png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jxl")


class TarIndex:
    """Names and places of a tar's regular files; read members in any order.

    No index is kept beside the tar, as the loader does it: curation reads a tar once or twice, in full.

    Raises:
        UserError: not a tar, damaged, or cut short (data missing, or no end-of-archive mark).
    """

    def __init__(self, path: Path):
        self.path = path
        self.members: dict[str, tuple[int, int]] = {}
        """Offset and size of each file by name; of a name that occurs again the first stays."""
        self.repeated: list[str] = []
        """Names that occurred again."""
        try:
            self._file = LocalFile(path)
        except OSError as error:
            raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
        try:
            members = list_members(self._file)
        except (TarError, OSError) as error:
            raise UserError(f"{path}: not a whole tar ({error}); fetch or write it again") from None
        for name, offset, size in members:
            if name in self.members:
                self.repeated.append(name)
            else:
                self.members[name] = (offset, size)

    def read(self, name: str) -> bytes:
        """Content of a member.

        Raises:
            UserError: the tar has shrunk, or cannot be read any more.
        """
        try:
            return self._file.read(*self.members[name])
        except OSError as error:
            raise UserError(f"{self.path}: {name} cannot be read ({error}); fetch or write it again") from None

    def images(self) -> tuple[dict[str, str], Counter[str]]:
        """Member name of each image by key (the name without ``.jpg``), and what was left aside, by reason.

        Reasons: ``unsupported_image`` (no JPEG), ``duplicate_image`` (a second image for a key).
        """
        found: dict[str, str] = {}
        drops: Counter[str] = Counter()
        for name in [*self.members, *self.repeated]:
            key, _, extension = name.rpartition(".")
            extension = extension.lower()
            if extension in _OTHER_IMAGES:
                drops["unsupported_image"] += 1
            elif extension in JPEG_EXTENSIONS:
                if key in found:
                    drops["duplicate_image"] += 1
                else:
                    found[key] = name
        return found, drops

    def __enter__(self) -> "TarIndex":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._file  # which closes it
