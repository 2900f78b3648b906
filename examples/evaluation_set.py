"""A reader for a custom evaluation set: a folder of images and a table ``labels.csv`` of ``file,class``.

A suite refers to it by its dotted name:

    sets:
      birds: {reader: evaluation_set.read, path: /data/birds, options: {template: "a photo of a {}, a bird"}}

    PYTHONPATH=examples mc2 eval MODEL --suite suite.yaml
"""

from pathlib import Path

from mc2_hpc.evaluation.images import ImageFiles
from mc2_hpc.evaluation.sets.files import read_csv
from mc2_hpc.evaluation.tasks import Classification, ClassTexts


def read(path: Path, template: str = "a photo of a {}") -> Classification:
    """The images listed in the table; the classes are the distinct values of its second column."""
    rows = read_csv(path / "labels.csv", ["file", "class"], "the table of files and classes")
    names = sorted({row["class"] for row in rows})
    number = {name: place for place, name in enumerate(names)}
    return Classification(
        images=ImageFiles(path, [row["file"] for row in rows]),
        labels=[(number[row["class"]],) for row in rows],
        languages={"en": ClassTexts(classes=range(len(names)), names=names, templates=[template])},
    )
