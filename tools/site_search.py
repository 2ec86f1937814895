"""A hook of the site: what the search puts first.

Guides that begin with a symptom come before pages that have every name; pages that only lead to others come last.
"""

from __future__ import annotations

from typing import Any

BOOSTS = {
    "how-to/": 2.0,
    "tutorials/": 1.5,
    "findings.md": 1.5,
    "quantities.md": 1.5,
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


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Set the weight of a page in the search, unless its head has one."""
    fitting = [path for path in BOOSTS if page.file.src_uri.startswith(path)]
    if fitting and "search" not in page.meta:
        page.meta["search"] = {"boost": BOOSTS[max(fitting, key=len)]}
    return markdown
