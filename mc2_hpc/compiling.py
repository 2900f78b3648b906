"""numba's compiler with a cache that can always be written.

numba caches machine code beside the source, or else in the user's cache folder. If neither is writable, as in a
container with a read-only image and no home, numba raises an error; here the cache then goes to a temporary folder.
"""

import logging
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import config

logger = logging.getLogger(__name__)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``numba.njit`` that releases the GIL and caches what it compiles."""
    settings: Any = config  # numba fills it in at import, so its attributes have no types
    compiler = numba.njit(nogil=True, cache=True)
    try:
        return compiler(function)
    except RuntimeError as error:  # "no locator available"
        if settings.CACHE_DIR:
            raise
        settings.CACHE_DIR = str(_temporary_folder())
        logger.info("caching compiled code in %s: %s", settings.CACHE_DIR, error)
        return compiler(function)


def _temporary_folder() -> Path:
    """A folder that only this user can write, because the code in it will be executed."""
    folder = Path(tempfile.gettempdir()) / f"mc2_hpc-numba-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022:
        return folder
    return Path(tempfile.mkdtemp(prefix="mc2_hpc-numba-"))
