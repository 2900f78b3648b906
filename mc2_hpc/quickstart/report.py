"""``report.html``: what the quickstart did, in one self-contained page (no scripts, no network).

The page is drawn from ``report.json``'s values alone; pictures are files beside it, named there, and are inlined.
"""

import base64
import math
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from mc2_hpc.page_style import STYLE
from mc2_hpc.quickstart.captions import AUTONYMS
from mc2_hpc.quickstart.charts import head_tail, line_chart, moving_average
from mc2_hpc.storage import atomic_path

Report = Mapping[str, Any]


def write_report(report: Report, folder: str | Path) -> Path:
    """Write ``folder/report.html`` and return its path.

    Args:
        report: the values of ``report.json``, as :mod:`mc2_hpc.quickstart.run` lists them; picture names are relative
            to ``folder``.
    """
    folder = Path(folder)
    sections = (
        _header(report),
        "<main>",
        _samples(report, folder),
        _balance(report),
        _training(report),
        _accuracy(report),
        _search(report, folder),
        _accounts(report),
        _go_on(report),
        "</main>",
        f"<footer><div>{_machine(report)}</div></footer>",
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>A worldwide CLIP in {escape(duration(report['seconds']))}</title><style>{STYLE}</style></head><body>"
        + "\n".join(sections)
        + "</body></html>\n"
    )
    path = folder / "report.html"
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def duration(seconds: float) -> str:
    """``41 s`` or ``3 min 42 s``."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _header(report: Report) -> str:
    tiles = (
        (f"{report['zero_shot_mean']:.1%}", f"mean zero-shot accuracy; chance is {report['chance']:.0%}"),
        (str(len(report["languages"])), "languages, one model"),
        (duration(report["seconds"]), f"in all, {report['processes']} training processes"),
        (f"{report['samples_per_second']:,.0f}/s", "image-text pairs trained on"),
        (_scientific(report["open_clip_max_abs_diff"]), "largest difference of a logit from open_clip's"),
    )
    drawn = "".join(f'<div class="tile"><b>{value}</b><span>{escape(label)}</span></div>' for value, label in tiles)
    return f"""<header><div>
<div class="kicker">mc2 quickstart</div>
<h1>A worldwide CLIP, from captions to an open_clip checkpoint, in {escape(duration(report["seconds"]))}</h1>
<p class="lead">A small dual encoder of {report["parameters"]:,} parameters has learnt to read handwritten numbers and
to name them in {len(report["languages"])} languages: from {report["images"]:,} pictures, {report["captions"]:,}
captions and nothing else.</p>
<div class="tiles">{drawn}</div></div></header>"""


def _samples(report: Report, folder: Path) -> str:
    cards = []
    for sample in report["samples"]:
        captions = "".join(
            f'<li dir="auto" lang="{escape(caption["lang"], quote=True)}"'
            + (' class="noise"' if caption["noise"] else "")
            + f">{escape(caption['text'])}</li>"
            for caption in sample["captions"]
        )
        cards.append(f'<div class="card sample">{_image(folder, sample["image"], "")}<ul>{captions}</ul></div>')
    return f"""<section><div class="kicker">The pool</div><h2>What it learnt from</h2>
<p class="soft">Photographs of handwritten digits, composed into the numbers 0&ndash;99, and captioned as the web would:
mostly in English, mostly with small numbers, several candidates a picture. Captions that name no number are
<span style="text-decoration:line-through">struck out</span>: no metadata entry occurs in them, so curation drops
them.</p><div class="samples">{"".join(cards)}</div></section>"""


def _balance(report: Report) -> str:
    charts = []
    for lang in report["languages"]:
        curve = report["curves"][lang]
        drawing = head_tail(curve["before"], curve["after"], threshold=report["balance"]["t"][lang])
        total = f"{sum(curve['before']):,.0f} matches"
        charts.append(
            f'<div class="card"><h3><b dir="auto">{_autonym(lang)}</b><span>{total}</span></h3>{drawing}</div>'
        )
    shares = "".join(
        f'<span>{label}</span><div class="bar"><i{css} style="width:{share:.1%}"></i></div>'
        f'<b class="num">{share:.1%}</b>'
        for label, css, share in (
            ("before", ' class="old"', report["english_share_before"]),
            ("after", "", report["english_share_after"]),
        )
    )
    return f"""<section><div class="kicker">Curation</div><h2>Head and tail, before and after</h2>
