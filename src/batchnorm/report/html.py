"""The page -> one self-contained HTML file: style, script, charts and data inside, nothing fetched.

Every word of a Run is hostile input: Jinja escapes what stands in the page, `embedded` what stands in a script element,
and the scripts write text, never markup. A Content-Security-Policy in the file forbids every request.
"""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import vl_convert
from markupsafe import Markup

from batchnorm.report.definitions import NOTATION
from batchnorm.report.page import Page
from batchnorm.runs.run import RunError, write_text_atomically


def render(page: Page, refresh: int | None = None) -> str:
    """The HTML of a page: the same page gives the same text.

    `refresh`: have an open page load itself again after so many seconds.
    """
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["marked"] = marked
    return environment.get_template(f"{page.template}.html.j2").render(
        page=page,
        refresh=refresh,
        notation=NOTATION,
        css=Markup(_asset("page.css")),
        common=Markup(_asset("common.js")),
        script=Markup("\n".join(_asset(f"{name}.js") for name in page.scripts)),
        vega=Markup(vega_bundle()),
        data=embedded(page.data()),
    )


def write_page(text: str, target: Path) -> Path:
    """Write a page's HTML. Raises RunError where that fails."""
    try:
        write_text_atomically(target, text)
    except OSError as error:
        raise RunError(f"cannot write {target}: {error.strerror or error}") from error
    return target


def embedded(value: Any) -> Markup:
    """JSON for a script element: no character of it can end the element or begin a comment."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


def marked(sentence: str) -> Markup:
    """What stands between backticks as code, all of it escaped."""
    pieces = sentence.split("`")
    return Markup("").join(
        Markup("<code>{}</code>").format(piece) if i % 2 else piece for i, piece in enumerate(pieces)
    )


def vega_lite_version() -> str:
    """The Vega-Lite that Altair writes for, as vl_convert names it, or its newest where it does not have that one."""
    wanted: str = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    available: list[str] = vl_convert.get_vegalite_versions()
    return wanted if wanted in available else available[-1]


@cache
def vega_bundle() -> str:
    """Vega, Vega-Lite and vega-embed in one script, which sets window.vegaEmbed."""
    bundle: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", vl_version=vega_lite_version())
    return bundle.replace("</script", "<\\/script").replace("<!--", "<\\!--")


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath("assets", name).read_text(encoding="utf-8")
