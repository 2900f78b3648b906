"""One style for every plot, and figures as PNG bytes or as SVG inside a page. The same figure gives the same bytes.

matplotlib is only in the extras, so it is imported inside functions; call :func:`require_plotting` before long work.
Our own text in plots consists of numbers and Latin words. Captions, entries and names in other scripts stay in HTML,
where the browser has fonts for all of them; user-supplied names use the fonts installed on this machine.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from mc2_hpc.errors import UserError
from mc2_hpc.pages.numbers import short_number
from mc2_hpc.pages.palette import LIGHT, SERIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_OTHER_FONTS = (
    *("Noto Sans CJK JP", "Noto Sans CJK SC", "Noto Sans Devanagari", "Noto Sans Bengali", "Noto Sans Thai"),
    *("Hiragino Sans", "Arial Unicode MS", "Yu Gothic", "Unifont"),
)
"""Tried in this order for characters missing from DejaVu Sans."""
_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "text.color": LIGHT["ink"],
    "axes.edgecolor": LIGHT["rule"],
    "axes.facecolor": "none",
    "axes.labelcolor": LIGHT["soft"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "figure.facecolor": LIGHT["card"],
    "figure.titlesize": 11,
    "grid.color": LIGHT["rule"],
    "grid.linewidth": 0.7,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "lines.linewidth": 1.5,
    "lines.markersize": 4,
    "svg.fonttype": "none",  # keep text as text, rendered by the browser
    "svg.hashsalt": "mc2_hpc",
    "text.parse_math": False,  # a name may contain a dollar sign
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


def require_plotting(what: str, extra: str) -> None:
    """Check that plots can be drawn.

    Args:
        what: the start of the message, for example ``the report needs``.
        extra: the extra of this package that includes matplotlib.

    Raises:
        UserError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise UserError(f"{what} matplotlib: pip install 'mc2_hpc[{extra}]'")


@contextmanager
def plot_style() -> Iterator[None]:
    """Figures created and saved inside have the project's style, whatever the user's own settings."""
    import matplotlib
    from cycler import cycler  # a dependency of matplotlib

    with matplotlib.rc_context(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({**_STYLE, "axes.prop_cycle": cycler(color=SERIES), "font.family": _fonts()})
        yield


def _fonts() -> list[str]:
    """matplotlib's own font, and the installed fonts that cover its missing characters."""
    from matplotlib.font_manager import fontManager

    installed = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in _OTHER_FONTS if name in installed)]


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1) -> tuple[Figure, list[Any]]:
    """A figure of ``width x height`` inches without a window, and its axes row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False).ravel().tolist()


def short_ticks(axis: Any) -> None:
    """Label the major ticks of an axis with :func:`short_number`, and remove minor ticks."""
    from matplotlib.ticker import NullLocator

    axis.set_major_formatter(lambda value, _: short_number(value))
    axis.set_minor_locator(NullLocator())


def png(figure: Figure, dpi: int = 180) -> bytes:
    """The figure as PNG on white."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=dpi, metadata={"Software": None})
    return stream.getvalue()


def svg(figure: Figure, name: str, title: str) -> Markup:
    """The figure as a page element, with the page's colours and font and the width of its container.

    Args:
        name: unique on the page; the prefix of the ids in the drawing.
        title: what the plot shows, for readers who cannot see it.
    """
    stream = io.BytesIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(stream, format="svg", transparent=True, metadata=nothing)
    root = ElementTree.fromstring(stream.getvalue())
    _adapt(root, name)
    root.attrib = {"class": "plot", "role": "img", "aria-label": title, "viewBox": root.attrib["viewBox"]}
    heading = ElementTree.Element("title")
    heading.text = title
    root.insert(0, heading)
    return Markup(ElementTree.tostring(root, encoding="unicode"))


def _adapt(root: ElementTree.Element, name: str) -> None:
    """Adapt a drawing to a page with other drawings: unique ids, no style rule or namespaces, page colours and font."""
    for parent in reversed(list(root.iter())):  # children first: a group of empty groups is empty too
        parent.text = (parent.text or "").strip()
        for child in list(parent):
            child.tail = ""
            # matplotlib's style rule would apply to the whole page; the style sheet has it for plots only.
            if _local(child.tag) == "style" or (_local(child.tag) == "g" and not len(child)):
                parent.remove(child)
    values = [value for element in root.iter() for value in element.attrib.values()]
    used = {part for value in values for _, part in _REFERENCE.findall(value)}
    for element in root.iter():
        element.tag = _local(element.tag)
        attributes = {_local(key): value for key, value in element.attrib.items()}
        if attributes.get("id") not in used:
            attributes.pop("id", None)
        for key, value in attributes.items():
            attributes[key] = f"{name}-{value}" if key == "id" else _REFERENCE.sub(rf"\1#{name}-\2", value)
        if "style" in attributes:
            attributes["style"] = _page_style(attributes["style"])
        if "rotate(-0 " in attributes.get("transform", ""):
            del attributes["transform"]
        element.attrib = attributes


_REFERENCE = re.compile(r"(^|url\()#([\w.-]+)")
"""A reference in an attribute: either ``#part`` (``href``) or ``url(#part)``."""


def _page_style(style: str) -> str:
    """Declarations with the page's colours and without a font family, which the style sheet sets."""
    kept = []
    for declaration in style.split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font":  # older versions' shorthand: [weight] size family
            value = re.sub(r"(px) .*", r"\1 var(--sans)", value)
        if key and key != "font-family":
            kept.append(f"{key}: {_VARIABLES.get(value, value)}")
    return "; ".join(kept)


_VARIABLES = {value: f"var(--{colour})" for colour, value in LIGHT.items()}


def _local(name: str) -> str:
    """A tag or attribute name without its namespace."""
    return name.rpartition("}")[2]
