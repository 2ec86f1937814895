"""The readers' child processes are forked from one process that has the libraries imported: a hundred times faster.

The guard is the package's own; only how its process starts is replaced. test_guard.py starts the real one, and
BATCHNORM_GUARD=real does so for all tests.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from batchnorm.checks.readers import guard

SERVER = """
import json, os, sys
import numpy, torch, torch.utils.serialization
for name in ("h5py", "onnx", "onnx.reference", "onnx.inliner", "safetensors"):
    try:
        __import__(name)
    except ImportError:
        pass
from batchnorm.checks.readers import child, directory, export, hdf5, onnx, pytorch
for line in sys.stdin:
    path, output = json.loads(line)
    process = os.fork()
    if not process:
        os.dup2(os.open(output, os.O_RDWR), 1)
        sys.argv[1:] = [path]
        child.main()
    print(process, flush=True)
    print(os.waitpid(process, 0)[1], flush=True)
"""


class Forked:
    """What subprocess.Popen returns, for a process of the server's."""

    server: subprocess.Popen[bytes] | None = None

    def __init__(self, arguments: list[str], stdout: Any, **settings: Any) -> None:
        if Forked.server is None or Forked.server.poll() is not None:
            quiet = os.environ | {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "HDF5_PLUGIN_PRELOAD": "::"}
            program = [sys.executable, "-P", "-W", "ignore", "-c", SERVER]
            pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
            Forked.server = subprocess.Popen(program, bufsize=0, env=quiet, **pipes)
        self.pipe: Any = Forked.server.stdout
        job = [arguments[-1], f"/proc/{os.getpid()}/fd/{stdout.fileno()}"]
        Forked.server.stdin.write(json.dumps(job).encode() + b"\n")
        self.pid = int(self.pipe.readline())
        self.status: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        if self.status is None:
            if not select.select([self.pipe], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("child", timeout or 0)
            self.status = os.waitstatus_to_exitcode(int(self.pipe.readline()))
        return self.status

    def kill(self) -> None:
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)


@pytest.fixture(scope="session", autouse=True)
def server() -> Iterator[None]:
    """One for each process that runs tests."""
    yield
    if Forked.server is not None:
        Forked.server.stdin.close()
        Forked.server.wait()
        Forked.server.stdout.close()


@pytest.fixture(autouse=True)
def forked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the child from the server, where there is /proc, but for the tests of the guard itself."""
    real = os.environ.get("BATCHNORM_GUARD") == "real" or request.node.path.name == "test_guard.py"
    if sys.platform == "linux" and not real:
        monkeypatch.setattr(guard, "Popen", Forked)
