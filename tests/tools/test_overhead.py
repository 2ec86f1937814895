"""The cost of recording is measured on networks that train alike."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from torch import nn

import overhead
from batchnorm.bench import networks


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object, **__: object):
        return lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 1000)
        )

    monkeypatch.setattr(networks, "from_transformers", build)


@pytest.mark.slow
def test_watched_networks_train_as_the_others_and_are_timed_beside_them() -> None:
    found = overhead.measure(30, batch=4, side=8)
    assert found["loss_difference"] < 1e-5
    assert found["rounds"] == 30
    for name in ("again", "default", "every step"):
        assert found[name]["ratio"]["q1"] <= found[name]["ratio"]["median"] <= found[name]["ratio"]["q3"]
    parts = [found["default"][name]["steps"] for name in ("recorded", "not_recorded")]
    assert parts == [28, 2], "steps 2 to 31, of which 24 and 29 are not recorded"


@pytest.mark.slow
def test_the_command_prints_and_stores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overhead, "restart_with_policy", lambda policy: None)
    overhead.main(["--rounds", "5", "--out", str(tmp_path / "found.json")])
    printed = capsys.readouterr().out
    assert "every step" in printed
    stored = json.loads((tmp_path / "found.json").read_text())
    assert stored["command"] == "python tools/overhead.py --rounds 5 --stem 7"
    assert stored["overhead"]["every step"]["ratio"]["median"] > 0
