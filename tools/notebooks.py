"""Run the tutorials from top to bottom and store their outputs: python tools/notebooks.py [--check] [NOTEBOOK ...].

A cell that raises or warns ends it with exit status 1. With --check nothing is stored. Each notebook runs in an empty
folder, with one thread.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

TUTORIALS = Path(__file__).resolve().parents[1] / "docs" / "tutorials"
SECONDS = 300
"""For one cell."""


def executed(path: Path, folder: Path) -> Any:
    """The notebook with new outputs. Raises nbclient.exceptions.CellExecutionError."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
    client = NotebookClient(
        notebook,
        timeout=SECONDS,
        kernel_name="python3",
        record_timing=False,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute()
    # Only what every machine writes alike: the versions of Python and of the kernel are left out.
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return notebook


def machine_paths(text: str) -> list[str]:
    """The folders of this machine that a stored notebook names."""
    return [path for path in (str(Path.home()), str(TUTORIALS.parents[1]), tempfile.gettempdir()) if f"{path}/" in text]


def main() -> int:
    """Run the notebooks."""
    import nbformat
    from nbclient.exceptions import CellExecutionError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="store nothing")
    parser.add_argument("notebooks", nargs="*", type=Path, default=sorted(TUTORIALS.glob("*.ipynb")))
    given = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    os.environ["PYTHONWARNINGS"] = "error:::__main__"  # the kernel's libraries have warnings that are not a notebook's
    failed = False
    for path in given.notebooks:
        with tempfile.TemporaryDirectory() as folder:
            try:
                notebook = executed(path, Path(folder))
            except CellExecutionError as error:
                print(f"{path}: {error}", file=sys.stderr)
                failed = True
                continue
        text = nbformat.writes(notebook)
        private = machine_paths(text)
        if private:
            print(f"{path}: an output has a path of this machine: {', '.join(private)}", file=sys.stderr)
            failed = True
        elif not given.check:
            path.write_text(f"{text.rstrip()}\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
