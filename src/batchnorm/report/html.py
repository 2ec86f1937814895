"""The page -> one self-contained HTML file: style, script, charts and data inside, nothing fetched.

Every word of a Run is hostile input: Jinja escapes what stands in the page, `embedded` what stands in a script element,
and page.js writes text, never markup. A Content-Security-Policy in the file forbids every request.
"""

from __future__ import annotations

import json
import os
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import vl_convert
from markupsafe import Markup

from batchnorm.record.run import Run, RunError
from batchnorm.report import charts, summary
from batchnorm.report.definitions import NOTATION
from batchnorm.report.page import Page, build

FILE = "report.html"


def render(page: Page) -> str:
    """The HTML of a page. The same page gives the same text."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["marked"] = marked
    specs = {panel.id: panel.chart for section in page.sections for panel in section.panels}
    return environment.from_string(_asset("template.html.j2")).render(
        page=page,
        summary=summary,
        notation=NOTATION,
        style=charts.style,
        css=Markup(_asset("page.css")),
        script=Markup(_asset("page.js")),
        vega=Markup(vega_bundle()),
        data=embedded({"charts": specs, "units": _units(page)}),
    )


def write(run: Run, path: str | os.PathLike[str] | None = None) -> Path:
    """Build the Run's page and write it, whole or not at all, to `path`, or to report.html in the Run's folder.

    Raises RunError where a table is damaged or the file cannot be written.
    """
    target = Path(path) if path is not None else run.path / FILE
    text = render(build(run))
    temporary = target.with_name(f"{target.name}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8", errors="replace")
        os.replace(temporary, target)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
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


def _units(page: Page) -> dict[str, Any]:
    table = page.units
    columns = [{"name": c.name, "header": c.header, "numeric": c.numeric} for c in table.columns]
    return {"columns": columns, "values": table.values, "names": table.names}


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
