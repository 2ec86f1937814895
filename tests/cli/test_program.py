"""A mistake names Python's arguments in Python and the options of the command on the command line."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from batchnorm.bench import conduct
from batchnorm.bench.record import BenchError
from batchnorm.cli import as_options, main
from batchnorm.study.data import DataError, load
from batchnorm.study.experiment import Config
from batchnorm.study.runner import ConfigError, check


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: check(Config(act="tanh")), "unknown act='tanh'"),
        (lambda: check(Config(steps=0)), "steps must be at least 1, got 0"),
        (lambda: check(Config(lr=-1.0)), "lr must be a positive number"),
        (lambda: load("imagenet"), "unknown data='imagenet'"),
        (lambda: load("digits", "."), "leave out data_dir=..., or choose another data=..."),
        (lambda: load("mnist", "nowhere"), "nowhere is not a folder: data_dir=... names"),
        (lambda: conduct.check(conduct.Settings(device="tpu")), "unknown device='tpu'"),
        (lambda: conduct.check(conduct.Settings(called=True)), "called=True needs device='cuda'"),
        (lambda: conduct.check(conduct.Settings(threads=0)), "threads must be at least 1"),
        (lambda: conduct.check(conduct.Settings(filter="65536x256 bfloat16 eval")), "scope='full' has 4"),
    ],
)
def test_python_names_its_arguments(call, words):
    with pytest.raises((ConfigError, DataError, BenchError)) as caught:
        call()
    assert words in str(caught.value)
    assert "--" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "result"),
    [
        ("runs/a holds a Run: replace it with force=True", "runs/a holds a Run: replace it with --force"),
        ("give the files as data_dir=..., or data='digits'", "give the files as --data-dir, or --data digits"),
        ("no case matches filter='a b': scope='full' has 4", "no case matches --filter 'a b': --full has 4"),
        ("lr must be a positive number, got nan", "--lr must be a positive number, got nan"),
        ("no Run in runs/lr=0.1", "no Run in runs/lr=0.1"),
        ("no Run in steps=10", "no Run in steps=10"),
    ],
)
def test_the_command_line_names_its_options(message, result):
    assert as_options(message) == result


@pytest.mark.parametrize(
    "arguments",
    [
        ["bench", "--quick", "--full"],
        ["bench", "--allocator", "jemalloc"],
        ["bench", "--called"],
        ["bench", "--threads", "0"],
        ["bench", "--machine", "--threads", "0"],
        ["study", "--steps", "0"],
        ["study", "--steps", "many"],
        ["study", "--act", "tanh"],
        ["study", "--data", "imagenet"],
        ["study", "--data-dir", "."],
        ["study", "--lr", "nan"],
        ["study", "regrets"],
        ["report", "run", "--every", "0"],
    ],
    ids=" ".join,
)
def test_wrong_options_point_to_the_help_of_the_command(capsys, monkeypatch, tmp_path: Path, arguments):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["batchnorm", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    result = capsys.readouterr().err
    assert result.count("\n") == 1
    assert result.endswith(f"(see batchnorm {arguments[0]} --help)\n")