<p class="soft">How often each number's name occurs in the matched captions of a language, most frequent first.
Balancing thins what occurs more often than the language's threshold. English's threshold is set by hand
(t = {report["balance"]["t_en"]:,}); every other language gets the one that leaves the same share of its matches,
{report["balance"]["p"]:.0%}, in the tail.</p>
<h3>English among the captions</h3><div class="share">{shares}</div>
<div class="legend"><span><i class="l-before"></i>before</span><span><i class="l-after"></i>expected after</span>
<span><i class="l-threshold"></i>threshold</span></div>
<div class="multiples">{"".join(charts)}</div></section>"""


def _training(report: Report) -> str:
    rows = report["training"]
    losses = [(row["step"], row["loss"]) for row in rows]
    rates = [(row["step"], row["samples_per_second"]) for row in rows]
    window = max(1, len(rows) // 20)
    loss = line_chart(losses, smooth=moving_average(losses, window), x_label="step", y_label="loss")
    rate = line_chart(rates, smooth=moving_average(rates, window), x_label="step", y_label="pairs a second")
    guess = math.log(report["global_batch"])
    return f"""<section><div class="kicker">Training</div><h2>{report["steps"]:,} steps of
{report["global_batch"]} pairs</h2>
<p class="soft">The contrastive loss over the whole batch of both processes starts near ln&nbsp;{report["global_batch"]}
= {guess:.2f}, which is guessing. Several pictures of one number in a batch keep it above zero.</p><div class="two">
<div class="card"><h3>Loss</h3>{loss}</div><div class="card"><h3>Pairs a second</h3>{rate}</div></div></section>"""


def _accuracy(report: Report) -> str:
    accuracy = report["zero_shot"]
    rows = "".join(
        f'<div class="row"><span class="name" dir="auto">{_autonym(lang)}</span><div class="bar">'
        f'<i style="width:{accuracy[lang]:.1%}"></i></div><b class="num">{accuracy[lang]:.1%}</b></div>'
        for lang in sorted(accuracy, key=lambda lang: (accuracy[lang], lang))
    )
    retrieval = report["retrieval"]
    recalls = "".join(
        f"<tr><td>{label}</td>"
        + "".join(f'<td class="num">{retrieval[direction][k]:.1%}</td>' for k in ("R@1", "R@5", "R@10"))
        + "</tr>"
        for label, direction in (("text to image", "text_to_image"), ("image to text", "image_to_text"))
    )
    return f"""<section><div class="kicker">Evaluation</div><h2>Reading numbers in every language</h2>
<p class="soft">{report["heldout_images"]:,} pictures of digits that other people wrote, each to be given one of 100
number names, lowest language first. Guessing is right {report["chance"]:.0%} of the time.</p>
<div class="bars">{rows}</div>
<h3 style="margin-top:32px">Retrieval among 100 pictures, mean over languages</h3>
<div class="card narrow"><table><thead><tr><th></th><th class="num">R@1</th><th class="num">R@5</th>
<th class="num">R@10</th></tr></thead><tbody>{recalls}</tbody></table></div></section>"""


def _search(report: Report, folder: Path) -> str:
    cards = []
    for example in report["retrieval_examples"]:
        hits = "".join(
            f'<div class="hit{" right" if hit["number"] == example["number"] else ""}">'
            f"{_image(folder, hit['image'], str(hit['number']))}"
            f"{'&#10003; ' if hit['number'] == example['number'] else ''}{hit['number']}</div>"
            for hit in example["hits"]
        )
        lang = example["lang"]
        cards.append(
            f'<div class="card"><div class="lang" dir="auto">{escape(AUTONYMS.get(lang, lang))}</div>'
            f'<p class="query" dir="auto" lang="{escape(lang, quote=True)}">{escape(example["query"])}</p>'
            f'<div class="hits">{hits}</div></div>'
        )
    return f"""<section><div class="kicker">Search</div><h2>Ask in any language</h2>
<p class="soft">The five best of all held-out pictures for a caption. Right ones are ticked.</p>
<div class="search">{"".join(cards)}</div></section>"""


def _accounts(report: Report) -> str:
    stages = "".join(
        f'<tr><td>{escape(stage["name"])}</td><td class="num">{stage["seconds"]:.1f} s</td></tr>'
        for stage in report["stages"]
    )
    skipped = "".join(
        f'<tr><td>{escape(reason.replace("_", " "))}</td><td class="num">{count:,}</td></tr>'
        for reason, count in report["skipped"].items()
        if count
    )
    skipped = skipped or '<tr><td colspan="2">nothing was skipped</td></tr>'
    return f"""<section><div class="kicker">Accounts</div><h2>Where time and samples went</h2><div class="two">
<div class="card"><h3>Stages</h3><table>{stages}</table></div>
<div class="card"><h3>Left out, by reason</h3><table>{skipped}</table></div></div></section>"""


def _go_on(report: Report) -> str:
    outputs = report["outputs"]
    export, run, config = (escape(outputs[name]) for name in ("open_clip", "train", "train.yaml"))
    hf = escape(str(Path(outputs["train"]).with_name("hf")))
    return f"""<section><div class="kicker">Next</div><h2>How to go on</h2>
<p>The model is an open_clip folder. Load it as any other:</p>
<pre>import open_clip
model, _, preprocess = open_clip.create_model_and_transforms("local-dir:{export}")
tokenizer = open_clip.get_tokenizer("local-dir:{export}")</pre>
<p>Train it longer, on the same data (it continues from its checkpoint), or convert it for transformers:</p>
<pre>mc2 train {config} steps={2 * report["steps"]}
mc2 convert {run} --to hf --out {hf}</pre></section>"""


def _machine(report: Report) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    return f"{escape(report['machine'])} &middot; {escape(versions)}"


def _autonym(lang: str) -> str:
    return f'<bdi lang="{escape(lang, quote=True)}">{escape(AUTONYMS.get(lang, lang))}</bdi>'


def _image(folder: Path, name: str, alt: str) -> str:
    data = base64.b64encode((folder / name).read_bytes()).decode("ascii")
    return f'<img src="data:image/jpeg;base64,{data}" alt="{escape(alt, quote=True)}">'


def _scientific(value: float) -> str:
    """``2.4 x 10^-6`` as HTML; 0 as it is."""
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    return f"{value / 10.0**exponent:.1f}&middot;10<sup>{exponent}</sup>".replace("-", "&minus;")
