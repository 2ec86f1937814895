"""Execute the tutorials and store their outputs: `python tools/notebooks.py [NAME ...]`, all by default.

Each notebook runs from its first cell to its last in an empty folder, with warnings as errors. What differs between two
executions without meaning is normalized: metadata, cell ids, counts and the pieces in which a stream arrives. A
notebook is written only if every cell ran.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

FOLDER = Path(__file__).parents[1] / "docs" / "tutorials"
SECONDS = 300
"""For a cell. A notebook takes seconds; a machine may be busy."""
SETUP = """import warnings

warnings.simplefilter("error")
warnings.filterwarnings("ignore", category=PendingDeprecationWarning, module="ipykernel")"""
"""Runs before the first cell, and is not stored."""
ENVIRONMENT = {"JUPYTER_COLUMNS": "100", "OMP_NUM_THREADS": "1"}
"""The width of text. One thread: these tensors are small, and sums are added in the same order each time."""
ABSOLUTE_PATH = re.compile(r"(?<![\w./<])/(?:home|root|tmp|work|usr|opt|var|mnt|Users|private)/|[A-Z]:\\\\")
Notebook = Any
"""nbformat.NotebookNode, a dict with attributes."""


def read(path: Path) -> Notebook:
    """The notebook in a file, as the current version of the format."""
    return nbformat.read(path, as_version=4)


def executed(notebook: Notebook, folder: Path) -> Notebook:
    """A copy of `notebook` with the outputs of a run of all cells in `folder`.

    Raises nbclient's CellExecutionError for the first cell that raises, or that emits a warning.
    """
    copy = nbformat.from_dict(notebook)
    copy.cells = [nbformat.v4.new_code_cell(SETUP), *copy.cells]
    copy.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    client = NotebookClient(copy, timeout=SECONDS, kernel_name="python3", resources={"metadata": {"path": str(folder)}})
    with tempfile.TemporaryDirectory() as sockets:
        manager = client.create_kernel_manager()
        if os.name == "posix":  # sockets that only this user opens, not ports
            manager.transport, manager.ip = "ipc", f"{sockets}/kernel"
        client.execute(env={**os.environ, **ENVIRONMENT})
    del copy.cells[0]
    return normalized(copy)


def normalized(notebook: Notebook) -> Notebook:
    """The same notebook, in place, without what changes from one execution to the next."""
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    count = 0
    for number, cell in enumerate(notebook.cells, 1):
        cell.id = f"cell-{number:02d}"
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        if cell.cell_type != "code":
            continue
        count += 1
        cell.execution_count = count
        cell.outputs = joined(cell.outputs)
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = count
            if "metadata" in output:
                output.metadata = {}
    return nbformat.from_dict(notebook)


def joined(outputs: list[Any]) -> list[Any]:
    """Outputs in which consecutive texts of one stream are one output."""
    kept: list[Any] = []
    for output in outputs:
        if output.output_type == "stream" and kept and kept[-1].get("name") == output.name:
            kept[-1].text += output.text
        else:
            kept.append(output)
    return kept


def text_of(output: Any) -> str:
    """What an output says as text; of a picture or a page without text, its source."""
    if output.output_type == "stream":
        return str(output.text)
    if output.output_type == "error":
        return "\n".join((output.ename, output.evalue, *output.traceback))
    return "\n".join(str(value) for kind, value in output.data.items() if not kind.startswith("image/"))


def faults(notebook: Notebook) -> list[str]:
    """Why a notebook cannot be published: errors, warnings, paths of a machine, cells that were not executed."""
    found = []
    for number, cell in enumerate(notebook.cells, 1):
        if cell.cell_type != "code":
            continue
        if cell.execution_count is None:
            found.append(f"cell {number} was not executed")
        if prints(cell.source) and not cell.outputs:
            found.append(f"cell {number} prints, and has no stored output")
        for output in cell.outputs:
            if output.output_type == "error":
                found.append(f"cell {number} has an error: {output.ename}")
            if output.output_type == "stream" and output.name == "stderr":
                found.append(f"cell {number} has a text on stderr: {output.text.strip()[:80]}")
            if path := ABSOLUTE_PATH.search(text_of(output)):
                found.append(f"cell {number} has a path of a machine: {path[0]}")
    return found


def prints(source: str) -> bool:
    """Whether a cell calls print or report.show outside the functions that it defines; not if it is a magic's text."""
    if source.startswith("%%"):
        return False
    statements = [node for node in ast.parse(source).body if not isinstance(node, ast.FunctionDef | ast.ClassDef)]
    calls = [node.func for statement in statements for node in ast.walk(statement) if isinstance(node, ast.Call)]
    return any(ast.unparse(call) in ("print", "bn.report.show") for call in calls)


def main() -> int:
    """Execute the named notebooks, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="such as healthy; all by default")
    names = parser.parse_args().names
    status = 0
    for path in [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb")):
        began = time.monotonic()
        try:
            with tempfile.TemporaryDirectory() as folder:
                notebook = executed(read(path), Path(folder))
            wrong = faults(notebook)
        except CellExecutionError as error:
            wrong = [f"{error.ename}: {error.evalue}"]
        if wrong:
            print(f"{path.name} is not written:", *wrong, sep="\n  ")
            status = 1
            continue
        nbformat.write(notebook, path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB, {time.monotonic() - began:.0f} s")
    return status


if __name__ == "__main__":
    sys.exit(main())
