"""The tutorials in docs/tutorials: what is stored can be published, and every cell still runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

import notebooks

NAMES = ("frozen", "healthy", "memory", "ship", "watch")
KILOBYTES = 500
PROMISED: dict[str, tuple[str, ...]] = {
    "healthy": (
        "No findings.",
        "untrained-statistics",
        "too-few-steps: ",
        "momentum 0.99: the running statistics follow single batches",
        "['dead-units', 'variance-below-eps']",
    ),
    "watch": ("No findings.", "constant-channels", "no gradient since step", "32 of 32 units without a gradient"),
    "frozen": (
        "after layer.eval() and model.train(): training mode",
        "after bn.freeze and model.train():    eval mode",
        "the frozen layer changed in 20 steps: False",
    ),
    "memory": (
        "248.5 MiB kept by one forward in training mode",
        "110.1 MiB kept by one forward in training mode",
        "losses equal to the bit: True",
        "weights and statistics equal to the bit: True",
    ),
    "ship": ("2 of 2 batch norm layers folded", "0 of 1 batch norm layer folded", "no-norms", "(converted)"),
}
"""What the text of a notebook relies on: its outputs have these words on any machine."""


def check_promises(name: str, text: str) -> None:
    """The outputs support what the text between the cells says."""
    for words in PROMISED[name]:
        assert words in text, words
    if name == "healthy":
        evaluated, trained, repaired = re.findall(r"held-out accuracy +([\d.]+)%", text)[1:4]
        assert float(evaluated) + 3 < min(float(trained), float(repaired))
    if name == "memory":
        rows = re.findall(r"^(stock|lean), batch (\d) +(\d+) MiB +(\d+) MiB$", text, re.MULTILINE)
        kept, peak = ({(kind, batch): int(row[at]) for row in rows for kind, batch in [row[:2]]} for at in (2, 3))
        assert kept["lean", "4"] < kept["stock", "2"]
        assert peak["lean", "2"] < 0.8 * peak["stock", "2"]
        assert peak["lean", "4"] < 0.8 * peak["stock", "4"]
    if name == "frozen":
        row = r"^(.+?) +(no training|mixed|two classes) .*?([\d.]+)% *$"
        mean = {(norms, batches): float(value) for norms, batches, value in re.findall(row, text, re.MULTILINE)}
        assert len(mean) == 13
        frozen = [mean[norms, "two classes"] for norms in ("frozen", "recalibrated, frozen")]
        assert max(mean["live", "two classes"], mean["live, recalibrated after", "two classes"]) + 3 < min(frozen)
        assert max(mean["recalibrated", "no training"], mean["adapted", "no training"]) + 20 < mean["live", "mixed"]


def stored(name: str) -> Any:
    return notebooks.read(notebooks.FOLDER / f"{name}.ipynb")


def outputs_of(notebook: Any) -> str:
    return "\n".join(notebooks.text_of(output) for cell in notebook.cells for output in cell.get("outputs", ()))


def test_all_tutorials_are_tested() -> None:
    assert sorted(path.stem for path in notebooks.FOLDER.glob("*.ipynb")) == sorted(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_notebook_has_outputs_that_can_be_published(name: str) -> None:
    notebook = stored(name)
    nbformat.validate(notebook)
    assert notebooks.faults(notebook) == []
    assert any(cell.get("outputs") for cell in notebook.cells)
    assert (notebooks.FOLDER / f"{name}.ipynb").stat().st_size < 1000 * KILOBYTES
    title, *_ = notebook.cells
    assert title.cell_type == "markdown"
    assert title.source.startswith("# ")
    assert "seconds" in title.source
    check_promises(name, outputs_of(notebook))


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_notebook_is_as_the_tool_writes_it(name: str) -> None:
    path = notebooks.FOLDER / f"{name}.ipynb"
    again = nbformat.writes(notebooks.normalized(notebooks.read(path)))
    assert path.read_text(encoding="utf-8").rstrip("\n") == again.rstrip("\n"), "run `make notebooks`"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_runs_from_its_first_cell_to_its_last(name: str, tmp_path: Path) -> None:
    notebook = notebooks.executed(stored(name), tmp_path)
    assert notebooks.faults(notebook) == []
    check_promises(name, outputs_of(notebook))
