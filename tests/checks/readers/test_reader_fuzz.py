"""Damaged files of every format: a Checkpoint or a CheckpointError comes back, soon and in little memory.

Mutations of the seeds, by a seed that a failure prints, for BATCHNORM_FUZZ_SECONDS in all (one second each by
default). `corpus` keeps damaged files that are refused or read in different ways, and what was found; all are read.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import pytest
from mutations import mutated
from seeds import MAKERS, seed

from batchnorm.checks.readers import Checkpoint, CheckpointError, read
from randomness import SEED

CORPUS = sorted(path for path in (Path(__file__).parent / "corpus").iterdir() if path.is_file())
SECONDS = float(os.environ.get("BATCHNORM_FUZZ_SECONDS", "0"))
SHARE = {"hdf5": 0.35, "keras": 0.15}
MAX_SECONDS = 10
"""For one file, on a loaded machine too. The child limits its processor time to 5 seconds."""
MAX_MEMORY = 100 * 2**20
"""Bytes of this process, for one file. The guard and the kernel limit the child's."""


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
    places = [place for norm in found.norms for place in norm.tensors.values()]
    for stored in [*small[:20], *places[:20]]:
        with contextlib.suppress(CheckpointError):
            if all(size < 2**16 for size in stored.shape):
                assert stored.values().shape == stored.shape
    return True


@pytest.fixture
def traced() -> Iterator[None]:
    """Memory is counted."""
    tracemalloc.start()
    yield
    tracemalloc.stop()


def peak() -> int:
    """Bytes at most since the last call."""
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    return most


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_corpus(path: Path, traced: None) -> None:
    with soon(MAX_SECONDS):
        examine(path)
    assert peak() < MAX_MEMORY


@pytest.mark.parametrize("name", MAKERS)
def test_seed_is_read(name: str, tmp_path: Path) -> None:
    suffix, data = seed(name)
    path = tmp_path / f"seed{suffix}"
    path.write_bytes(data)
    assert examine(path)


@pytest.mark.parametrize("name", MAKERS)
def test_fuzz(name: str, tmp_path: Path, traced: None) -> None:
    suffix, data = seed(name)
    others = [seed(other)[1] for other in ("zip", "legacy", name)]
    start = SEED << 20
    share = SHARE.get(name, 0.125)
    path = tmp_path / f"file{suffix}"
    examine(written(path, data))
    until = time.monotonic() + (share * SECONDS if SECONDS else 1)
    count = accepted = 0
    while count == 0 or time.monotonic() < until:
        case = start + count
        written(path, mutated(name, data, others, random.Random(case)))
        peak()  # of the mutation itself
        try:
            with soon(MAX_SECONDS):
                accepted += examine(path)
            assert peak() < MAX_MEMORY
        except BaseException:
            print(f"{name}: case {case} (BATCHNORM_SEED={SEED}), kept in {path}")  # noqa: T201
            raise
        count += 1
    print(f"{name}: {count} inputs from seed {start}, {accepted} read")  # noqa: T201


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
