"""Which local shards a name means, for training, curation, evaluation and search.

======================================  ==============================================================================
name                                    means
======================================  ==============================================================================
a folder                                the shards in it; if it has none, those in all folders below it
a file                                  that shard
``pool/*/*.tar``, ``pool/2024-*``       the shards that match the pattern, or those in the folders that match it
``{en,de}/{000..127}.tar``              every expansion of the braces
``one::two``, or a list                 the shards of each, together
``~/data``                              a path below the home folder
======================================  ==============================================================================

Links to folders are followed, each folder once. Hidden files and folders are ignored: they are unfinished writes or
leftovers of other programs.
"""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from mc2_hpc.errors import UserError

_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_NAMES = 10_000_000

Names = str | Path | Sequence[str]


def split_names(names: Names) -> list[str]:
    """Split a list, or names joined with ``::``, into single names.

    Raises:
        UserError: there are none, or one is empty.
    """
    parts = [str(names)] if isinstance(names, (str, Path)) else [str(name) for name in names]
    singles = [single for part in parts for single in part.split("::")]
    if not all(singles) or not singles:
        raise UserError(f"{names!r}: has an empty name; name folders, files or patterns of shards")
    return singles


def list_shards(names: Names, *suffixes: str) -> list[Path]:
    """The local shards that ``names`` mean by the table above, sorted by path, without duplicates.

    Args:
        suffixes: such as ``.tar``; files that end in one of them, in any case, are shards.

    Raises:
        UserError: one of the names matches no shard, or a folder cannot be read.
    """
    return sorted({path for name in split_names(names) for path in _of_one(name, suffixes)})


def expand_braces(pattern: str) -> list[str]:
    """Every string that ``pattern`` stands for: ``{a,b}`` gives each alternative, ``{08..10}`` each number, padded to
    the width of the first bound.

    Raises:
        UserError: more than ten million, or a range that runs backwards.
    """
    match = _BRACES.search(pattern)
    if match is None:
        return [pattern]
    numbers = _RANGE.fullmatch(match[1])
    if numbers is None:
        choices = match[1].split(",")
    else:
        first, last = int(numbers[1]), int(numbers[2])
        if not first <= last < first + _MOST_NAMES:
            raise UserError(f"{pattern}: {{{match[1]}}} is not a range of 1 to {_MOST_NAMES:,} numbers")
        choices = [f"{number:0{len(numbers[1])}d}" for number in range(first, last + 1)]
    tails = expand_braces(pattern[match.end() :])
    if len(choices) * len(tails) > _MOST_NAMES:
        raise UserError(f"{pattern}: stands for more than {_MOST_NAMES:,} names")
    return [pattern[: match.start()] + choice + tail for choice in choices for tail in tails]


def walk_files(folder: Path) -> Iterator[Path]:
    """All files in and below ``folder`` that are not hidden, in order of their names; links are followed.

    Dangling links and named pipes are included, so that readers count them as unreadable.

    Raises:
        UserError: a folder cannot be read.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot be read ({error.strerror})")

    seen: set[tuple[int, int]] = set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=fail):
        status = os.stat(parent)
        if (status.st_dev, status.st_ino) in seen:  # a cycle of links
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def _of_one(name: str, suffixes: Sequence[str]) -> list[Path]:
    path = Path(name).expanduser()
    if path.exists():  # a name may itself contain braces and stars
        return _of_path(path, suffixes)
    expanded = expand_braces(str(path))
    if len(expanded) > 1:
        return [found for one in expanded for found in _of_one(one, suffixes)]
    matches = [Path(match) for match in glob.glob(str(path), recursive=True)]
    found = [match for match in matches if match.suffix.lower() in suffixes and not match.is_dir()]
    if not found:  # the pattern may name folders of shards
        found = [shard for match in matches if match.is_dir() for shard in _of_path(match, suffixes)]
    if not found:
        raise UserError(f"{name}: no such folder, file or pattern of {_kinds(suffixes)} shards")
    return found


def _of_path(path: Path, suffixes: Sequence[str]) -> list[Path]:
    if not path.is_dir():
        return [path]
    below = [found for found in walk_files(path) if found.suffix.lower() in suffixes]
    if not below:
        raise UserError(f"{path}: folder has no {_kinds(suffixes)} shards, nor do the folders below it")
    return [found for found in below if found.parent == path] or below


def _kinds(suffixes: Sequence[str]) -> str:
    return " or ".join(f"*{suffix}" for suffix in suffixes)
