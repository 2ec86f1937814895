"""Make the pages of docs/gallery and their pictures: python tools/gallery.py [--data-dir FOLDER] [--work FOLDER].

The commands and the program are those of docs/gallery/index.md. FOLDER has mnist/ (the four .gz files as published) and
cifar10/resnet20-12fca82f.th of akamaster/pytorch_resnet_cifar10; without it, the pages of these stay what they are.
Runs that --work already has are used again. Pictures need chromium and Pillow.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GALLERY = ROOT / "docs" / "gallery"
INDEX = GALLERY / "index.md"
PAGES = {
    "study-digits.html": "study-digits/report.html",
    "study-mnist.html": "study-mnist/report.html",
    "went-wrong.html": "went-wrong.html",
    "check-resnet20.html": "check-resnet20.html",
}
"""The page in docs/gallery, and where the commands leave it."""
NEEDS_DATA = {"study-mnist.html", "check-resnet20.html"}
WIDTH, HEIGHT = 1200, 900
HEIGHTS = {"study-digits.html": 490, "went-wrong.html": 1300}  # the answer alone; with the findings
PICTURES = {page: Path(page).stem + ".png" for page in PAGES} | {"study-digits.html": "answer.png"}  # README shows it
LARGEST = 6 << 20
"""Bytes of all pages and pictures."""


def commands(index: str) -> list[str]:
    """The lines of the blocks for a shell, in order."""
    blocks = re.findall(r"^```(?:console|sh)\n(.*?)^```", index, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def program(index: str) -> str:
    """The Python block, which the page saves as wrong.py."""
    (block,) = re.findall(r"^```python\n(.*?)^```", index, re.DOTALL | re.MULTILINE)
    return str(block)


def conduct(work: Path, data: Path | None) -> None:
    """Run the program and the commands in the folder `work`."""
    index = INDEX.read_text(encoding="utf-8")
    (work / "wrong.py").write_text(program(index), encoding="utf-8")
    if data is not None:
        for name, source in (
            ("mnist", data / "mnist"),
            ("resnet20-12fca82f.th", data / "cifar10/resnet20-12fca82f.th"),
        ):
            if not (work / name).exists():
                (work / name).symlink_to(source.resolve())
    python = {"python": [sys.executable, "-W", "error"], "batchnorm": [sys.executable, "-m", "batchnorm"]}
    environment = os.environ | {"COLUMNS": "100"}
    for line in commands(index):
        name, *arguments = shlex.split(line)
        run = arguments[arguments.index("--out") + 1] if arguments[0] == "study" else None
        if run and is_complete(work / run):
            arguments = ["report", run]
        elif data is None and ("mnist" in arguments or "resnet20-12fca82f.th" in arguments):
            continue
        print(f"$ {line}", flush=True)
        if arguments[0] == "check":
            arguments.append("--force")
        subprocess.run([*python[name], *arguments], cwd=work, check=True, env=environment, stdout=subprocess.DEVNULL)


def is_complete(run: Path) -> bool:
    """Whether a folder has a study that ended."""
    info = run / "run.json"
    return info.is_file() and json.loads(info.read_text(encoding="utf-8"))["status"] == "complete"


def collect(work: Path, data: Path | None) -> None:
    """Copy the pages, and refuse one that is too large or names a folder of this machine."""
    for name, source in PAGES.items():
        if data is None and name in NEEDS_DATA:
            continue
        text = (work / source).read_text(encoding="utf-8")
        for private in {str(work), str(ROOT), str(Path.home()), *([str(data)] if data else [])} - {"/"}:
            if private in text:
                raise SystemExit(f"{name} has a path of this machine: {private}")
        (GALLERY / name).write_text(text, encoding="utf-8")
        photograph(GALLERY / name)
    size = sum(file.stat().st_size for file in GALLERY.iterdir())
    if size > LARGEST:
        raise SystemExit(f"the gallery has {size:,} bytes, more than {LARGEST:,}: take smaller settings")


def photograph(page: Path) -> None:
    """The first screen of a page as a PNG of 256 colours."""
    from PIL import Image

    browser = next(
        (found for each in ("chromium", "chromium-browser", "google-chrome") if (found := shutil.which(each))), None
    )
    if browser is None:
        raise SystemExit("chromium is not installed")
    with tempfile.TemporaryDirectory() as folder:
        shot = Path(folder) / "shot.png"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--virtual-time-budget=20000"]
        options += [
            f"--user-data-dir={folder}",
            "--blink-settings=preferredColorScheme=1",
            f"--window-size={WIDTH},{HEIGHTS.get(page.name, HEIGHT)}",
        ]
        subprocess.run(
            [browser, *options, f"--screenshot={shot}", page.as_uri()],
            check=True,
            capture_output=True,
        )
        picture = Image.open(io.BytesIO(shot.read_bytes())).convert("RGB")
    picture.quantize(256, dither=Image.Dither.NONE).save(page.with_name(PICTURES[page.name]), optimize=True)


def main() -> None:
    """Make all pages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data-dir", type=Path, help="the folder with mnist/ and cifar10/")
    parser.add_argument("--work", type=Path, help="where to run the commands; Runs that are there are used again")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = (given.work or Path(folder)).resolve()
        work.mkdir(parents=True, exist_ok=True)
        conduct(work, given.data_dir)
        collect(work, given.data_dir)


if __name__ == "__main__":
    main()
