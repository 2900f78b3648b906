"""WebDatasets in CLIP_benchmark's layout, of classes or of captions."""

from pathlib import Path

from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.pictures import EXTENSIONS, PictureMembers, tar_samples
from mc2_hpc.evaluation.sets.files import read_lines, read_text, required
from mc2_hpc.evaluation.tasks import Captions, Classification, ClassTexts, Retrieval
from mc2_hpc.tar import LocalFile, Member


def clip_benchmark(path: Path, split: str = "test", metric: str = "accuracy") -> Classification | Retrieval:
    """A WebDataset in CLIP_benchmark's layout.

    ``<path>/<split>/nshards.txt`` and ``0.tar`` ... Where ``dataset_type.txt`` says ``retrieval``, samples have a
    ``<key>.txt`` with one caption a line; else a ``<key>.cls``, and there are ``classnames.txt`` and
    ``zeroshot_classification_templates.txt``, whose templates have ``{c}``.

    Args:
        metric: one of ``tasks.METRICS``, for classes.
    """
    kind_file = path / "dataset_type.txt"
    kind = read_text(kind_file, "").strip().lower() if kind_file.is_file() else "classification"
    if kind not in ("classification", "retrieval"):
        raise UserError(f"{kind_file}: {kind[:20]!r} sets are not scored, only classification and retrieval")
    members, payloads, skipped = _samples(path / split, "txt" if kind == "retrieval" else "cls")
    if kind == "retrieval":
        owned = [(line, owner) for owner, text in enumerate(payloads) for line in text.splitlines() if line.strip()]
        captions = Captions(texts=[text for text, _ in owned], pictures=[owner for _, owner in owned])
        return Retrieval(pictures=PictureMembers(members), languages={"en": captions}, skipped=skipped)
    names = read_lines(path / "classnames.txt", "one class name a line")
    forms = read_lines(path / "zeroshot_classification_templates.txt", "one template a line")
    labels = [(_class(text, *member, len(names)),) for text, member in zip(payloads, members, strict=True)]
    texts = ClassTexts(classes=range(len(names)), names=names, templates=[form.replace("{c}", "{}") for form in forms])
    return Classification(
        pictures=PictureMembers(members), labels=labels, languages={"en": texts}, metric=metric, skipped=skipped
    )


def _samples(folder: Path, wanted: str) -> tuple[list[tuple[Path, Member]], list[str], dict[str, int]]:
    """Of every complete sample, its picture and the text of its ``wanted`` file; and the count of the others."""
    members: list[tuple[Path, Member]] = []
    payloads: list[str] = []
    incomplete = 0
    count = _number(folder / "nshards.txt")
    for shard in (folder / f"{number}.tar" for number in range(count)):
        source = LocalFile(required(shard, f"{folder / 'nshards.txt'} says {count} shards"))
        for files in tar_samples(shard).values():
            picture = next((files[extension[1:]] for extension in EXTENSIONS if extension[1:] in files), None)
            if picture is None or wanted not in files:
                incomplete += 1
                continue
            try:
                payloads.append(source.read(files[wanted].offset, files[wanted].size).decode("utf-8"))
            except UnicodeDecodeError as error:
                raise UserError(f"{shard}: {files[wanted].name} is not UTF-8 ({error})") from None
            members.append((shard, picture))
    if not members:
        raise UserError(f"{folder}: no sample with a picture and a .{wanted} in its tars ({incomplete} incomplete)")
    return members, payloads, {"incomplete_sample": incomplete} if incomplete else {}


def _class(text: str, shard: Path, picture: Member, classes: int) -> int:
    if not text.strip().isdecimal():
        raise UserError(f"{shard}: the .cls beside {picture.name} is {text[:20]!r}, not a class number")
    if int(text) >= classes:
        raise UserError(f"{shard}: {picture.name} is of class {int(text)}, but there are {classes} class names")
    return int(text)


def _number(path: Path) -> int:
    text = read_text(path, "the number of shards should stand there").strip()
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"{path}: {text[:20]!r} is not a number of shards")
    return int(text)
