"""What a suite found, written down: ``results.json``, a Markdown table beside the paper's numbers, ``report.html``."""

import base64
import html
import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from mc2_hpc.evaluation.encoder import Encoder, PictureFeatures
from mc2_hpc.evaluation.nearest import nearest
from mc2_hpc.evaluation.paper import columns_of, why_no_slip_26
from mc2_hpc.evaluation.pictures import Pictures
from mc2_hpc.evaluation.suite import SetResult
from mc2_hpc.evaluation.tasks import Retrieval
from mc2_hpc.page_style import STYLE
from mc2_hpc.storage import atomic_path

_EXAMPLES_A_SET, _HITS, _THUMBNAIL = 6, 5, 128
_LEADING = ("top1", "mean_per_class_top1", "text_to_image_R@1", "LOCAL", "5_shot")
"""The metric that languages are ordered by, the first of these that a set has."""


def markdown(name: str, sets: Mapping[str, Mapping[str, Any]], paper: Mapping[str, Mapping[str, float]]) -> str:
    """A table of the paper's columns with a row for ``name`` and one for each of the paper's; then every other number.

    Args:
        sets: what ``suite.to_json`` made.
        paper: rows of ``paper.reported``.
    """
    found = columns_of(sets)
    lines = []
    if found:
        lines += _table(
            ["model", *found], [[name, *_cells(found, found)]] + [[r, *_cells(v, found)] for r, v in paper.items()]
        )
        lines += ["", "In per cent. Rows below the first are the paper's (arXiv 2507.22062); a dash: not reported.", ""]
    if why := why_no_slip_26(sets):
        lines += [why, ""]
    rows = []
    for where, entry in sets.items():
        if "error" in entry:
            rows.append([where, "not scored", entry["error"], ""])
            continue
        skipped = ", ".join(f"{reason} {count}" for reason, count in entry["skipped"].items())
        for metric, value in entry["mean"].items():
            rows.append([where, metric, f"{100 * value:.1f}", skipped])
    lines += [*_table(["set", "metric", "per cent", "left out"], rows), ""]
    lines += _embedding_tables(sets)
    return "\n".join(lines)


def _embedding_tables(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Of sets of pairs: alignment, uniformity, modality gap, gradient cosines, as means over languages."""
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
    """One self-contained page: each set's numbers, languages from worst to best, and pictures found for captions.

    Collective: the captions shown are encoded. Only the first rank writes.
    """
    sections = [_section(result, encoder) for result in results]
    if not encoder.writes:
        return
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f"<title>{html.escape(name)}: evaluation</title><style>{STYLE}</style>"
        f'<header><div><p class="kicker">Evaluation</p><h1>{html.escape(name)}</h1></div></header>'
        f"<main>{''.join(sections)}</main></html>\n"
    )
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _section(result: SetResult, encoder: Encoder) -> str:
    title = f"<section><h2>{html.escape(result.name)}</h2>"
    if result.scores is None or result.task is None or result.pictures is None:
        return f'{title}<p class="lead">Not scored: {html.escape(result.error)}</p></section>'
    scores = result.scores
    tiles = "".join(
        f'<div class="tile"><b>{100 * value:.1f}</b><span>{html.escape(metric)}, %</span></div>'
        for metric, value in scores.mean.items()
    )
    left_out = ", ".join(f"{reason} {count}" for reason, count in scores.skipped.items())
    body = f'<div class="tiles">{tiles}</div>'
    if left_out:
        body += f'<p class="soft">Left out: {html.escape(left_out)}</p>'
    if len(scores.groups) > 1:
        body += f'<h3>From worst to best</h3><div class="bars">{"".join(_bars(scores.groups, scores.counts))}</div>'
    if isinstance(result.task, Retrieval):
        body += _examples(result.task, result.pictures, scores.groups, encoder)
    return f"{title}{body}</section>"


def _bars(groups: Mapping[str, Mapping[str, float]], counts: Mapping[str, int]) -> Iterator[str]:
    metric = leading_metric(next(iter(groups.values())))
    for group, numbers in sorted(groups.items(), key=lambda item: item[1].get(metric, 0.0)):
        value = numbers.get(metric, 0.0)
        yield (
            f'<div class="row" title="{counts[group]} scored"><span class="name">{html.escape(group)}</span>'
            f'<span class="bar"><i style="width:{100 * value:.2f}%"></i></span>'
            f'<span class="num">{100 * value:.1f}</span></div>'
        )


def leading_metric(numbers: Mapping[str, float]) -> str:
    """The metric of these by which groups are ordered."""
    return next((metric for metric in _LEADING if metric in numbers), next(iter(numbers)))


def _examples(
    task: Retrieval, features: PictureFeatures, groups: Mapping[str, Mapping[str, float]], encoder: Encoder
) -> str:
    """The five pictures closest to one caption of some languages, the worst ones first."""
    metric = leading_metric(next(iter(groups.values())))
    worst = sorted(groups, key=lambda lang: groups[lang][metric])[:_EXAMPLES_A_SET]
    queries = []
    for lang in worst:
        captions = task.languages[lang]
        shown = [i for i, owner in enumerate(captions.pictures) if features.usable[owner]]
        place = shown[len(shown) // 2]
        queries.append((lang, captions.texts[place], captions.pictures[place]))
    usable = torch.nonzero(features.usable).flatten()
    texts = encoder.texts([text for _, text, _ in queries])
    best = usable[nearest(texts, features.features[usable], min(_HITS, len(usable)))[1]]
    cards = []
    for (lang, text, owner), found in zip(queries, best.tolist(), strict=True):
        hits = "".join(
            f'<div class="hit{" right" if index == owner else ""}">'
            f'<img alt="" src="{_thumbnail(task.pictures, index)}">{"its own" if index == owner else "&nbsp;"}</div>'
            for index in found
        )
        cards.append(
            f'<div class="card"><p class="lang">{html.escape(lang)}</p>'
            f'<p class="query" dir="auto">{html.escape(text)}</p><div class="hits">{hits}</div></div>'
        )
    return f'<h3>Pictures found for a caption</h3><div class="search">{"".join(cards)}</div>'


def _thumbnail(pictures: Pictures, index: int) -> str:
    """The picture as a small JPEG in a data: address. It could be decoded before, so it can now."""
    image = Image.open(io.BytesIO(pictures.read(index))).convert("RGB")
    image.thumbnail((_THUMBNAIL, _THUMBNAIL))
    data = io.BytesIO()
    image.save(data, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
