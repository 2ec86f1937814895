"""One HTML file that needs nothing else, whatever the Run says."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pages import build, write
from synthetic import study

from batchnorm.report import page as html
from batchnorm.report.study.page import StudyPage
from batchnorm.report.study.pictures import write_pictures
from batchnorm.runs.run import Run, RunError

HOSTILE = (
    "<script>window.hacked = true</script>",
    "</script><!--<img src=x onerror='window.hacked = true'>",
    "\"'`&amp; {{ 7 * 7 }} ${1} \u2028 größe 层",
)


class Elements(HTMLParser):
    """The start tags of a document, with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def text(page: StudyPage) -> str:
    return html.render(page)


def test_the_answer_stands_first(text: str, page: StudyPage) -> None:
    assert text.index(page.answer.headline) < text.index("<nav") < text.index('<section id="accuracy"')
    for part in page.answer.parts:
        assert part.figure in text


def test_it_is_one_document_in_english_for_any_screen(text: str) -> None:
    found = Elements(text).found
    assert text.startswith("<!DOCTYPE html>")
    assert ("html", {"lang": "en"}) in found
    assert any(tag == "meta" and a.get("name") == "viewport" for tag, a in found)
    identifiers = [attributes["id"] for _, attributes in found if "id" in attributes]
    assert len(set(identifiers)) == len(identifiers)
    links = [attributes["href"] for tag, attributes in found if tag == "a"]
    assert all(link and link.startswith("#") and link[1:] in identifiers for link in links)


def test_it_fetches_nothing(text: str) -> None:
    for tag, attributes in Elements(text).found:
        assert "src" not in attributes, (tag, attributes)
        assert not (attributes.get("href") or "").startswith(("http", "//")), (tag, attributes)
    assert "@import" not in text.split("</style>")[0]
    assert "default-src 'none'" in text


def test_every_panel_has_its_chart_in_the_data(text: str, page: StudyPage) -> None:
    data = json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)[1])  # type: ignore[index]
    wanted = {panel.id for section in page.sections for panel in section.panels}
    assert data["charts"].keys() == wanted
    assert {a["data-chart"] for _, a in Elements(text).found if "data-chart" in a} == wanted
    assert len(data["units"]["values"]["arm"]) == 3600


def test_it_is_small_enough_to_send(text: str) -> None:
    assert len(text.encode()) < 8e6


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(tmp_path: Path, name: str) -> None:
    run = study(tmp_path / "run", seeds=(0,), measured=[0, 5000], width=4, layers=(name, "hidden2"))
    run.note(command=name, status=name, machine={name: name}, diverged=[{"seed": 0, "arm": name, "step": 1}])
    text = html.render(build(run))
    found = Elements(text).found
    assert sum(tag == "script" for tag, _ in found) == 4
    assert not any(tag == "img" or any(key.startswith("on") for key in a) for tag, a in found)
    assert text.count("<!--") == 0


def test_embedded_json_cannot_end_its_element() -> None:
    value = {"a": "</script><!-- & \u2028"}
    held = str(html.embedded(value))
    assert json.loads(held) == value
    assert not set("<>&\u2028") & set(held)
    with pytest.raises(ValueError, match="JSON"):
        html.embedded(float("nan"))


def test_backticks_become_code_and_everything_is_escaped() -> None:
    assert html.marked("a `b` <c> `<d>`") == "a <code>b</code> &lt;c&gt; <code>&lt;d&gt;</code>"


def test_write_replaces_the_report_whole(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", "study")
    (run.path / "report.html").write_text("an old report")
    assert write(run) == run.path / "report.html"
    assert (run.path / "report.html").read_text(encoding="utf-8").endswith("</html>\n")
    assert write(run, tmp_path / "elsewhere.html") == tmp_path / "elsewhere.html"
    assert sorted(entry.name for entry in tmp_path.rglob("*.*")) == ["elsewhere.html", "report.html", "run.json"]


def test_a_lone_surrogate_in_run_json_is_written(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", "study", command="bad \udc80 byte")
    assert b"bad ? byte" in write(run).read_bytes()


def test_a_report_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", "study")
    with pytest.raises(RunError, match="cannot write"):
        write(run, tmp_path / "no" / "such" / "folder.html")


def test_an_empty_run_makes_a_page(tmp_path: Path) -> None:
    text = html.render(build(Run.create(tmp_path / "run", "study")))
    assert "Too little was measured" in text
    assert text.count("Not measured in this Run.") == 11


@pytest.mark.slow
def test_pictures_are_pngs_of_the_main_charts(tmp_path: Path, page: StudyPage) -> None:
    written = write_pictures(page.sections, tmp_path / "pictures", ("undo", "percentiles"))
    assert [path.name for path in written] == ["undo.png", "percentiles.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in written)
