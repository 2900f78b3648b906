"""Readers of evaluation sets: each reads one public file layout into a task.

A reader is ``read(path, **options) -> Task``. It checks that every file it needs exists and names the first missing
one; it downloads nothing. Readers in other packages have dotted names: ``mypackage.mymodule.read``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import wraps
from typing import Any

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.sets import captions, classes, clip_benchmark, culture, cvqa, shards, winogavil
from mc2_hpc.evaluation.tasks import Task
from mc2_hpc.jobs.named import describe, import_object


@dataclass(frozen=True)
class Reader:
    """How a set is read, and the protocol of its numbers."""

    read: Callable[..., Task]
    protocol: str
    addresses: bool = False
    """Whether the set's place may be an address (``s3://...``) in place of a path."""


_TOP1 = "unit-length mean of unit-length text features over templates; cosine; any right class counts"
_RECALL = "share of texts whose image is among the k closest, and of images with a caption among the k closest"

READERS = {
    "imagenet": Reader(classes.imagenet, f"80 templates; {_TOP1}"),
    "babel_imagenet": Reader(classes.babel_imagenet, f"each language's own classes and prompts; {_TOP1}; mean of all"),
    "class_folders": Reader(classes.class_folders, _TOP1),
    "labelled_parquet": Reader(classes.labelled_parquet, _TOP1),
    "clip_benchmark": Reader(clip_benchmark.clip_benchmark, f"CLIP_benchmark's layout; {_TOP1}; or {_RECALL}"),
    "xm3600": Reader(captions.xm3600, f"all captions of each locale; {_RECALL}; mean of locales"),
    "caption_lines": Reader(captions.caption_lines, f"one caption per line; {_RECALL}; mean of languages"),
    "coco": Reader(captions.coco, f"COCO caption annotations; {_RECALL}"),
    "shards": Reader(
        shards.shards, f"all captions at once, and those of each language by themselves; {_RECALL}", addresses=True
    ),
    "winogavil": Reader(
        winogavil.winogavil, "the images closest to the cue, as many as go with it; Jaccard index; mean of rounds"
    ),
    "cvqa": Reader(
        cvqa.cvqa, "question and option as one text, the closest of the options is the answer; all questions"
    ),
    "dollar_street": Reader(culture.dollar_street, f"ImageNet's names and 80 templates; {_TOP1}"),
    "geode": Reader(culture.geode, _TOP1),
    "gldv2": Reader(culture.gldv2, _TOP1),
    "dollar_street_places": Reader(culture.dollar_street_places, "ridge regression on 5, 10, 25 images per place"),
    "geode_places": Reader(
        culture.geode_places, "ridge regression on 5, 10, 25 images per place; 20,000 to learn from"
    ),
    "xm3600_places": Reader(culture.xm3600_places, "ridge regression on 5, 10, 25 images per place; halves"),
}
"""By the name given as ``reader`` in a suite file."""


def reader_of(name: str) -> Reader:
    """The reader with this name: one of :data:`READERS`, or a function by its dotted name.

    Raises:
        UserError: it is neither.
    """
    if name in READERS:
        return READERS[name]
    if "." not in name:
        raise UserError(
            f"unknown reader {name!r}; choose one of {', '.join(READERS)}, or name a function: mypackage.mymodule.read"
        )
    read = import_object(name)
    if not callable(read):
        raise UserError(f"{name}: not a function that reads a set")
    return Reader(_guarded(name, read), f"as {name} reads it", addresses=True)


def _guarded(name: str, read: Callable[..., Any]) -> Callable[..., Task]:
    """A user's function as a reader: any failure in it is a one-line error of its set only."""

    @wraps(read)
    def guarded(*arguments: Any, **options: Any) -> Task:
        try:
            task = read(*arguments, **options)
        except UserError:
            raise
        except Exception as error:  # whatever the code raises
            raise UserError(f"{name}: {describe(error)}") from error
        if not isinstance(task, Task):
            raise UserError(f"{name}: returned {type(task).__name__}, not a task of mc2_hpc.evaluation.tasks")
        return task

    return guarded
