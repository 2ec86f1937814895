"""What a batch norm is and what feeds it, in a few words."""

from __future__ import annotations

import pytest

from batchnorm.report.watch.rows import brief, module_of


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
def test_the_module_of_a_parameter(parameter: str, module: str) -> None:
    assert module_of(parameter) == module


@pytest.mark.parametrize(
    ("name", "kind", "producer", "words"),
    [
        ("layer1.0.bn1", "BatchNorm2d", "layer1.0.conv1", "BN2d on conv1"),
        ("layer1.0.bn1", "BatchNorm2d", "stem.conv", "BN2d on stem.conv"),
        ("1", "BatchNorm1d", "0", "BN1d on 0"),
        ("bn", "SyncBatchNorm", "", "SyncBN"),
        ("bn", "", "conv", "on conv"),
        ("bn", "", "", ""),
    ],
)
def test_brief(name: str, kind: str, producer: str, words: str) -> None:
    assert brief(name, kind, producer) == words
