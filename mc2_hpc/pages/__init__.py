"""Report pages with one layout and one style, rendered by Jinja2 from templates that are stored beside their code.

    text = render("mc2_hpc.quickstart", "report.html", {"report": report})

A page's template extends ``pages/base.html``, which contains the style sheet (light, dark, print), and may import the
macros in ``pages/macros.html``. Every value in a template is escaped; only markup generated here
(:mod:`mc2_hpc.pages.plots`, :func:`~mc2_hpc.pages.numbers.scientific`) is inserted unchanged.
"""

import base64
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from jinja2 import ChoiceLoader, Environment, PackageLoader, PrefixLoader, StrictUndefined

from mc2_hpc.pages.numbers import duration, grouped, percent, scientific, short_number, short_share
from mc2_hpc.pages.palette import DARK, LIGHT
from mc2_hpc.storage import write_text


def render(package: str, template: str, values: Mapping[str, object]) -> str:
    """A page as text.

    Args:
        package: dotted name of the package whose ``templates`` folder has the template.
        template: file name in that folder.
        values: what the template refers to, by name.

    Raises:
        jinja2.UndefinedError: the template refers to a missing value.
    """
    return _environment(package).get_template(template).render(values)


def write_page(path: Path, package: str, template: str, values: Mapping[str, object]) -> Path:
    """Write :func:`render`'s text to ``path`` atomically; returns ``path``."""
    text = render(package, template, values)
    write_text(path, text)
    return path


def data_uri(content: bytes, media_type: str) -> str:
    """The content as a data URI, so that the page needs no other file."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode('ascii')}"


def language_tag(code: str) -> str:
    """A language code in the form of the ``lang`` attribute."""
    return code.replace("_", "-")


@lru_cache
def _environment(package: str) -> Environment:
    environment = Environment(
        loader=ChoiceLoader([PackageLoader(package), PrefixLoader({"pages": PackageLoader(__name__)})]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters.update(
        duration=duration,
        grouped=grouped,
        language_tag=language_tag,
        percent=percent,
        scientific=scientific,
        short_number=short_number,
        short_share=short_share,
    )
    environment.globals.update(light=LIGHT, dark=DARK)
    return environment
