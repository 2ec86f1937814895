"""Damaged files of every format: a Checkpoint or a CheckpointError comes back, soon and in little memory.

Mutations of the seeds, by a random seed that a failure prints, for BATCHNORM_FUZZ_SECONDS in all (a few seconds each by
default). What was found is kept in `corpus` and read again here.
"""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutations import mutated
from seeds import MAKERS, seed

from batchnorm.checks.readers import Checkpoint, CheckpointError, read

CORPUS = sorted(path for path in (Path(__file__).parent / "corpus").iterdir() if path.is_file())
SECONDS = float(os.environ.get("BATCHNORM_FUZZ_SECONDS", "0"))
SHARE = {"hdf5": 0.35, "keras": 0.15}
MAX_SECONDS = 5
"""For one file, on a loaded machine."""
MAX_GROWTH = 150 * 2**20
"""Bytes by which the process may grow over all files: a directory's bound, and what the allocator keeps."""


@contextlib.contextmanager
def soon(seconds: float) -> Iterator[None]:
    """What takes longer is a failure."""

    def late(*_: object) -> None:
        raise TimeoutError(f"not done after {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(path: Path) -> Checkpoint | str:
    """The checkpoint, or why there is none."""
    try:
        return read(path)
    except CheckpointError as error:
        return str(error)


def examine(path: Path) -> bool:
    """Read a file and some of its tensors; whether it is a checkpoint. Whatever else is raised is a failure."""
    found = outcome(path)
    if isinstance(found, str):
        assert found
        assert found.isprintable()  # one line, and nothing that a terminal obeys
        return False
    small = [stored for stored in found.tensors.values() if len(stored.shape) < 2]
    places = [
        place for norm in found.norms for place in (norm.gamma, norm.beta, norm.mean, norm.var) if place is not None
    ]
    for stored in [*small[:20], *places[:20]]:
        with contextlib.suppress(CheckpointError):
            if all(size < 2**16 for size in stored.shape):
                assert stored.values().shape == stored.shape
    return True


def peak() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_corpus(path: Path) -> None:
    with soon(MAX_SECONDS):
        examine(path)


@pytest.mark.parametrize("name", MAKERS)
def test_seed_is_read(name: str, tmp_path: Path) -> None:
    suffix, data = seed(name)
    path = tmp_path / f"seed{suffix}"
    path.write_bytes(data)
    assert examine(path)


@pytest.mark.parametrize("name", MAKERS)
def test_fuzz(name: str, tmp_path: Path) -> None:
    suffix, data = seed(name)
    others = [seed(other)[1] for other in ("zip", "legacy", name)]
    start = int(os.environ.get("BATCHNORM_FUZZ_SEED", random.SystemRandom().randrange(2**32)))
    share = SHARE.get(name, 0.125)
    until = time.monotonic() + (share * SECONDS if SECONDS else 3)
    path = tmp_path / f"file{suffix}"
    examine(written(path, data))
    before = peak()
    count = accepted = 0
    while time.monotonic() < until:
        case = start + count
        written(path, mutated(name, data, others, random.Random(case)))
        grown = peak()  # by the mutation itself
        try:
            with soon(MAX_SECONDS):
                accepted += examine(path)
            assert peak() - max(before, grown) < MAX_GROWTH
        except BaseException:
            print(f"{name}: case {case} (BATCHNORM_FUZZ_SEED={case}), kept in {path}")  # noqa: T201
            raise
        count += 1
    print(f"{name}: {count} inputs from seed {start}, {accepted} read")  # noqa: T201
    assert count


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
