"""What runs on a GPU machine, tested with a stand-in: the steps, their order, what is stored, and no GPU at all."""

from __future__ import annotations

import json
from collections import deque
from pathlib import Path

import pytest
import torch

import gpu
from batchnorm.bench import conduct, timing
from batchnorm.bench.cases import SETS
from batchnorm.bench.conduct import Settings
from batchnorm.bench.record import BenchError

FACTS = {"name": "Some GPU 80GB", "processors": 132, "memory": 1, "L2": 50 << 20, "cuda": "13.0", "hip": None}


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that has one, and an empty checkout."""
    monkeypatch.setattr(timing, "why_no_device", lambda name: None)
    monkeypatch.setattr(timing, "gpu_facts", lambda name: FACTS)
    monkeypatch.setattr(gpu, "_HOME", tmp_path)
    for name in gpu._TESTS:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


def test_all_steps_are_run_and_stored_with_the_gpus_name(a_gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--quick"], run=lambda step: (0, f"from {a_gpu}/x")) == 0
    (stored,) = (a_gpu / "benchmarks").iterdir()
    assert stored.name.endswith("-some-gpu-80gb-checks.json")
    result = json.loads(stored.read_text())
    assert result["gpu"] == FACTS
    assert [step["name"] for step in result["steps"]] == ["contract", *gpu.TOOLS, *gpu.TIMED]
    assert result["steps"][-4]["command"][-3:] == ["cuda", "--compile", "--quick"]
    assert str(a_gpu) not in stored.read_text()
    assert "racecheck: green" in capsys.readouterr().out


def test_without_a_green_contract_nothing_is_timed(a_gpu: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ran = []
    assert gpu.main([], run=lambda step: ran.append(step.name) or (int(step.name == "contract"), "")) == 1
    assert ran == ["contract", *gpu.TOOLS]
    assert "bench: not run" in capsys.readouterr().out


def test_a_sanitizer_that_finds_something_is_status_1(a_gpu: Path) -> None:
    assert gpu.main([], run=lambda step: (86 if step.name == "memcheck" else 0, "")) == 1


def test_some_of_the_steps_can_be_had(a_gpu: Path) -> None:
    ran = []
    assert gpu.main(["--only", "bench", "tune"], run=lambda step: ran.append(step) or (0, "")) == 0
    assert [step.name for step in ran] == ["bench", "tune"]
    with pytest.raises(SystemExit):
        gpu.main(["--only", "speed"])


def test_a_missing_program_is_reported() -> None:
    status, output = gpu.run(gpu.Step("memcheck", ["no-such-program"]))
    assert status == 127
    assert "no-such-program is not installed" in output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main([], run=lambda step: pytest.fail("ran")) == 2
    assert "sees no GPU here" in capsys.readouterr().out
    with pytest.raises(BenchError, match=r"device='cuda': PyTorch .* sees no GPU here"):
        conduct.check(Settings(device="cuda"))


def test_the_tests_that_are_named_exist() -> None:
    home = Path(__file__).parents[2]
    assert all((home / name).exists() for name in gpu._TESTS)
    text = "".join((home / name).read_text() for name in gpu._TESTS)
    assert all(part in text for part in gpu._SANITIZED.split(" or "))


def test_an_unknown_device_is_one_line() -> None:
    with pytest.raises(BenchError, match="unknown device='tpu': use cpu or cuda"):
        conduct.check(Settings(device="tpu"))


def test_gpu_cases_are_of_resnet_50_in_both_layouts_and_types(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "why_no_device", lambda name: None)
    chosen = conduct.chosen_cases(Settings(device="cuda"))
    assert chosen == SETS["cuda"]["default"]
    assert {(case.layout, case.dtype, case.variant) for case in chosen} == {
        (layout, dtype, variant)
        for layout in ("contiguous", "channels_last")
        for dtype in ("bfloat16", "float32")
        for variant in ("bn", "bn+relu", "bn+add+relu")
    }
    workloads = conduct.chosen_cases(Settings(device="cuda", models=True))
    assert [workload.name for workload in workloads] == [
        "ResNet-50 channels_last bfloat16 256x3x224x224",
        "MobileNetV2 channels_last bfloat16 256x3x224x224",
    ]
    assert set(SETS["cuda"]["quick"]) <= set(SETS["cuda"]["default"]) <= set(SETS["cuda"]["full"])
    assert len(set(SETS["cuda"]["full"])) == len(SETS["cuda"]["full"])


def test_marks_are_read_after_the_calls_of_a_sample() -> None:
    """To take a difference waits for the device; between the calls of a sample nobody waits."""
    log = []

    class Moment:
        def __init__(self) -> None:
            log.append("mark")

        def __sub__(self, other: object) -> int:
            log.append("wait")
            return 1000

    class Nothing:
        def forward(self) -> None:
            return None

        def backward(self, y: None) -> None:
            return None

    forward, backward = timing._sample(Nothing(), 3, Moment, lambda contender: log.append("before"), deque(maxlen=0))
    assert log == ["before", "mark", "mark", "mark"] * 3 + ["wait"] * 6
    assert (forward, backward) == pytest.approx((1e-6, 1e-6))
