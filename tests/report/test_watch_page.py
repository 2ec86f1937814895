"""The page of watched trainings as data, and as one HTML file that holds all of it."""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pages import build, write
from test_html import HOSTILE, Elements
from watched import Made, log_spaced, log_table, watched

from batchnorm.report.page import render
from batchnorm.report.watch.numbers import MOST_NAMES, POINTS, UNIT_COLUMNS, band, read
from batchnorm.report.watch.page import WatchPage, pack
from batchnorm.runs.run import Run, RunError


def dying(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
    late = steps >= 300
    columns["gamma"][np.ix_(late, np.arange(4))] = 1e-3
    columns["beta"][np.ix_(late, np.arange(4))] = 0.0


LAYERS = [Made("stem", 8, undo=0.95), Made("dying", 8, change=dying), Made("last", 4)]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    steps = log_spaced(5000)
    folder = tmp_path_factory.mktemp("watch") / "a"
    skipped = [{"name": "x", "class": "C", "why": "W"}]
    return watched(folder, LAYERS, logged={"loss": np.exp(-steps / 500)}, skipped=skipped)


@pytest.fixture(scope="module")
def page(run: Run) -> WatchPage:
    return build([run])


def data_of(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert found is not None
    data: dict[str, Any] = json.loads(found[1])
    return data


def unpack(text: str) -> np.ndarray:
    """What `pack` wrote, in one row."""
    parts = np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, 3)
    whole = np.zeros((len(parts), 4), np.uint8)
    whole[:, 1:] = parts
    return whole.view("<f4").ravel().astype(np.float64)


def test_findings_stand_with_their_layer_and_step(page: WatchPage) -> None:
    (group,) = page.findings
    (entry,) = group.entries
    assert (group.kind.slug, group.severity) == ("dead-units", "error")
    assert (entry.where, entry.place) == ("dying", 1)
    first = min(step for step in log_spaced(5000) if step >= 300)
    assert entry.finding.text == f"4 of 8 units dead since step {first}"


def test_the_html_holds_the_answer_the_findings_and_the_reasons(page: WatchPage) -> None:
    text = render(page)
    assert page.headline in text
    assert "4 of 8 units dead since step" in text
    assert "C: W" in text
    assert "1 batch norm layer was not watched" in text
    found = Elements(text).found
    ids = [a["id"] for _, a in found if "id" in a]
    assert len(set(ids)) == len(ids)
    links = [a["href"] or "" for tag, a in found if tag == "a"]
    assert all(link[1:] in ids or re.fullmatch(r"#layer=\d+", link) for link in links)


def test_it_fetches_nothing(page: WatchPage) -> None:
    for tag, attributes in Elements(render(page)).found:
        assert "src" not in attributes, (tag, attributes)
        assert not (attributes.get("href") or "").startswith(("http", "//")), (tag, attributes)


def test_the_packed_numbers_are_those_of_the_run(run: Run, page: WatchPage) -> None:
    data = data_of(render(page))
    reading = read(run)
    for place, layer in enumerate(reading.layers):
        packed = data["runs"][0]["layers"][str(place)]
        last = unpack(packed["last"]).reshape(len(UNIT_COLUMNS), layer.units)
        for row, name in zip(last, UNIT_COLUMNS, strict=True):
            np.testing.assert_allclose(row, layer.last[name], rtol=3e-5, err_msg=name)
        curve = unpack(packed["curves"]["undo_index"]["values"]).reshape(3, -1)
        np.testing.assert_allclose(curve, layer.curves["undo_index"].values, rtol=3e-5)
    assert data["runs"][0]["steps"] == reading.steps.tolist()


def test_every_panel_draws_something_and_no_curve_is_left_out(page: WatchPage) -> None:
    data = data_of(render(page))
    shown = {name for panel in data["panels"] for name, _ in panel["series"]}
    known = {name for layer in page.runs[0].reading.layers for name in layer.curves}
    assert known <= shown
    assert all(known & {name for name, _ in panel["series"]} for panel in data["panels"])


@pytest.mark.parametrize(
    "values",
    [[0.0, 1.0, -1.0, 0.1, 1e-30, 3e37, 123456.7], [np.nan, np.inf, -np.inf], []],
    ids=["numbers", "unknown", "none"],
)
def test_packing_keeps_four_digits(values: list[float]) -> None:
    given = np.array(values)
    expected = np.where(np.isfinite(given), given, np.nan)
    np.testing.assert_allclose(unpack(pack(given)), expected, rtol=2.0**-16)


def test_bands_are_percentiles_of_what_is_finite() -> None:
    values = np.random.default_rng(0).normal(size=(4, 21))
    values[1, :5] = np.nan
    values[2, 3] = np.inf
    values[3] = np.nan
    found = band(values)
    for row in range(3):
        finite = values[row][np.isfinite(values[row])]
        np.testing.assert_allclose(found[:, row], np.percentile(finite, [15, 50, 85]))
    assert np.isnan(found[:, 3]).all()


def test_what_probes_saw_is_drawn(tmp_path: Path) -> None:
    run = watched(tmp_path / "run", [Made("bn", 3)], steps=log_spaced(100, 10))
    names = pa.array(["bn"] * 6).dictionary_encode()
    probe: dict[str, Any] = {
        "step": np.repeat([0, 50], 3),
        "layer": names,
        "unit": np.tile(np.arange(3, dtype=np.int32), 2),
    }
    for place, name in enumerate(("in_p15", "in_p50", "in_p85", "positive_in", "positive_out", "linear_share")):
        probe[name] = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) + place
    run.append("probe", pa.table(probe))
    run.append("shift", pa.table({"step": [0, 50], "layer": names[:2], "shift": [1.0, 2.0], "cosine": [0.5, 0.4]}))
    curves = read(run).layers[0].curves
    assert curves["percentiles"].values.tolist() == [[2, 5], [3, 6], [4, 7]]
    assert curves["positive_in"].median.tolist() == [5, 8]
    assert curves["shift"].values.tolist() == [[1, 2]]
    assert {"percentiles", "positive", "linear_share", "shift", "cosine"} <= {
        panel["id"] for panel in data_of(render(build([run])))["panels"]
    }


