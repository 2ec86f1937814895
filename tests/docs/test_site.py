"""The site: its build is strict, it works from a folder without a network, and every public name can be linked to."""

from __future__ import annotations

import json
import re
import time
import zlib
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import chromium
import pytest
from site_building import ROOT, build

import batchnorm as bn

pytestmark = pytest.mark.slow
WRONG = {
    "a link to a page": ("[x](nothing.md)", "nothing.md"),
    "a link to a heading": ("[x](other.md#nothing)", "nothing"),
    "a link to a heading of the same page": ("[x](#nothing)", "nothing"),
    "an absolute link": ("[x](/other.html)", "absolute"),
    "a link to a folder": ("[x](reference)", "reference"),
    "a public name": ("::: batchnorm.nothing", "nothing"),
    "a link to a public name": ("[`fold`][batchnorm.nothing]", "nothing"),
    "a picture": ("![x](nothing.png)", "nothing.png"),
    "an included file": ('--8<-- "nothing.md"', "nothing.md"),
    "a page that the navigation has not": ("", "unlisted.md"),
}


def small_site(folder: Path, text: str) -> Path:
    """A site of two pages with the configuration of the real one."""
    pytest.importorskip("material", reason="the site's tools are not installed: pip install 'batchnorm[docs]'")
    for name in ("src", "tools", "CHANGELOG.md", "mkdocs.yml"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "docs" / "assets").mkdir(parents=True)
    for file in (ROOT / "docs" / "assets").iterdir():
        (folder / "docs" / "assets" / file.name).symlink_to(file)
    (folder / "docs" / ".nav.yml").write_text("nav: [index.md, other.md]\n", encoding="utf-8")
    (folder / "docs" / "other.md").write_text("# Other\n\n::: batchnorm.every\n", encoding="utf-8")
    (folder / "docs" / "index.md").write_text(f"# Page\n\n{text}\n", encoding="utf-8")
    return folder


def test_a_site_without_a_mistake_is_built(tmp_path: Path) -> None:
    text = "[a](other.md#batchnorm.every), [b](other.md#other), [`every`][batchnorm.every], [c](https://pytorch.org)"
    done = build(small_site(tmp_path, text), tmp_path / "site")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", WRONG)
def test_a_mistake_ends_the_build(case: str, tmp_path: Path) -> None:
    text, named = WRONG[case]
    folder = small_site(tmp_path, text)
    if not text:
        (folder / "docs" / named).write_text("# Unlisted\n", encoding="utf-8")
    done = build(folder, tmp_path / "site")
    assert done.returncode != 0
    assert named in done.stderr, done.stderr


@pytest.mark.parametrize(("link", "status"), [("other.md#batchnorm.every", 0), ("nothing.md", 1)])
def test_links_of_a_notebook_lead_to_pages(link: str, status: int, tmp_path: Path) -> None:
    folder = small_site(tmp_path, "Text")
    (folder / "docs" / ".nav.yml").write_text("nav: [index.md, other.md, notebook.ipynb]\n", encoding="utf-8")
    cell = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": f"# Notebook\n\n[a link]({link})"}
    notebook = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (folder / "docs" / "notebook.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    done = build(folder, tmp_path / "site")
    assert done.returncode == status, done.stderr
    page = (tmp_path / "site" / "notebook.html").read_text(encoding="utf-8") if not status else ""
    assert ('href="other.html#batchnorm.every"' in page) is (status == 0)
    assert not status or "nothing.md" in done.stderr


def pages_of(site: Path) -> list[Path]:
    """The built pages, without those that the gallery shows."""
    return [page for page in site.rglob("*.html") if page.parent != site / "gallery" or page.name == "index.html"]


def test_every_public_name_can_be_linked_to_from_other_sites(site: Path) -> None:
    """objects.inv, which Sphinx and mkdocstrings of other projects read."""
    content = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    names = {line.split(" ")[0] for line in zlib.decompress(content).decode().splitlines()}
    assert [name for name in bn.__all__ if f"batchnorm.{name}" not in names] == []


def test_no_page_loads_anything_from_elsewhere(site: Path) -> None:
    loads = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?\b(?:src|href)=\"?(https?:)?//[^>]*>")
    found = [
        (page.relative_to(site), tag[0])
        for page in pages_of(site)
        for tag in loads.finditer(page.read_text(encoding="utf-8"))
        if 'rel="canonical"' not in tag[0]
    ]
    assert found == []


def test_every_link_and_picture_of_the_built_site_is_there(site: Path) -> None:
    """Also those to files that are left out of the site, of which mkdocs does not warn."""
    pages = {page: page.read_text(encoding="utf-8") for page in pages_of(site)}
    anchors = {page: set(re.findall(r"""\b(?:id|name)=["']?([^"' >]+)""", text)) for page, text in pages.items()}
    broken = []
    for page, text in pages.items():
        for link in re.findall(r"""<(?:a|img|link|script)\b[^>]*?\b(?:href|src)=["']?([^"' >]+)""", text):
            target, _, anchor = unescape(link).partition("#")
            if re.match(r"[a-z]+:|//", target) or page.name == "404.html":
                continue
            file = page.parent.joinpath(unquote(target).partition("?")[0]).resolve() if target else page
            known = anchors.get(file)
            if not file.is_file() or (anchor and known is not None and unquote(anchor) not in known):
                broken.append((str(page.relative_to(site)), link))
    assert broken == []


def test_the_pages_of_the_gallery_are_small_and_name_no_folder_of_a_machine() -> None:
    import gallery

    files = list(gallery.GALLERY.iterdir())
    assert sum(file.stat().st_size for file in files) <= gallery.LARGEST
    names = set(gallery.PAGES)
    assert {file.name for file in files} == {"index.md", *names, *gallery.PICTURES.values()}
    for name in names:
        text = (gallery.GALLERY / name).read_text(encoding="utf-8")
        assert not re.search(r"(?<![\w.:/])/(?:tmp|home|root|work|Users)/", text), name


@pytest.mark.browser
@pytest.mark.skipif(chromium.find() is None, reason="no Chromium")
@pytest.mark.parametrize("width", [1400, 390])
def test_the_search_works_from_a_folder_and_asks_no_network(site: Path, width: int) -> None:
    program = chromium.find()
    assert program is not None
    with chromium.Chromium(program) as browser:
        browser.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 800
        )
        browser.send("Page.navigate", url=(site / "reference" / "surgery.html").as_uri())
        browser.wait("document.readyState === 'complete' && document.querySelector('.md-search__input') !== null")
        browser.wait("document.querySelector('iframe') !== null")  # the search's worker
        browser.evaluate("document.querySelector('.md-search__input').focus()")
        time.sleep(0.5)
        browser.evaluate(
            "(field => { field.value = 'environment variables';"
            "field.dispatchEvent(new Event('input', { bubbles: true }));"
            "field.dispatchEvent(new KeyboardEvent('keyup', { bubbles: true })) })"
            "(document.querySelector('.md-search__input'))"
        )
        browser.wait("document.querySelector('.md-search-result__link') !== null")
        first = browser.evaluate("document.querySelector('.md-search-result__link').href")
        assert "reference/environment.html" in first
        assert browser.evaluate("document.documentElement.scrollWidth <= innerWidth")
        assert [url for url in browser.requests if not url.startswith(("file:", "data:", "blob:", "about:"))] == []
        assert browser.complaints == []
