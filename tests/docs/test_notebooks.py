"""The tutorials run from top to bottom without a warning, and have outputs that name no folder of a machine."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import notebooks

pytestmark = pytest.mark.slow
TUTORIALS = sorted(notebooks.TUTORIALS.glob("*.ipynb"))
PROGRAM = Path(notebooks.__file__)


def execute(*arguments: object) -> subprocess.CompletedProcess[str]:
    pytest.importorskip("nbclient", reason="the site's tools are not installed: pip install 'batchnorm[docs]'")
    pytest.importorskip("ipykernel", reason="the site's tools are not installed: pip install 'batchnorm[docs]'")
    command = [sys.executable, str(PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs(path: Path) -> None:
    done = execute("--check", path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_has_its_outputs(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1)), "make notebooks"
    assert notebooks.machine_paths(text) == []


def written(folder: Path, *sources: str) -> Path:
    cells = [
        {"cell_type": "code", "execution_count": None, "id": f"c{n}", "metadata": {}, "outputs": [], "source": source}
        for n, source in enumerate(sources)
    ]
    path = folder / "notebook.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}), encoding="utf-8")
    return path


def test_outputs_are_stored(tmp_path: Path) -> None:
    path = written(tmp_path, "x = 1", "print(x + 1)")
    assert execute(path).returncode == 0
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    assert cells[1]["outputs"][0]["text"] == ["2\n"]
    before = path.read_bytes()
    assert execute(path).returncode == 0
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "source", ["1 / 0", "import warnings; warnings.warn('old')", "import os; print(os.getcwd() + '/x')"]
)
def test_a_notebook_that_raises_or_warns_or_prints_a_folder_is_found(source: str, tmp_path: Path) -> None:
    path = written(tmp_path, source)
    before = path.read_bytes()
    assert execute(path).returncode == 1
    assert path.read_bytes() == before
