"""The command as a user runs it: what it stores and prints, what stops it, and one line for every mistake."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time

import pytest

from batchnorm.bench import cases, conduct, contenders, table
from batchnorm.bench.conduct import Settings
from batchnorm.bench.record import BenchError
from batchnorm.cli import main

SMALL = ["bench", "--filter", "60x100 bn float32", "--repeats", "3", "--threads", "1"]
BENCH = [sys.executable, "-m", "batchnorm", "bench"]


def call(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["batchnorm", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    return caught.value.code


@pytest.fixture
def here(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)  # it would hold for all tests that follow
    return tmp_path


@pytest.mark.slow
def test_a_run_is_stored_printed_and_rendered(here, monkeypatch, capsys):
    assert call(monkeypatch, *SMALL, "--allocator", "default", "--out", "result.json") == 0
    printed = capsys.readouterr().out
    assert "bn, float32, training" in printed
    assert "result  result.json" in printed
    stored = json.loads((here / "result.json").read_text(encoding="utf-8"))
    assert stored["status"] == "complete"
    assert [result["name"] for result in stored["results"]] == ["60x100 rows float32 bn train"]
    (result,) = stored["results"]
    assert {"ours", "eager", "floor"} <= set(result["contenders"])
    assert result["contenders"]["ours"]["rounds"] == 3
    assert result["floors"]["whole"]["q1"] <= result["floors"]["whole"]["q3"]
    assert call(monkeypatch, "bench", "--render", "result.json") == 0
    assert capsys.readouterr().out == table.markdown(stored) + "\n"


@pytest.mark.slow
def test_json_is_the_stored_record_and_nothing_else(here, monkeypatch, capsys):
    assert call(monkeypatch, *SMALL, "--allocator", "default", "--json", "--out", "result.json") == 0
    record = json.loads(capsys.readouterr().out)
    assert record == json.loads((here / "result.json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_the_program_starts_anew_under_the_tuned_policy(tmp_path):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    out = str(tmp_path / "result.json")
    arguments = [*BENCH, *SMALL[1:], "--out", out, "--json"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["command"] == shlex.join(["batchnorm", *SMALL, "--json"])
    if sys.platform == "linux":
        assert record["allocator"] == "tuned"
        assert record["environment"]["MALLOC_MMAP_THRESHOLD_"] == "4294967296"
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(tmp_path):
    out = tmp_path / "result.json"
    arguments = [*BENCH, "--filter", "60x100 train", "--full", "--repeats", "300", "--threads", "1", "--out", str(out)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (out.exists() and json.loads(out.read_text())["results"]):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    printed, error = process.communicate(timeout=60)
    assert process.returncode == 130, error
    stored = json.loads(out.read_text(encoding="utf-8"))
    assert stored["status"] == "interrupted"
    assert 1 <= len(stored["results"]) < 8
    assert "60x100" in printed
    assert "Traceback" not in error


@pytest.mark.slow
def test_a_red_gate_is_exit_status_1(here, monkeypatch, capsys):
    monkeypatch.setattr("batchnorm.bench.conduct.errors", lambda *_: ["y: error 1.0e+00"])
    assert call(monkeypatch, *SMALL, "--allocator", "default", "--out", "result.json") == 1
    printed = capsys.readouterr().out
    assert "60x100 rows float32 bn train: y: error 1.0e+00" in printed
    assert "floor" not in printed.partition("Times are")[0]


def test_a_failure_leaves_a_record_that_says_so(here, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("broken")

    monkeypatch.setattr(conduct, "measure", fail)
    with pytest.raises(RuntimeError, match="broken"):
        conduct.conduct(Settings(filter="60x100 bn"), here / "result.json")
    assert json.loads((here / "result.json").read_text(encoding="utf-8"))["status"] == "failed"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--repeats", "-1"], "--repeats must be at least 1, got -1"),
        (["--filter", "resnet"], "no case matches --filter resnet"),
        (["--filter", "65536x256 bfloat16 eval"], "--full has 4 that do"),
        (["--models", "--filter", "VGG"], "no case matches --filter 'VGG'"),
        (["--quick", "--full"], "--quick and --full exclude each other"),
        (["--allocator", "jemalloc"], "use tuned or default"),
        (["--render", "nowhere.json"], "cannot read nowhere.json"),
        (["--bogus"], "--bogus"),
    ],
    ids=" ".join,
)
def test_a_mistake_gets_one_line(here, monkeypatch, capsys, arguments, words):
    monkeypatch.setattr("os.execve", lambda *_: pytest.fail("started anew"))
    assert call(monkeypatch, "bench", *(arguments if isinstance(arguments, list) else [])) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("batchnorm: error: ")
    assert printed.err.count("\n") == 1
    assert words in printed.err
    assert list(here.iterdir()) == []


def test_an_existing_file_is_found_before_anything_is_measured(here, monkeypatch, capsys):
    (here / "result.json").write_text("years of work", encoding="utf-8")
    monkeypatch.setattr(conduct, "measure", lambda *_: pytest.fail("measured first"))
    for more in ([], ["--force"]):
        assert call(monkeypatch, *SMALL, "--out", "result.json", *more) == 2
        assert "result.json" in capsys.readouterr().err
    assert (here / "result.json").read_text(encoding="utf-8") == "years of work"


def test_compile_without_a_compiler_is_one_line(here, monkeypatch):
    monkeypatch.setattr(
        "batchnorm.bench.contenders.why_not_compile", lambda device: "torch.compile cannot compile here"
    )
    with pytest.raises(BenchError, match="cannot compile here"):
        conduct.conduct(Settings(filter="60x100 bn", compile=True), None)
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (Settings("quick"), ""),
        (Settings("default"), "float32 bn+relu train"),
        (Settings("full"), "float32 bn+relu train"),
        (Settings("quick", compile=True), " "),
        (Settings("default", device="cuda"), ""),
        (Settings("full", compile=False), ""),
        (Settings("default", models=True), " "),
        (Settings("full", models=True, compile=True), " "),
        (Settings("default", models=True, compile=False), ""),
        (Settings("quick", models=True), ""),
        (Settings("quick", models=True, compile=True), " "),
        (Settings("default", models=True, device="cuda"), ""),
    ],
    ids=lambda value: (
        f"{value.scope} {value.device} {value.compile} {value.models}" if isinstance(value, Settings) else value
    ),
)
def test_torch_compile_is_timed_in_one_case_of_every_shape_and_layout_or_in_all(monkeypatch, settings, words):
    monkeypatch.setattr(contenders, "why_not_compile", lambda device: None)
    todo, notes = conduct.chosen_cases(settings), []
    expected = {case for case in todo if words and cases.matches(case.name, words)}
    assert conduct._compiled(settings, todo, notes) == expected
    assert notes == []
    if words == "float32 bn+relu train":
        assert {(case.shape, case.layout) for case in expected} == {(case.shape, case.layout) for case in todo}


def test_without_a_compiler_a_note_says_so_unless_it_was_asked_for(monkeypatch):
    monkeypatch.setattr(contenders, "why_not_compile", lambda device: "no compiler")
    notes = []
    assert conduct._compiled(Settings(), cases.DEFAULT, notes) == set()
    assert notes == ["torch.compile was not timed: no compiler"]
    with pytest.raises(BenchError, match="no compiler"):
        conduct._compiled(Settings(compile=True), cases.DEFAULT, notes)


@pytest.mark.slow
def test_networks_are_announced_and_stored_one_by_one(here, monkeypatch):
    measured, lines = [], []

    def measure(workload, **options):
        measured.append((workload.name, options["rounds"], options["compile"]))
        return {"model": workload.model}

    monkeypatch.setattr("batchnorm.bench.models.measure", measure)
    record, path = conduct.conduct(
        Settings("quick", models=True, filter="U-Net"), here / "result.json", announce=lines.append
    )
    names = ["U-Net 3-d contiguous 1x1x16x16x16", "U-Net 3-d channels_last_3d 1x1x16x16x16"]
    assert measured == [(name, 3, False) for name in names]
    assert lines == [f"1 of 2: {names[0]}", f"2 of 2: {names[1]}, about 1 min left"]
    assert json.loads(path.read_text(encoding="utf-8"))["models"] == record["models"]


@pytest.mark.slow
def test_the_command_times_a_network(here, monkeypatch, capsys):
    arguments = ["--models", "--quick", "--filter", "tabular", "--allocator", "default", "--out", "result.json"]
    assert call(monkeypatch, "bench", *arguments) == 0
    printed = capsys.readouterr()
    assert "1 of 1: tabular contiguous 256x100\n" in printed.err
    assert "Whole training steps, allocator: default" in printed.out
    stored = json.loads((here / "result.json").read_text(encoding="utf-8"))
    assert set(stored["models"][0]["ratios"]) == {"ours", "ours unfused"}


@pytest.mark.slow
def test_importing_the_package_loads_no_benchmark():
    code = "import sys, batchnorm, batchnorm.layers, batchnorm.cli; print([n for n in sys.modules if 'bench' in n])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert "batchnorm.bench" not in done.stdout
