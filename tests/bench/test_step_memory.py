"""`batchnorm bench --memory`: one step in a fresh process, all contenders, and what goes wrong."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from batchnorm import cli, words
from batchnorm.bench import conduct, memory, peak, table
from batchnorm.bench import record as records
from batchnorm.bench.conduct import Settings
from batchnorm.bench.models import Workload
from batchnorm.bench.networks import Model
from batchnorm.bench.record import BenchError


def call(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr("sys.argv", ["batchnorm", *arguments])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    return int(caught.value.code or 0)


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip


SHAPE = (32, 3, 64, 64)
TINY = {"tiny": Model(network, SHAPE, SHAPE, 5)}
TINY_STEP = Workload("tiny", "channels_last", SHAPE)
PROC = sys.platform == "linux"


def measure(contender: str = "stock", workload: Workload = TINY_STEP) -> dict[str, Any]:
    return peak.measure(workload, contender, seed=0, threads=torch.get_num_threads(), networks=TINY)


@pytest.mark.parametrize("contender", list(peak.CONTENDERS))
def test_one_step_of_each_contender(contender: str) -> None:
    found = measure(contender)
    activations = 32 * 16 * 64 * 64 * 4
    images = 32 * 3 * 64 * 64 * 4
    assert images + activations / 10 < found["kept"] < images + 2.1 * activations
    assert found["kept"] == sum(found["by_kind"].values())
    assert math.isfinite(found["loss"])


@pytest.mark.skipif(not PROC, reason="the resident size is read from /proc")
def test_the_peak_is_at_least_what_is_kept_and_not_the_size_of_the_process() -> None:
    torch.ones(1 << 28, dtype=torch.uint8)  # an earlier peak
    found = measure()
    assert found["kept"] <= found["peak"] < 10 * found["kept"] < 1 << 28


def test_without_a_resident_size_the_peak_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peak, "_PROCESS", tmp_path / "nowhere")
    found = measure()
    assert found["peak"] is None
    assert found["kept"] > 0


def test_what_does_not_fit_is_refused_before_it_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:       20480 kB\nMemAvailable:    10240 kB\n", encoding="ascii")
    monkeypatch.setattr(peak, "_MEMORY", tmp_path / "meminfo")
    with pytest.raises(BenchError, match=r"^forward keeps some 0\.0 GiB, and 0\.0 GiB are free$"):
        measure()


def test_every_contender_has_a_word_and_every_word_a_contender() -> None:
    assert list(peak.CONTENDERS) == list(words.STEPS)


def test_the_child_prints_numbers_or_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peak, "_PROCESS", tmp_path)  # this process is not the first that the system ends

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("\n no memory for this \nand a trace")

    options = {"workload": {"model": "tabular", "layout": "contiguous", "shape": [4, 100]}, "contender": "stock"}
    text = json.dumps({**options, "seed": 0, "threads": torch.get_num_threads()})
    assert peak.main(text)["kept"] > 0
    assert (tmp_path / "oom_score_adj").read_text(encoding="ascii") == "1000"
    monkeypatch.setattr(peak, "measure", fail)
    assert peak.main(text) == {"error": "no memory for this"}


def child(code: str) -> tuple[str, ...]:
    return (sys.executable, "-c", code)


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "the system ended the process: most likely"),
        ("raise SystemExit('no such thing')", "no such thing"),
        ("import os; os._exit(3)", "the process ended with status 3"),
        ("print('[1, 2')", "the process ended with status 0"),
        ("print('7')", "the process ended with status 0"),
    ],
)
def test_a_process_that_ends_without_a_result_has_a_reason(code: str, why: str) -> None:
    found = memory._in_fresh_process("{}", lambda: False, child(code))
    assert found["error"].startswith(why)


def test_freed_memory_returns_at_once_unless_the_user_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("MALLOC_"):
            monkeypatch.delenv(name)
    code = "import json, os; print(json.dumps({'threshold': os.environ['MALLOC_MMAP_THRESHOLD_']}))"
    assert memory._in_fresh_process("{}", lambda: False, child(code)) == {"threshold": "131072"}
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "7")
    assert memory._in_fresh_process("{}", lambda: False, child(code)) == {"threshold": "7"}


def test_ctrl_c_ends_the_process_at_once(tmp_path: Path) -> None:
    asked = iter([False, False, True])
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    begun = False

    def stop() -> bool:
        nonlocal begun
        begun = begun or (tmp_path / "pid").exists()
        return begun and next(asked)

    with pytest.raises(KeyboardInterrupt):
        memory._in_fresh_process("{}", stop, child(code))
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text()}").exists()


def test_names_of_networks() -> None:
    chosen = memory.workloads(["u-net 3-D", "tabular", "Tabular"], quick=True)
    assert [w.name for w in chosen] == ["U-Net 3-d channels_last_3d 1x1x16x16x16", "tabular contiguous 256x100"]
    assert [w.shape for w in memory.workloads(["tabular"], False, batch=7)] == [(7, 100)]
    assert [w.dtype for w in memory.workloads(["audio"], False, "cuda")] == ["bfloat16"]
    assert len(memory.workloads([], quick=False)) == 9
    with pytest.raises(BenchError, match="there is no network 'VGG': use MobileNetV2, ResNet-18, "):
        memory.workloads(["VGG"], quick=True)


def test_each_contender_has_numbers_or_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(text: str, stop: object) -> dict[str, Any]:
        name = json.loads(text)["contender"]
        return {"error": "too large"} if name == "ours" else {"kept": 3, "by_kind": {}, "peak": None, "loss": 1.0}

    monkeypatch.setattr(memory, "_in_fresh_process", run)
    found = memory.measure(TINY_STEP, seed=0, threads=1)
    assert found["failed"] == {"ours": "too large"}
    assert set(found["contenders"]) == set(peak.CONTENDERS) - {"ours"}
    assert (found["model"], found["shape"]) == ("tiny", list(SHAPE))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)  # it would hold for all tests that follow
    return tmp_path


@pytest.mark.slow
def test_the_command_measures_a_network(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--memory", "tabular", "--batch", "64", "--out", "result.json", "--html", "page.html"]
    assert call(monkeypatch, "bench", *arguments) == 0
    printed = capsys.readouterr()
    assert "1 of 1: tabular contiguous 64x100\n" in printed.err
    assert "What forward keeps, MiB" in printed.out
    assert "report  page.html" in printed.out
    stored = records.load(here / "result.json")
    assert set(stored["memory"][0]["contenders"]) == set(peak.CONTENDERS)
    assert stored["command"] == "batchnorm bench --memory tabular --batch 64"
    assert stored["allocator"] == records.active_policy()
    assert "<svg" in (here / "page.html").read_text(encoding="utf-8")
    assert call(monkeypatch, "bench", "--render", "result.json", "--html", "page.html", "--force") == 0
    assert "| tabular 64x100 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tabular"], "MODEL is for --memory"),
        (["--batch", "3"], "--batch is for --memory"),
        (["--memory", "--models"], "--memory and --models exclude each other"),
        (["--memory", "--batch", "0"], "--batch must be at least 1, got 0"),
        (["--memory", "VGG"], "there is no network 'VGG'"),
        (["--memory", "tabular", "--filter", "audio"], "no case matches --filter audio"),
        (["--html", "page.html"], "--html is for --memory"),
        (["--memory", "--allocator", "tuned"], "--allocator is for times"),
    ],
    ids=" ".join,
)
def test_a_mistake_in_the_options_of_memory_gets_one_line(
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    said: str,
) -> None:
    assert call(monkeypatch, "bench", *arguments) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert said in printed.err
    assert list(here.iterdir()) == []


def test_a_page_that_exists_is_replaced_only_by_force(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "page.html").write_text("mine", encoding="utf-8")
    assert call(monkeypatch, "bench", "--memory", "tabular", "--html", "page.html") == 2
    assert "page.html exists" in capsys.readouterr().err
    assert (here / "page.html").read_text(encoding="utf-8") == "mine"


def test_a_record_of_times_has_no_page_of_memory(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made = records.begin(["bench"], {"threads": 1})
    del made["memory"]  # as older versions stored it
    records.store(made, here / "times.json")
    assert call(monkeypatch, "bench", "--render", "times.json", "--html", "page.html") == 2
    assert "the record has no memory of steps" in capsys.readouterr().err


def test_an_interrupted_measurement_keeps_the_networks_that_are_done(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(workload: Workload, **options: Any) -> dict[str, Any]:
        if workload.model == "audio":
            signal.raise_signal(signal.SIGINT)
            assert options["stop"]()
            raise KeyboardInterrupt
        return entry("tabular")

    monkeypatch.setattr(memory, "measure", run)
    record, path = conduct.conduct(Settings(memory=True, networks=("tabular", "audio")), here / "result.json")
    assert record["status"] == "interrupted"
    assert [one["model"] for one in records.load(path)["memory"]] == ["tabular"]


def entry(model: str, **failed: str) -> dict[str, Any]:
    """An entry of a record, in which each contender keeps a little more than the last."""
    contenders = {
        name: {
            "kept": (100 + 10 * place) << 20,
            "by_kind": {"norm": (60 + 10 * place) << 20, "mask": 40 << 20},
            "peak": (200 + place) << 20,
            "loss": 1.5,
        }
        for place, name in enumerate(peak.CONTENDERS)
        if name not in failed
    }
    step = {"layout": "channels_last", "shape": [2, 3, 8, 8], "dtype": "float32", "device": "cpu"}
    return {"model": model, **step, "contenders": contenders, "failed": failed}


def test_a_loss_that_is_another_is_red() -> None:
    record = records.begin(["bench", "--memory"], {"threads": 1})
    record["memory"] = [entry("one")]
    assert table.red(record) == []
    record["memory"][0]["contenders"]["lean"]["loss"] = 1.6
    assert table.red(record) == ["one channels_last 2x3x8x8: the loss of lean is 1.6, that of ours 1.5"]
    record["memory"][0]["contenders"]["lean"]["loss"] = math.nan
    assert len(table.red(record)) == 1


def test_the_tables_of_memory() -> None:
    record = records.begin(["bench", "--memory"], {"threads": 1}) | {"status": "complete"}
    record["memory"] = [entry("one"), entry("two", ours="too large")]
    kept, peaks = table.tables(record)
    assert kept.columns == ("network", *peak.CONTENDERS)
    assert [row[:3] for row in kept.rows] == [
        ("one channels_last 2x3x8x8", "100", "110"),
        ("two channels_last 2x3x8x8", "100", "–"),
    ]
    assert [row[1] for row in peaks.rows] == ["200", "200"]
    assert table.notes(record) == ["two channels_last 2x3x8x8: ours was not measured: too large"]
    assert "VmHWM" not in table.MEMORY_NOTE
    for one in record["memory"]:
        for found in one["contenders"].values():
            found["peak"] = None
    assert [shown.title for shown in table.tables(record)] == ["What forward keeps, MiB"]
