"""Hooks of the site's build: what the search puts first, and links in notebooks.

In the search, guides that begin with a symptom come before pages that have every name; pages that only lead to others
come last. Links of notebooks to Markdown pages become links to the built pages, as mkdocs does for Markdown.
"""

from __future__ import annotations

import logging
import posixpath
import re
from html import unescape
from typing import Any
from urllib.parse import unquote

log = logging.getLogger("mkdocs.hooks.notebooks")

BOOSTS = {
    "how-to/": 2.0,
    "findings.md": 1.5,
    "quantities.md": 3.0,
    "watch.md": 1.5,
    "reference/quantities.md": 0.7,
    "reference/records.md": 0.5,
    "reference/index.md": 0.3,
    "how-to/index.md": 0.5,
    "gallery/": 0.5,
    "architecture.md": 0.5,
    "changelog.md": 0.3,
}
"""By the beginning of the path; the longest that fits counts."""


# `tools/page_code.py` reads the word; Markdown of the site would not see the fence.
_TRAINED = re.compile(r"^(```\w+) trained$", re.MULTILINE)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Set the weight of a page in the search, unless its head has one; remove words that only tests read."""
    fitting = [path for path in BOOSTS if page.file.src_uri.startswith(path)]
    if fitting and "search" not in page.meta:
        page.meta["search"] = {"boost": BOOSTS[max(fitting, key=len)]}
    return _TRAINED.sub(r"\1", markdown)


_LINK = re.compile(r"""(<(?:a|img)\b[^>]*?\b(?:href|src)=)(["'])([^"'#?]+)([^"']*)\2""")


def on_page_content(html: str, page: Any, files: Any, **_: Any) -> str:
    """Lead the links of a notebook to the built pages; warn where there is no such file, which ends a strict build."""
    source = page.file.src_uri
    if not source.endswith(".ipynb"):
        return html

    def built(found: re.Match[str]) -> str:
        head, quote, target, rest = found.groups()
        if re.match(r"[a-z]+:|//", target):
            return found[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), unquote(unescape(target))))
        file = files.get_file_from_path(path)
        if file is None:
            log.warning("Doc file '%s' contains a link '%s', but the target is not found.", source, target)
            return found[0]
        return f"{head}{quote}{file.url_relative_to(page.file)}{rest}{quote}"

    return _LINK.sub(built, html)
