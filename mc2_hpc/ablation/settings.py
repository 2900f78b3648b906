"""Ablations: a YAML file names the rows of a table, each a way to curate, tokenize and train.

    ablation = load_ablation("configs/ablations/tokenizers.yaml", ["data.pool=/data/pool"])

The file's own ``curation``, ``tokenizer`` and ``train`` are the defaults for its rows.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean

from mc2_hpc.config import RunConfig, load_config, read_yaml, typed
from mc2_hpc.data.tokenizer import STYLES
from mc2_hpc.errors import UserError
from mc2_hpc.evaluation.suite import load_suite
from mc2_hpc.reading.settings import PathName, Prose
from mc2_hpc.reading.yaml_file import Section

METADATA = ("by_language", "english", "merged")
THRESHOLDS = ("tail_mass", "same")
REDUCTIONS: Mapping[str, Callable[[Sequence[float]], float]] = {"mean": fmean, "min": min}


@dataclass(frozen=True, kw_only=True)
class DataPaths:
    """The data that every row starts from."""

    root: PathName = "."
    """For use in other paths, as ``${data.root}``."""
    pool: PathName
    """Folder of candidate captions and images, as for ``mc2 curate``."""
    metadata: PathName
    """Folder of ``<lang>.json``."""


@dataclass(frozen=True, kw_only=True)
class CurationSettings:
    """How a row's training shards are made from the pool."""

    languages: list[str] = field(default_factory=list)
    """Languages of the captions to train on; empty means all. Thresholds are always those of the whole pool."""
    metadata: str = "by_language"
    """The metadata that captions are matched with: that of their own language, only ``english``, or that of all
    languages ``merged`` into one set."""
    thresholds: str = "tail_mass"
    """``tail_mass``: one per language, with equal tail mass (the recipe); ``same``: ``t_en`` for every language."""
    t_en: int = 20_000

    def __post_init__(self) -> None:
        _choose("metadata", self.metadata, METADATA)
        _choose("thresholds", self.thresholds, THRESHOLDS)
        if self.t_en < 1:
            raise UserError(f"t_en={self.t_en}: must be at least 1")


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """A tokenizer trained on all captions of the pool."""

    style: str = "xlmv"
    vocab_size: int = 32_000

    def __post_init__(self) -> None:
        _choose("style", self.style, tuple(STYLES))


@dataclass(frozen=True, kw_only=True)
class Column:
    """One number of an evaluated run."""

    set: str
    """A set of the suite."""
    metric: str = "top1"
    languages: list[str] = field(default_factory=list)
    """Languages (groups of the set's scores) to include; empty means all."""
    without: list[str] = field(default_factory=list)
    """Languages to leave out."""
    reduce: str = "mean"
    """``mean`` over the languages, or ``min``: the worst one."""

    def __post_init__(self) -> None:
        _choose("reduce", self.reduce, tuple(REDUCTIONS))


@dataclass(frozen=True, kw_only=True)
class RowConfig:
    """A row in the file: only what differs from the file's common settings."""

    name: str
    curation: Section = Section({}, "")
    tokenizer: Section = Section({}, "")
    seen: float = 1.0
    """Factor for the number of pairs seen: multiplies the base config's ``steps``."""
    train: list[str] = field(default_factory=list)
    """``key.sub=value`` overrides for ``mc2 train``."""
    paper: dict[str, float] = field(default_factory=dict)
    """The paper's numbers for this row, by the paper's column names."""


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """An ablation file."""

    data: DataPaths
    base: PathName
    """Training config that every row starts from."""
    suite: PathName
    """Evaluation suite (``mc2 eval --suite``)."""
    columns: dict[str, Column]
    rows: list[RowConfig]
    title: Prose = Prose("")
    """Title of the table and the plot; defaults to the file's name."""
    mirrors: Prose = Prose("")
    """The paper's table that this one mirrors, if any."""
    finding: Prose = Prose("")
    """What that table shows."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each row is trained once per seed, which sets the initial weights and every draw of the data path."""
    curation: Section = Section({}, "")
    tokenizer: Section = Section({}, "")
    train: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Row:
    """A row with all of its settings."""

    name: str
    curation: CurationSettings
    tokenizer: TokenizerSettings
    config: RunConfig
    """Config of the training run, except for data, vocabulary, seeds and output."""
    paper: dict[str, float]


@dataclass(frozen=True, kw_only=True)
class Ablation:
    """The validated contents of an ablation file."""

    name: str
    """The file's name without its suffix."""
    title: str
    mirrors: str
    finding: str
    data: DataPaths
    suite: Path
    columns: dict[str, Column]
    seeds: list[int]
    rows: list[Row]


def load_ablation(path: str | Path, overrides: Sequence[str] = ()) -> Ablation:
    """Read an ablation file and apply ``key.sub=value`` overrides.

    Raises:
        UserError: no such file, not YAML, or an unknown key or wrong value in it, in its base config or its suite.
    """
    path = Path(path)
    found = typed(AblationConfig, read_yaml(path, "ablation file"), overrides, source=str(path))
    for what in ("columns", "rows", "seeds"):
        if not getattr(found, what):
            raise UserError(f"{path}: has no {what}")
    _distinct(f"{path}: seeds", found.seeds)
    _distinct(f"{path}: rows", [row.name for row in found.rows])
    sets = load_suite(found.suite).sets
    for name, column in found.columns.items():
        if column.set not in sets:
            there = ", ".join(sets)
            raise UserError(f"{path}: columns.{name}: {found.suite} has no set {column.set!r}; it has {there}")
    return Ablation(
        name=path.stem,
        title=found.title or path.stem,
        **{key: getattr(found, key) for key in ("mirrors", "finding", "data", "columns", "seeds")},
        suite=Path(found.suite),
        rows=[_row(str(path), found, row) for row in found.rows],
    )


def _row(source: str, ablation: AblationConfig, row: RowConfig) -> Row:
    where = f"{source}: rows.{row.name}"
    curation, tokenizer = ablation.curation.merged(row.curation), ablation.tokenizer.merged(row.tokenizer)
    if row.seen <= 0:
        raise UserError(f"{where}: seen={row.seen}: must be above 0")
    try:
        config = load_config(ablation.base, [*ablation.train, *row.train])
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    return Row(
        name=row.name,
        curation=typed(CurationSettings, curation, source=source, within=f"rows.{row.name}: curation: "),
        tokenizer=typed(TokenizerSettings, tokenizer, source=source, within=f"rows.{row.name}: tokenizer: "),
        config=dataclasses.replace(config, steps=max(1, round(config.steps * row.seen))),
        paper=row.paper,
    )


def _choose(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key}={value!r}: choose one of {', '.join(choices)}")


def _distinct(where: str, values: Sequence[object]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise UserError(f"{where}: {value!r} occurs twice")
