"""Output of a suite's results: ``results.json``, a Markdown table with the paper's numbers, ``report.html``."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mc2_hpc.evaluation.dual_encoders.protocol import ModelFacts
from mc2_hpc.evaluation.encoder import Encoder, ImageFeatures
from mc2_hpc.evaluation.images import Images
from mc2_hpc.evaluation.nearest import nearest
from mc2_hpc.evaluation.paper import columns_of, why_no_mean
from mc2_hpc.evaluation.scoring import ALL, Scores
from mc2_hpc.evaluation.suite import SetResult
from mc2_hpc.evaluation.tasks import Retrieval
from mc2_hpc.images import thumbnail
from mc2_hpc.pages import data_uri, write_page

_EXAMPLES_A_SET, _HITS, _THUMBNAIL = 6, 5, 128
_LEADING = ("top1", "mean_per_class_top1", "text_to_image_R@1", "LOCAL", "5_shot")
"""Languages are ordered by the first of these metrics that a set has."""


def markdown(
    name: str,
    sets: Mapping[str, Mapping[str, Any]],
    paper: Mapping[str, Mapping[str, float]],
    facts: ModelFacts | None = None,
) -> str:
    """A table of the paper's columns with a row for ``name`` and the paper's rows; then every other number.

    Args:
        sets: from ``suite.to_json``.
        paper: rows from ``paper.reported``.
        facts: of the model.
    """
    found = columns_of(sets)
    lines = [f"{name}: {describe(facts)}", ""] if facts is not None else []
    if found:
        lines += _table(
            ["model", *found], [[name, *_cells(found, found)]] + [[r, *_cells(v, found)] for r, v in paper.items()]
        )
        lines += ["", "In per cent. Rows below the first are the paper's (arXiv 2507.22062); a dash: not reported.", ""]
    for why in why_no_mean(sets):
        lines += [why, ""]
    rows = []
    for where, entry in sets.items():
        if "error" in entry:
            rows.append([where, "not scored", entry["error"], "", "", "", ""])
            continue
        skipped = ", ".join(f"{reason} {count}" for reason, count in entry["skipped"].items())
        for metric, value in entry["mean"].items():
            rows.append([where, metric, f"{100 * value:.1f}", *_context(entry, metric), skipped])
    lines += [*_table(["set", "metric", "per cent", "chance", "lowest, highest", "n", "left out"], rows), ""]
    lines += [*_completeness(sets), *_embedding_tables(sets)]
    return "\n".join(lines)


def describe(facts: ModelFacts) -> str:
    """A model's description in one line."""
    step = "" if facts.step is None else f"step {facts.step:,}, "
    pixels = f"{facts.image_size} px ({facts.resize}), {facts.context_length} tokens"
    return f"{step}{facts.parameters / 1e6:,.1f} M parameters, {pixels}, format {facts.format}"


def _context(entry: Mapping[str, Any], metric: str) -> list[str]:
    """Chance, spread and n of one number, as cells."""
    chance, spread = entry.get("chance", {}).get(metric), entry.get("spread", {}).get(metric)
    ends = (("lowest", "of"), ("highest", "and_of")) if spread else ()
    return [
        "" if chance is None else f"{100 * chance:.1f}",
        ", ".join(f"{spread[of]} {100 * spread[end]:.1f}" for end, of in ends),
        f"{number_scored(entry['n']):,}" if entry.get("n") else "",
    ]


def number_scored(counts: Mapping[str, int]) -> int:
    """How many images, texts or questions a set's number covers: all of them, or the sum over its groups."""
    return counts[ALL] if ALL in counts else sum(counts.values())


