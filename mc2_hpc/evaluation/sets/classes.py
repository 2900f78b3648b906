"""Classification sets: ImageNet, Babel-ImageNet, folders of classes, labelled Parquet, CLIP_benchmark's WebDatasets."""

import importlib.util
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq

from mc2_hpc.data.tar import LocalFile, Member
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.pictures import EXTENSIONS, PictureColumn, PictureFiles, PictureMembers, tar_samples
from mc2_hpc.evaluation.sets.files import pictures_below, read_lines, required
from mc2_hpc.evaluation.tasks import Captions, Classification, ClassTexts, Retrieval
from mc2_hpc.storage import read_json

DEFAULT_TEMPLATES = ("a photo of a {}.",)


def imagenet(path: Path) -> Classification:
    """ILSVRC 2012's validation pictures as ``<path>/<WordNet id>/*.JPEG``, 1,000 folders whose order is the classes'.

    Class names and the 80 templates are OpenAI's, as the package open_clip_torch carries them.
    """
    pictures, labels = _imagenet_pictures(path)
    names, templates = openai_imagenet()
    texts = ClassTexts(classes=range(len(names)), names=names, templates=templates)
    return Classification(pictures=pictures, labels=labels, languages={"en": texts})


def babel_imagenet(path: Path, labels: str, prompts: str) -> Classification:
    """ImageNet's pictures with Babel-ImageNet's classes in up to 298 languages.

    Args:
        path: as for :func:`imagenet`.
        labels: ``babel_imagenet-298.json``: ``{LANGUAGE: [[class indices], [names]]}``.
        prompts: ``{LANGUAGE: [templates with {}]}``; a language without any takes ``{}`` alone.
    """
    pictures, right = _imagenet_pictures(path)
    languages = babel_languages(Path(labels), Path(prompts))
    return Classification(pictures=pictures, labels=right, languages=languages)


def babel_languages(labels: Path, prompts: Path) -> dict[str, ClassTexts]:
    """Classes, names and templates of each language of Babel-ImageNet's files, by lower-case code.

    Raises:
        UserError: a file is missing or of another form.
    """
    templates = read_json(required(prompts, "Babel-ImageNet's prompts by language"))
    languages = {}
    for lang, entry in read_json(required(labels, "Babel-ImageNet's labels by language")).items():
        if not (isinstance(entry, list) and len(entry) == 2 and len(entry[0]) == len(entry[1])):
            raise UserError(f"{labels}: {lang} is not [[class indices], [names]]")
        # The templates have a blank at each side of the braces, which a name does not need.
        forms = [" ".join(form.split()) for form in templates.get(lang, ["{}"])]
        languages[lang.lower()] = ClassTexts(classes=entry[0], names=entry[1], templates=forms)
    return dict(sorted(languages.items()))


def _imagenet_pictures(path: Path) -> tuple[PictureFiles, list[tuple[int, ...]]]:
    folders = sorted(p.name for p in required(path, "ImageNet's validation folders").iterdir() if p.is_dir())
    if len(folders) != 1000:
        raise UserError(f"{path}: {len(folders)} folders; ImageNet has one for each of its 1,000 WordNet ids")
    number = {folder: index for index, folder in enumerate(folders)}
    files = pictures_below(path)
    return PictureFiles(path, files), [(number[Path(file).parts[0]],) for file in files]


def class_folders(path: Path, names: str = "", templates: str = "", metric: str = "accuracy") -> Classification:
    """``<path>/<class>/<picture>``.

    Args:
        names: file with one class name a line, in the folders' sorted order; by default the folders' own names, with
            ``_`` for a space.
        templates: file with one template a line, each with one ``{}``.
    """
    folders = sorted(p.name for p in required(path, "one folder a class").iterdir() if p.is_dir())
    if not folders:
        raise UserError(f"{path}: no folders there; expected one a class")
    empty = [folder for folder in folders if not pictures_below(path / folder)]
    if empty:
        raise UserError(f"{path / empty[0]}: a class without a picture; remove the folder or fill it")
    found = read_lines(Path(names), "one class name a line") if names else [f.replace("_", " ") for f in folders]
    if len(found) != len(folders):
        raise UserError(f"{names}: {len(found)} names for the {len(folders)} folders of {path}")
    number = {folder: index for index, folder in enumerate(folders)}
    files = pictures_below(path)
    texts = ClassTexts(classes=range(len(found)), names=found, templates=_templates(templates))
    labels: list[tuple[int, ...]] = [(number[Path(file).parts[0]],) for file in files]
    return Classification(pictures=PictureFiles(path, files), labels=labels, languages={"en": texts}, metric=metric)


