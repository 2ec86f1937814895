"""A study from arguments to report, with interrupts between two steps."""

import gc
import signal
import threading

import pytest
import torch

from batchnorm.study.experiment import Config
from batchnorm.study.runner import ConfigError, conduct, default_folder

SMALL = Config(seeds=1, steps=20)


def press_once():
    """A progress function that sends this process Ctrl-C at its first call."""
    calls = []

    def progress(done, total):
        calls.append(done)
        if len(calls) == 1:
            signal.raise_signal(signal.SIGINT)

    return progress, calls


@pytest.mark.slow
def test_ctrl_c_ends_the_study_at_the_next_step_with_a_report(tmp_path):
    progress, calls = press_once()
    messages = []
    threads = torch.get_num_threads()
    run = conduct(SMALL, "digits", None, tmp_path / "run", progress=progress, message=messages.append)
    assert run.info["status"] == "interrupted"
    assert len(calls) == 1
    assert messages == ["interrupted: writing the report of what was measured ..."]
    assert (run.path / "report.html").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert torch.get_num_threads() == threads


@pytest.mark.slow
def test_ctrl_c_inside_a_finalizer_is_not_lost(tmp_path):
    """Raised there, KeyboardInterrupt would be printed and forgotten, and the study would go on to its end."""

    class Finalized:
        def __del__(self):
            signal.raise_signal(signal.SIGINT)

    def progress(done, total, left=[1]):  # noqa: B006 - counts over the calls
        if left:
            left.pop()
            Finalized()
            gc.collect()

    run = conduct(SMALL, "digits", None, tmp_path / "run", progress=progress)
    assert run.info["status"] == "interrupted"


def test_a_second_ctrl_c_interrupts_at_once_and_says_where_the_run_is(tmp_path, monkeypatch):
    progress, _ = press_once()
    messages = []
    monkeypatch.setattr("batchnorm.study.runner.render", lambda run: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        conduct(SMALL, "digits", None, tmp_path / "run", progress=progress, message=messages.append)
    assert f"batchnorm report {tmp_path / 'run'} renders it" in messages[-1]


@pytest.mark.slow
def test_another_handler_is_not_replaced(tmp_path):
    seen = []
    before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        progress, _ = press_once()
        run = conduct(Config(seeds=1, steps=2), "digits", None, tmp_path / "run", progress=progress)
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [1]
    assert run.info["status"] == "complete"


@pytest.mark.slow
def test_it_runs_in_a_thread(tmp_path):
    found = []
    small = Config(seeds=1, steps=2)
    thread = threading.Thread(target=lambda: found.append(conduct(small, "digits", None, tmp_path / "run")))
    thread.start()
    thread.join()
    assert found[0].info["status"] == "complete"


def test_more_rows_a_step_than_there_are_is_refused_before_anything_is_made(tmp_path):
    with pytest.raises(ConfigError, match="fewer than a batch of 5000"):
        conduct(Config(batch=5000), "digits", None, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_default_folders_are_new_ones(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = default_folder("digits", "relu")
    first.mkdir(parents=True)
    second = default_folder("digits", "relu")
    assert first != second
    assert not second.exists()
