"""How many files of the package a reader must open to follow what users do: counted while it runs.

Imports are done before, so that files count whose functions run, and not those whose classes are only defined.
`python tests/test_journeys.py` prints each journey as file: functions, in the order of their first call.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import pytest
import torch
from torch import nn

import batchnorm as bn

PACKAGE = Path(bn.__file__).parent


def journey(run: Callable[[], object]) -> dict[str, list[str]]:
    """The files of the package that `run` executes, each with the functions called there, in order."""
    files: dict[str, list[str]] = {}

    def note(frame: FrameType, event: str, _: object) -> None:
        name = frame.f_code.co_filename
        if event != "call" or not name.startswith(str(PACKAGE)):
            return
        functions = files.setdefault(str(Path(name).relative_to(PACKAGE)), [])
        function = frame.f_code.co_qualname
        if "<" not in function.rpartition(".")[2] and function not in functions:
            functions.append(function)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return {name: functions for name, functions in files.items() if functions}


class Block(nn.Module):
    """A forward of its own, which `convert` rewrites."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(32, 32, 3, padding=1), nn.BatchNorm2d(32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.norm(self.conv(x)) + x)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), Block(), nn.Flatten())


def training_step() -> dict[str, list[str]]:
    """Warm: a forward and a backward of a layer that the CPU kernels run."""
    layer, x = bn.BatchNorm2d(32, act="relu"), torch.randn(16, 32, 64, 64, requires_grad=True)
    layer(x).sum().backward()
    return journey(lambda: layer(x).sum().backward())


def watch_to_page() -> dict[str, list[str]]:
    """Warm: a model's training of two steps recorded, and its page. Files of a training step by itself do not count."""

    watch, every, render, open_run, layer = bn.watch, bn.every, bn.report.render, bn.Run, bn.BatchNorm2d
    model = nn.Sequential(nn.Conv2d(3, 32, 3), layer(32, act="relu"), nn.Flatten())

    def run() -> None:
        with tempfile.TemporaryDirectory() as folder:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            with watch(model, Path(folder) / "run", schedule=every(1)) as recorded:
                for _ in range(2):
                    loss = model(torch.randn(4, 3, 8, 8)).sum()
                    loss.backward()
                    optimizer.step()
                    optimizer.zero_grad()
                    recorded.log(loss=loss)
            render(open_run(Path(folder) / "run"))

    run()  # class bodies and module-level code run once, at import
    step = training_step()
    return {name: functions for name, functions in journey(run).items() if name not in step}


def converting() -> dict[str, list[str]]:
    """Warm."""
    convert = bn.convert
    convert(network())
    model = network()
    return journey(lambda: convert(model))


def folding() -> dict[str, list[str]]:
    """Warm."""
    fold, example = bn.fold, torch.randn(2, 3, 8, 8)
    fold(network().eval(), example)
    model = network().eval()
    return journey(lambda: fold(model, example))


def checking() -> dict[str, list[str]]:
    """Warm: a checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file.pt"
        torch.save(network().state_dict(), path)
        bn.check(path)
        return journey(lambda: bn.check(path))


JOURNEYS: dict[str, tuple[Callable[[], dict[str, list[str]]], int]] = {
    "training step": (training_step, 9),
    "watch to page": (watch_to_page, 22),
    "convert": (converting, 9),
    "check a file": (checking, 12),
    "fold": (folding, 10),
}


@pytest.mark.parametrize("name", JOURNEYS)
def test_a_journey_passes_few_files(name: str) -> None:
    walk, most = JOURNEYS[name]
    files = walk()
    assert files, "the journey must be seen"
    assert len(files) <= most, "\n".join(files)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name, (walk, most) in JOURNEYS.items():
        files = walk()
        print(f"{name}: {len(files)} files, at most {most}")
        for file, functions in files.items():
            print(f"  {file}: {', '.join(functions[:6])}{' ...' if len(functions) > 6 else ''}")
