"""Which policy is in force, and how the program restarts itself."""

import sys

import pytest

from batchnorm.bench import record

TUNED = record.TUNED


@pytest.fixture(autouse=True)
def _glibc(monkeypatch):
    monkeypatch.setattr(record, "has_glibc", lambda: True)


@pytest.mark.parametrize(
    ("environment", "policy"),
    [
        ({}, "default"),
        ({"PATH": "/bin"}, "default"),
        (TUNED, "tuned"),
        ({**TUNED, "MALLOC_TRIM_THRESHOLD_": "1"}, "set"),
        ({"MALLOC_ARENA_MAX": "1"}, "set"),
    ],
)
def test_the_policy_is_read_from_the_environment(environment, policy):
    assert record.active_policy(environment) == policy


def test_tuned_starts_the_same_program_once():
    arguments, environment = record.restart_command("tuned", {"PATH": "/bin"})
    assert arguments == [sys.executable, *sys.orig_argv[1:]]
    assert environment == {"PATH": "/bin", **TUNED}
    assert record.restart_command("tuned", environment) is None


def test_default_and_other_systems_start_nothing(monkeypatch):
    assert record.restart_command("default", {}) is None
    monkeypatch.setattr(record, "has_glibc", lambda: False)
    assert record.restart_command("tuned", {}) is None
    assert record.active_policy(TUNED) == "default"
