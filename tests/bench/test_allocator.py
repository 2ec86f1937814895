"""Which policy is in force, and what the program is started anew with."""

import sys

import pytest

from batchnorm.bench import allocator

TUNED = allocator.TUNED


@pytest.fixture(autouse=True)
def _glibc(monkeypatch):
    monkeypatch.setattr(allocator, "has_glibc", lambda: True)


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
    assert allocator.in_force(environment) == policy


def test_tuned_starts_the_same_program_once():
    arguments, environment = allocator.anew("tuned", {"PATH": "/bin"})
    assert arguments == [sys.executable, *sys.orig_argv[1:]]
    assert environment == {"PATH": "/bin", **TUNED}
    assert allocator.anew("tuned", environment) is None


def test_default_and_other_systems_start_nothing(monkeypatch):
    assert allocator.anew("default", {}) is None
    monkeypatch.setattr(allocator, "has_glibc", lambda: False)
    assert allocator.anew("tuned", {}) is None
    assert allocator.in_force(TUNED) == "default"
