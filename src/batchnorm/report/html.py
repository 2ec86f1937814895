"""The page -> one self-contained HTML file: style, script, charts and data inside, nothing fetched.

Every word of a Run is hostile input: Jinja escapes what stands in the page, `embedded` what stands in a script element,
and the scripts write text, never markup. A Content-Security-Policy in the file forbids every request.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import altair as alt
import jinja2
import vl_convert
from markupsafe import Markup

from batchnorm.report.definitions import NOTATION
from batchnorm.report.study import charts, terminal
from batchnorm.report.study.page import Page, build
from batchnorm.runs.run import Run, RunError

FILE = "report.html"


def render(page: Page) -> str:
    """The HTML of a study's page. The same page gives the same text."""
    specs = {panel.id: panel.chart for section in page.sections for panel in section.panels}
    content = {"page": page, "summary": terminal, "style": charts.style}
    return filled("study", content, {"charts": specs, "units": _units(page)}, scripts=("units",))


def filled(
    kind: str, content: Mapping[str, Any], data: Any, refresh: int | None = None, *, scripts: Sequence[str]
) -> str:
    """The template of a kind of page with its content, and these scripts with their data.

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
    return environment.get_template(f"{kind}.html.j2").render(
        **content,
        refresh=refresh,
        notation=NOTATION,
        css=Markup(_asset("page.css")),
        common=Markup(_asset("common.js")),
        script=Markup("\n".join(_asset(f"{name}.js") for name in scripts)),
        vega=Markup(vega_bundle()),
        data=embedded(data),
    )


def write(run: Run, path: str | os.PathLike[str] | None = None) -> Path:
    """Build the Run's page and write it, whole or not at all, to `path`, or to report.html in the Run's folder.

    Raises RunError where a table is damaged or the file cannot be written.
    """
    return write_text(render(build(run)), Path(path) if path is not None else run.path / FILE)


def write_text(text: str, target: Path) -> Path:
    """Write a page whole, or not at all. Raises RunError where it cannot be written."""
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
    return resources.files("batchnorm.report").joinpath("assets", name).read_text(encoding="utf-8")