def test_long_logs_are_thinned_to_their_means_and_ranges(tmp_path: Path) -> None:
    run = watched(tmp_path / "run", [Made("bn", 2)], steps=log_spaced(100, 10))
    steps = np.arange(20_000)
    values = np.sin(steps) + steps
    run.append("log", log_table("loss", steps, values))
    (scalar,) = read(run).scalars
    assert len(scalar.steps) <= POINTS + 1
    assert scalar.last == values[-1]
    low, mean, high = scalar.values
    assert low.min() == values.min()
    assert high.max() == values.max()
    stretch = values[(steps > scalar.steps[-2])]
    assert mean[-1] == pytest.approx(stretch.mean())


def test_names_without_end_are_not_all_drawn(tmp_path: Path) -> None:
    run = watched(tmp_path / "run", [Made("bn", 2)], steps=log_spaced(100, 10))
    for number in range(MOST_NAMES + 5):
        run.append("log", log_table(f"loss{number}", np.arange(2), np.arange(2.0)))
    run.append("log", log_table("nothing", np.arange(2), np.full(2, np.nan)))
    assert [scalar.name for scalar in read(run).scalars] == [f"loss{n}" for n in range(MOST_NAMES)]


def test_several_runs_stand_side_by_side(run: Run, tmp_path: Path) -> None:
    other = watched(tmp_path / "b", [Made("stem", 8), Made("new", 8)], status="interrupted", seed=1)
    page = build([run, other])
    assert page.layers == ("stem", "dying", "last", "new")
    assert [row.label for row in page.runs] == ["a", "b"]
    assert page.headline == "The runs differ: in a gamma and beta undo it in part; in b gamma and beta do not undo it."
    assert any(notice.startswith("b: The training was interrupted") for notice in page.notices)
    text = render(page)
    for each in page.runs:
        assert each.headline in text
    data = data_of(text)
    assert sorted(data["runs"][1]["layers"]) == ["0", "3"]