def _completeness(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line that says whether any sample of the scored sets was left out; the sets' tables say which and why."""
    scored = [entry for entry in sets.values() if "error" not in entry]
    total = sum(number_scored(entry["n"]) for entry in scored if entry.get("n"))
    left_out = sum(sum(entry["skipped"].values()) for entry in scored)
    if not total:
        return []
    line = f"{total:,} of {total + left_out:,} samples scored, {left_out:,} left out" if left_out else ""
    return [line or f"all {total:,} samples scored", ""]


def _embedding_tables(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """For sets of pairs: alignment, uniformity, modality gap and gradient cosines, as means over languages."""
    rows = [
        [where, metric, f"{value:.3f}"]
        for where, entry in sets.items()
        for metric, value in entry.get("embedding_mean", {}).items()
    ]
    return [*_table(["set", "embeddings, mean over languages", "value"], rows), ""] if rows else []


def _cells(values: Mapping[str, float], columns: Mapping[str, float]) -> list[str]:
    return [f"{values[column]:.1f}" if column in values else "-" for column in columns]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in (head, *rows)]
    return [f"| {' | '.join(cells[0])} |", f"|{'---|' * len(head)}", *(f"| {' | '.join(row)} |" for row in cells[1:])]


def write_report(path: Path, name: str, results: Sequence[SetResult], encoder: Encoder) -> None:
    """One self-contained page: each set's numbers, languages from worst to best, and images found for captions.

    Collective, because it encodes the captions shown. Only the first rank writes.
    """
    sections = [_section(result, encoder) for result in results]
    if encoder.writes:
        values = {"name": name, "model": describe(encoder.dual.facts), "sections": sections}
        write_page(path, "mc2_hpc.evaluation", "report.html", values)


def _section(result: SetResult, encoder: Encoder) -> dict[str, Any]:
    """What the page shows for one set."""
    scores = result.scores
    if scores is None or result.task is None or result.images is None:
        return {"name": result.name, "error": result.error}
    shown = []
    if isinstance(result.task, Retrieval):
        found = examples(result.task, result.images, scores.groups, encoder)
        shown = [(example, _hits(example, result.task.images)) for example in found]
    metric = leading_metric(next(iter(scores.groups.values()))) if scores.groups else ""
    worst_first = sorted(scores.groups.items(), key=lambda item: item[1].get(metric, 0.0))
    return {
        "name": result.name,
        "error": "",
        "tiles": [(f"{100 * value:.1f}", f"{name}, %{_chance(scores, name)}") for name, value in scores.mean.items()],
        "number_scored": number_scored(scores.counts),
        "left_out": scores.skipped,
        "metric": metric,
        "groups": [(group, numbers.get(metric, 0.0), scores.counts[group]) for group, numbers in worst_first],
        "examples": shown,
    }


def leading_metric(numbers: Mapping[str, float]) -> str:
    """The metric by which groups are ordered."""
    return next((metric for metric in _LEADING if metric in numbers), next(iter(numbers)))


@dataclass(frozen=True)
class Example:
    """A caption in a language, and the images closest to it, best first."""

    lang: str
    query: str
    hits: list[int]
    owner: int
    """The image that it describes; if it is not among the hits, the caption was missed."""


def examples(
    task: Retrieval, features: ImageFeatures, groups: Mapping[str, Mapping[str, float]], encoder: Encoder
) -> list[Example]:
    """One caption each from several languages, the worst first. Collective."""
    metric = leading_metric(next(iter(groups.values())))
    worst = sorted((lang for lang in groups if lang in task.languages), key=lambda lang: groups[lang][metric])
    queries = []
    for lang in worst[:_EXAMPLES_A_SET] or list(task.languages):  # captions may have no known language
        captions = task.languages[lang]
        shown = [i for i, owner in enumerate(captions.images) if features.usable[owner]]
        place = shown[len(shown) // 2]
        queries.append((lang, captions.texts[place], captions.images[place]))
    usable = torch.nonzero(features.usable).flatten()
    texts = encoder.texts([text for _, text, _ in queries])
    best = usable[nearest(texts, features.features[usable], min(_HITS, len(usable)))[1]]
    return [Example(lang, text, hits, owner) for (lang, text, owner), hits in zip(queries, best.tolist(), strict=True)]


def _hits(example: Example, images: Images) -> list[tuple[str, str]]:
    """(kind, thumbnail) of the images found, followed by the caption's own image if it was missed."""
    kinds = [("right" if index == example.owner else "", index) for index in example.hits]
    if example.owner not in example.hits:
        kinds.append(("missed", example.owner))
    return [(kind, _thumbnail(images, index)) for kind, index in kinds]


def _chance(scores: Scores, metric: str) -> str:
    return f", chance {100 * scores.chance[metric]:.1f}" if metric in scores.chance else ""


def _thumbnail(images: Images, index: int) -> str:
    """The image as a small JPEG in a data: URL. It was decoded before, so it can be decoded now."""
    return data_uri(thumbnail(images.read(index), _THUMBNAIL), "image/jpeg")
