"""What a batch norm is and what feeds it, in a few words."""

from __future__ import annotations

from pathlib import Path

import pytest
from watched import Made, log_spaced, watched

from batchnorm.report.watch.numbers import LayerReading, read


def layer(folder: Path, name: str, kind: str, parameter: str) -> LayerReading:
    made = Made(name, 2, facts={"class": kind, "producer": parameter})
    return read(watched(folder / "run", [made], steps=log_spaced(50, 3))).layers[0]


@pytest.mark.parametrize(
    ("parameter", "module"),
    [
        ("conv1.weight", "conv1"),
        ("layer1.0.conv1.weight", "layer1.0.conv1"),
        ("weight", ""),
        ("", ""),
        ("a.conv.parametrizations.weight.original0", "a.conv"),
    ],
)
def test_the_module_of_a_parameter(tmp_path: Path, parameter: str, module: str) -> None:
    assert layer(tmp_path, "bn", "", parameter).producer == module


@pytest.mark.parametrize(
    ("name", "kind", "parameter", "words"),
    [
        ("layer1.0.bn1", "BatchNorm2d", "layer1.0.conv1.weight", "BN2d on conv1"),
        ("layer1.0.bn1", "BatchNorm2d", "stem.conv.weight", "BN2d on stem.conv"),
        ("1", "BatchNorm1d", "0.weight", "BN1d on 0"),
        ("bn", "SyncBatchNorm", "", "SyncBN"),
        ("bn", "", "conv.weight", "on conv"),
        ("bn", "", "", ""),
    ],
)
def test_brief(tmp_path: Path, name: str, kind: str, parameter: str, words: str) -> None:
    assert layer(tmp_path, name, kind, parameter).brief == words
