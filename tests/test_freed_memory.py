"""keep_freed_memory: page faults of large tensors stop, and come back; elsewhere nothing happens, and it says so."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

import batchnorm as bn
from batchnorm import allocator

FAULTS = """
    import resource, torch, batchnorm as bn
    def faults(size=10_000_000):
        def now(): return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        counts = []
        for _ in range(40):  # the heap grows first
            before = now()
            torch.ones(size)
            counts.append(now() - before)
        return sorted(counts[20:])[10]
    found = [faults()]
    for keep, size in ((True, 10_000_000), (False, 30_000_000)):  # the heap still has room for small ones
        record = bn.keep_freed_memory(keep)
        assert record.done and record.kept is keep, record
        found.append(faults(size))
    print(*found)
"""

has_glibc = allocator._mallopt() is not None


@pytest.mark.skipif(not has_glibc, reason="no glibc")
def test_page_faults_stop_and_come_back() -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FAULTS)], capture_output=True, text=True, check=True, env=environment
    )
    before, kept, static = map(int, done.stdout.split())
    assert kept < 100
    if before > 100:  # with transparent huge pages a tensor takes a few faults only
        assert static > 100


@pytest.mark.skipif(not has_glibc, reason="no glibc")
def test_the_record_says_what_was_done(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(allocator, "_mallopt", lambda: lambda *arguments: asked.append(arguments) or 1)
    assert "keeps freed memory" in str(bn.keep_freed_memory())
    assert "static defaults" in str(bn.keep_freed_memory(False))
    assert asked == [(-3, 1 << 30), (-1, 1 << 30), (-3, 128 << 10), (-1, 128 << 10)]


@pytest.mark.parametrize(("function", "why"), [(None, "without glibc"), (lambda *_: 0, "refused")])
def test_where_it_is_impossible_nothing_is_changed(function: object, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocator, "_mallopt", lambda: function)
    record = bn.keep_freed_memory()
    assert not record.done
    assert not record.kept
    assert why in str(record)


def test_a_wrong_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="keep must be True or False, got int"):
        bn.keep_freed_memory(1)  # type: ignore[arg-type]