def labelled_parquet(
    path: Path,
    names: Mapping[str, Sequence[str]],
    templates: Mapping[str, Sequence[str]],
    classes: Sequence[str],
    picture: str = "jpg",
    label: str = "label",
    key: str = "key",
) -> Classification:
    """A Parquet file of pictures with a label each, named in any number of languages.

    Args:
        names: by language, one name a class, in the order of ``classes``.
        templates: by language, each with one ``{}``.
        classes: values of the label column.
        picture, label, key: columns.
    """
    try:
        table = pq.read_table(required(path, "a Parquet file of pictures"), columns=[key, label, picture])
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None
    number = {name: index for index, name in enumerate(classes)}
    found = table[label].to_pylist()
    unknown = sorted({str(value) for value in found if value not in number})
    if unknown:
        raise UserError(f"{path}: label {unknown[0]!r} is not among the suite's classes")
    languages = {
        lang: ClassTexts(classes=range(len(classes)), names=own, templates=templates.get(lang, ["{}"]))
        for lang, own in names.items()
    }
    pictures = PictureColumn(table[picture], table[key].to_pylist())
    return Classification(pictures=pictures, labels=[(number[value],) for value in found], languages=languages)


def clip_benchmark(path: Path, split: str = "test", metric: str = "accuracy") -> Classification | Retrieval:
    """A WebDataset in CLIP_benchmark's layout.

    ``<path>/<split>/nshards.txt`` and ``0.tar`` ... Where ``dataset_type.txt`` says ``retrieval``, samples have a
    ``<key>.txt`` with one caption a line; else a ``<key>.cls``, and there are ``classnames.txt`` and
    ``zeroshot_classification_templates.txt``, whose templates have ``{c}``.
    """
    count = _number(path / split / "nshards.txt")
    members: list[tuple[Path, Member]] = []
    labels: list[tuple[int, ...]] = []
    captions: list[str] = []
    owners: list[int] = []
    kind_file = path / "dataset_type.txt"
    retrieval = kind_file.is_file() and kind_file.read_text(encoding="utf-8").strip().lower() == "retrieval"
    wanted, skipped = "txt" if retrieval else "cls", 0
    for shard in (path / split / f"{number}.tar" for number in range(count)):
        source = LocalFile(required(shard, f"{path / split / 'nshards.txt'} says {count} shards"))
        for files in tar_samples(shard).values():
            picture = _picture(files)
            if picture is None or wanted not in files:
                skipped += 1
                continue
            payload = source.read(files[wanted].offset, files[wanted].size).decode("utf-8", "replace")
            if retrieval:
                own = [line for line in payload.splitlines() if line.strip()]
                captions += own
                owners += [len(members)] * len(own)
            else:
                labels.append((_class(payload, shard, picture),))
            members.append((shard, picture))
    left_out = {"incomplete_sample": skipped} if skipped else {}
    pictures = PictureMembers(members)
    if retrieval:
        return Retrieval(
            pictures=pictures, languages={"en": Captions(texts=captions, pictures=owners)}, skipped=left_out
        )
    names = read_lines(path / "classnames.txt", "one class name a line")
    forms = read_lines(path / "zeroshot_classification_templates.txt", "one template a line")
    texts = ClassTexts(classes=range(len(names)), names=names, templates=[form.replace("{c}", "{}") for form in forms])
    return Classification(pictures=pictures, labels=labels, languages={"en": texts}, metric=metric, skipped=left_out)


def _picture(files: Mapping[str, Member]) -> Member | None:
    return next((files[extension[1:]] for extension in EXTENSIONS if extension[1:] in files), None)


def _class(payload: str, shard: Path, member: Member) -> int:
    try:
        return int(payload)
    except ValueError:
        raise UserError(f"{shard}: the .cls beside {member.name} is {payload[:20]!r}, not a class number") from None


def _number(path: Path) -> int:
    text = required(path, "the number of shards should stand there").read_text(encoding="utf-8").strip()
    if not text.isdecimal() or int(text) == 0:
        raise UserError(f"{path}: {text[:20]!r} is not a number of shards")
    return int(text)


def _templates(path: str) -> Sequence[str]:
    return read_lines(Path(path), "one template a line") if path else DEFAULT_TEMPLATES


@cache
def openai_imagenet() -> tuple[list[str], list[str]]:
    """ImageNet's 1,000 class names and the 80 templates, OpenAI's choice, from the package open_clip_torch.

    Raises:
        UserError: the package is not installed.
    """
    module = _open_clip_metadata()
    return list(module.IMAGENET_CLASSNAMES), [form("{}") for form in module.OPENAI_IMAGENET_TEMPLATES]


def _open_clip_metadata() -> ModuleType:
    # The one file of data, without the package around it, which needs torchvision.
    package = importlib.util.find_spec("open_clip")
    if package is None or not package.submodule_search_locations:
        raise UserError("ImageNet's class names and templates come with open_clip: pip install open_clip_torch")
    file = Path(package.submodule_search_locations[0]) / "zero_shot_metadata.py"
    spec = importlib.util.spec_from_file_location("open_clip_zero_shot_metadata", file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UserError(f"{file}: open_clip has no such file; install open_clip_torch 3.x")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
