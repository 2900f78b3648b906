"""Tars of images: an index over one that others wrote, and a writer whose bytes depend on its content alone."""

import io
import tarfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

from mc2_hpc.errors import UserError

JPEG_EXTENSIONS = ("jpg", "jpeg")
_OTHER_IMAGES = ("png", "webp", "gif", "bmp", "tif", "tiff", "avif", "jxl")
_BLOCK = 512


class TarIndex:
    """Names and places of a tar's regular files; read members in any order.

    Raises:
        UserError: not a tar, or cut short (data missing, or no end-of-archive mark).
    """

    def __init__(self, path: Path):
        self.path = path
        self.members: dict[str, tuple[int, int]] = {}
        """Offset and size of each file by name; of a name that occurs again the first stays."""
        self.repeated: list[str] = []
        """Names that occurred again."""
        try:
            self._stream = open(path, "rb")
        except OSError as error:
            raise UserError(f"{path}: cannot be opened ({error.strerror})") from None
        try:
            self._scan()
        except BaseException:
            self._stream.close()
            raise

    def _scan(self) -> None:
        try:
            with tarfile.open(fileobj=self._stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                for member in tar:
                    if not member.isreg() or member.issparse():
                        continue
                    if member.name in self.members:
                        self.repeated.append(member.name)
                    else:
                        self.members[member.name] = (member.offset_data, member.size)
                end = tar.offset
        except (tarfile.TarError, OSError, ValueError) as error:
            raise UserError(f"{self.path}: not a whole tar ({error}); fetch or write it again") from None
        # tarfile takes a damaged header in mid-archive for the end of the archive.
        self._stream.seek(end)
        if self._stream.read(_BLOCK) != bytes(_BLOCK):
            raise UserError(
                f"{self.path}: damaged or cut short at byte {end} (no end-of-archive mark); fetch or write it again"
            )

    def read(self, name: str) -> bytes:
        """Content of a member."""
        offset, size = self.members[name]
        self._stream.seek(offset)
        return self._stream.read(size)

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

    def close(self) -> None:
        """Close the file."""
        self._stream.close()

    def __enter__(self) -> "TarIndex":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def fits_tar_name(name: str) -> bool:
    """Whether a ustar header, which every reader knows, can hold the name: 100 bytes, or 255 split at a slash."""
    header = tarfile.TarInfo(name)
    try:
        header.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape")
    except ValueError:
        return False
    return True


def write_tar(path: Path, files: Iterable[tuple[str, bytes]]) -> None:
    """Write a ustar archive of ``(name, content)`` in the given order: no times, owners or modes of this machine."""
    with open(path, "wb") as stream, tarfile.open(fileobj=stream, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in files:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
