"""`batchnorm bench --machine`: the facts as tables and as JSON, and a wrong variable in one line."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest
import torch

from batchnorm.bench import machine as machines
from batchnorm.bench.record import BenchError
from batchnorm.cli import main
from batchnorm.kernels.cpu import machine
from batchnorm.kernels.cpu.machine import DEFAULTS


@pytest.fixture(autouse=True)
def _default_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.VARIABLE, "defaults,cached=48M")
    monkeypatch.setattr(machine, "_known", {})


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *options: str) -> str:
    monkeypatch.setattr(sys, "argv", ["batchnorm", "bench", "--machine", *options])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    return capsys.readouterr().out


def test_the_tables_have_every_fact(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [" ".join(line.split()) for line in printed(capsys, monkeypatch).splitlines()]
    for line in (
        "L2 of a core 512 KiB",
        "cached 48 MiB",
        "region 5.0 µs",
        f"threads {torch.get_num_threads()}, 100% on the cores",
        "origin BATCHNORM_MACHINE: defaults, cached",
        "2 MiB 100 40 120",
        "64 MiB 25 30 25",
    ):
        assert line in lines


def test_json_has_the_facts_in_bytes_and_seconds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = json.loads(printed(capsys, monkeypatch, "--json"))
    assert found["l2_bytes"] == DEFAULTS.l2_bytes
    assert found["cached_bytes"] == 48 << 20
    assert found["region_seconds"] == DEFAULTS.region_seconds
    assert found["threads"] == torch.get_num_threads()
    assert found["bandwidth"][0] == {"total": 2 << 20, "ordinary": 100e9, "nontemporal": 40e9}
    assert found["read_bandwidth"][-1] == {"total": 64 << 20, "read": 25e9}


def test_the_number_of_threads_is_that_of_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    machines.describe(threads=3)
    assert counts == [3]
    with pytest.raises(BenchError, match="threads must be at least 1, got 0"):
        machines.describe(threads=0)
    assert counts == [3]


def test_a_wrong_variable_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(machine.VARIABLE, "l2=much")
    monkeypatch.setattr(sys, "argv", ["batchnorm", "bench", "--machine"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert errors.count("\n") == 1
    assert "l2=1M,cached=32M" in errors


@pytest.mark.parametrize(
    ("size", "words"), [(768 << 10, "768 KiB"), (1 << 20, "1 MiB"), (1280 << 10, "1.25 MiB"), (96 << 20, "96 MiB")]
)
def test_sizes_have_their_unit(size: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    described = machines.describe() | {"l2_bytes": size}
    machines.show(described)
    assert words in capsys.readouterr().out


def test_slow_rates_keep_a_digit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    slow = replace(DEFAULTS, bandwidth=(DEFAULTS.bandwidth[0]._replace(ordinary=1.25e9),))
    monkeypatch.setattr(machine, "facts", lambda: slow)
    machines.show(machines.describe())
    assert " 1.2 " in capsys.readouterr().out