def test_runs_with_the_same_name_get_different_labels(tmp_path: Path) -> None:
    runs = [watched(tmp_path / folder / "run", LAYERS[:1], steps=log_spaced(50, 5)) for folder in ("x", "y")]
    assert [result.label for result in build([*runs, runs[0]]).runs] == ["x/run", "y/run", "x/run (2)"]


@pytest.mark.parametrize(
    ("status", "words"), [("running", "still running"), ("interrupted", "was interrupted"), ("failed", "failed")]
)
def test_notices_say_how_it_stands(tmp_path: Path, status: str, words: str) -> None:
    run = watched(tmp_path / "run", LAYERS[:1], status=status, errors=["No space left on device"])
    notices = build([run]).notices
    assert words in notices[0]
    assert "step 5,000" in notices[0]
    assert "No space left on device" in notices[1]


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_stay_text(tmp_path: Path, name: str) -> None:
    run = watched(
        tmp_path / "run", [Made(name, 8, change=dying), Made("x" * 10_000, 3)], model=name, schedule=name, counted=name,
        logged={name: np.arange(len(log_spaced(5000)), dtype=float)},
        skipped=[{"name": name, "class": name, "why": name}], errors=[name], status="failed",
    )  # fmt: skip
    text = render(build([run]))
    found = Elements(text).found
    assert sum(tag == "script" for tag, _ in found) == 4
    assert not any(tag == "img" or any(key.startswith("on") for key in a) for tag, a in found)
    assert text.count("<!--") == 0


@pytest.mark.parametrize("info", [
    {"layers": None}, {"layers": 3}, {"skipped": 7, "errors": "x"}, {"skipped": [1, {}], "errors": [None]},
    {"counted": None, "versions": 1, "machine": None}, {"status": 5},
])  # fmt: skip
def test_odd_run_json_still_makes_a_page(tmp_path: Path, info: dict[str, Any]) -> None:
    run = watched(tmp_path / "run", [] if "layers" in info else LAYERS[:1], steps=log_spaced(50, 5), status="running")
    run.note(**info)
    assert render(build([run])).endswith("</html>\n")


def test_an_empty_run_makes_a_page(tmp_path: Path) -> None:
    text = render(build([watched(tmp_path / "run", LAYERS, steps=np.zeros(0), status="running")]))
    assert "Nothing was recorded yet" in text


def test_nan_and_infinity_everywhere_still_make_a_page(tmp_path: Path) -> None:
    def strange(value: float) -> Any:
        def change(columns: dict[str, np.ndarray], steps: np.ndarray) -> None:
            for column in columns.values():
                column[:] = value

        return change

    layers = [Made(str(value), 3, change=strange(value)) for value in (np.nan, np.inf, -np.inf, 0.0, -1.0, 1e30)]
    data_of(render(build([watched(tmp_path / "run", layers)])))


def test_only_a_page_that_is_followed_loads_itself_again(page: WatchPage) -> None:
    assert 'http-equiv="refresh"' not in render(page)
    assert '<meta name="reload" content="7"><noscript><meta http-equiv="refresh" content="7">' in render(
        page, refresh=7
    )


def test_the_same_page_gives_the_same_text(run: Run) -> None:
    assert render(build([run])) == render(build([run]))


def test_it_is_written_whole_where_it_is_asked_for(run: Run, tmp_path: Path) -> None:
    assert write([run]) == run.path / "report.html"
    assert write([run], tmp_path / "page.html").read_text(encoding="utf-8").endswith("</html>\n")
    with pytest.raises(RunError, match="cannot write"):
        write([run], tmp_path / "no" / "such" / "folder.html")


def test_no_path_of_the_machine_is_on_the_page(run: Run, page: WatchPage) -> None:
    assert str(run.path.parent) not in render(page)
