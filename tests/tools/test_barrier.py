"""tools/barrier.py: units are matched, the curves have their ends, and the picture is written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import barrier
from batchnorm.study.data import load
from randomness import SEED


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WIDTH", 24), ("DEPTH", 2), ("MEASURED", 400)):
        monkeypatch.setattr(barrier, name, value)


@pytest.mark.parametrize("norm", [False, True])
def test_matching_finds_a_permutation_and_leaves_the_function(norm: bool) -> None:
    torch.manual_seed(SEED)
    one, other = (barrier.network(8, norm).eval() for _ in range(2))
    other.load_state_dict(one.state_dict())
    order = torch.randperm(24)
    layers = [layer for layer in other if not isinstance(layer, nn.ReLU)]
    with torch.no_grad():
        for layer in layers[: 2 if norm else 1]:
            for tensor in (t for t in layer.state_dict().values() if t.dim()):
                tensor.copy_(tensor[order].clone())
        following = layers[2 if norm else 1]
        following.weight.copy_(following.weight[:, order].clone())
    x = torch.randn(300, 8)
    torch.testing.assert_close(other(x), one(x))
    assert not torch.equal(other[0].weight, one[0].weight)
    found = barrier.matched(one, other, x)
    torch.testing.assert_close(found.state_dict(), one.state_dict())
    torch.testing.assert_close(other(x), one(x))


def test_the_ends_of_each_curve_are_the_networks() -> None:
    data = load("digits")
    ends = [barrier.train(data, False, seed, epochs=2) for seed in (1, 2)]
    rows = list(barrier.curves(*ends, data, 3, False))
    assert [(line, share) for line, share, _ in rows] == [
        (line, share) for share in (0.0, 0.5, 1.0) for line in ("interpolated", "repaired")
    ]
    expected = [barrier.accuracy(end, data) for end in ends]
    assert [value for line, share, value in rows if line == "interpolated" and share != 0.5] == expected


def test_the_picture_and_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "barrier.png"
    barrier.main(["--out", str(out), "--points", "2", "--epochs", "1"])
    assert out.read_bytes().startswith(b"\x89PNG")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * 2 + 2 * 3
    assert lines[2].startswith("| without batch norm | units as trained | interpolated | ")


def test_a_folder_without_the_files(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="has no file train-images"):
        barrier.main(["--data-dir", str(tmp_path), "--out", str(tmp_path / "x.png")])
