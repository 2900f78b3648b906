"""The model card of an exported folder: ``README.md`` with the header that model hubs read.

It tells what the files say. What only people know (licence, intended use) is marked as missing.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path

import yaml

from mc2_hpc.conversion.provenance import Curation, Provenance, Shards
from mc2_hpc.models.formats import Format
from mc2_hpc.models.presets import num_parameters
from mc2_hpc.models.weights import ModelCard
from mc2_hpc.storage import write_text

CARD_NAME = "README.md"
_MISSING = "TO BE FILLED IN"

_LIBRARIES = {Format.OPEN_CLIP: "open_clip", Format.TRANSFORMERS: "transformers", Format.ONNX: "onnx"}
_USE = {
    Format.OPEN_CLIP: """\
```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("local-dir:DIR")
tokenizer = open_clip.get_tokenizer("local-dir:DIR")
```""",
    Format.TRANSFORMERS: """\
```python
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="DIR")
classify("photo.jpg", candidate_labels=["a cat", "eine Katze", "猫"], hypothesis_template="{}")
```

```python
from sentence_transformers import SentenceTransformer

model = SentenceTransformer("DIR")  # features of images and texts
```""",
    Format.ONNX: """\
`image.onnx` and `text.onnx` give features of unit length; `onnx_model.json` says how images and texts become their
inputs, and by what to multiply cosines to get logits.""",
}


def write_model_card(out: Path, to: Format, card: ModelCard, found: Provenance, *, weights: str) -> None:
    """Write ``README.md`` into an exported folder.

    Args:
        to: the folder's format.
        weights: type of the stored weights, such as ``bf16``.
    """
    write_text(out / CARD_NAME, model_card(to, card, found, weights=weights))


def model_card(to: Format, card: ModelCard, found: Provenance, *, weights: str) -> str:
    """The text of the card."""
    header = {
        "license": "other",
        "license_name": _MISSING,
        "library_name": _LIBRARIES[to],
        "pipeline_tag": "zero-shot-image-classification",
        "tags": ["clip", "multilingual", "vision"],
    }
    parts = [
        "---",
        yaml.safe_dump(header, sort_keys=False).strip(),
        "---",
        "",
        "# Worldwide CLIP model",
        "",
        "An image tower and a text tower with a common embedding space, exported by mc2_hpc.",
        "",
        *_section("Use", [_USE[to]]),
        *_section("Model", _table(("", ""), _architecture(card, weights))),
        *_section("Training", _training(found)),
        *_section("Evaluation", _evaluation(found, weights)),
        *_section(
            "Licence",
            [f"{_MISSING}: whoever trained the weights chooses their licence. Change `license` in the header as well."],
        ),
    ]
    return "\n".join(parts).rstrip() + "\n"


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"## {title}", "", *lines, ""]


def _architecture(card: ModelCard, weights: str) -> list[tuple[str, str]]:
    arch, vision, text = card.arch, card.arch.vision, card.arch.text
    return [
        ("parameters", f"{num_parameters(arch):,}"),
        ("weights", weights),
        ("embedding", f"{arch.embed_dim}"),
        (
            "image tower",
            f"ViT, {vision.layers} layers of width {vision.width}, patches of {vision.patch_size} px, images of "
            f"{vision.image_size} px ({arch.eval_resize})",
        ),
        (
            "text tower",
            f"causal, {text.layers} layers of width {text.width}, {text.context_length} tokens of {text.vocab_size:,}",
        ),
        ("activation", "QuickGELU" if arch.quick_gelu else "GELU"),
        ("tokenizer", f"sentencepiece, {card.tokenizer_style}"),
    ]


def _training(found: Provenance) -> list[str]:
    rows = [("merged", line) for line in found.merged]
    if found.step is not None:
        rows.append(("steps", f"{found.step:,}"))
    if found.samples_seen is not None:
        rows.append(("pairs seen", f"{found.samples_seen:,}"))
    if found.initial is not None:
        rows.append(("started from", found.initial))
    if found.teacher is not None:
        settings = ", ".join(f"{name} {value}" for name, value in sorted(found.teacher.settings.items()))
        rows.append(("teacher", f"{found.teacher.name} ({settings})" if settings else found.teacher.name))
    if found.ema:
        rows.append(("weights", "the moving average over the steps"))
    if found.trained_size is not None:
        rows.append(("images in training", f"{found.trained_size} px; the table of positions was interpolated"))
    rows += _data(found, found.shards, "")
    for source in found.sources:
        rows += _data(source, source.shards, f" of {source.name}")
        if source.weight is not None:
            rows.append((f"weight of {source.name}", f"{source.weight:g}"))
        if source.captions:
            shares = ", ".join(f"{name} {share:g}" for name, share in sorted(source.captions.items()))
            rows.append((f"captions of {source.name}", shares))
    rows += [(name, value) for name, value in sorted(found.versions.items())]
    lines = _table(("", ""), rows) if rows else ["Not recorded in the folder that this model was exported from."]
    for title, of in (("Metadata", found), *((f"Metadata of {source.name}", source) for source in found.sources)):
        if of.metadata:
            lines += ["", f"{title}:", "", *_table(("language", "SHA-256"), sorted(of.metadata.items()))]
    if found.config:
        settings = yaml.safe_dump(found.config, allow_unicode=True).strip().replace("```", "'''")
        lines += ["", "Settings:", "", "```yaml", settings, "```"]
    return lines


def _data(of: Curation, shards: Shards | None, suffix: str) -> list[tuple[str, str]]:
    rows = []
    if shards is not None:
        rows.append((f"data{suffix}", f"{shards.count:,} shards, SHA-256 of their names {shards.sha256}"))
    if of.balance is not None:
        threshold = f", English's threshold {of.t_en:,}" if of.t_en is not None else ""
        rows.append((f"balance{suffix}", f"SHA-256 of balance.json {of.balance}{threshold}"))
    return rows


def _evaluation(found: Provenance, weights: str) -> list[str]:
    if not found.scores:
        return ["None recorded. `mc2 convert --results` adds the numbers of `mc2 eval`."]
    rows = [(score.set, score.metric, f"{100 * score.value:.1f}") for score in found.scores]
    lines = _table(("set", "metric", "per cent"), rows)
    return lines if weights == "fp32" else [*lines, "", "Measured with the fp32 weights, unless given by `--results`."]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |"

    return [line(head), "|" + "---|" * len(head), *(line(row) for row in rows)]
