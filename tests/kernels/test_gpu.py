"""The contract suite over the GPU kernel, and what that kernel promises besides, through Triton's interpreter.

In a process of its own: Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_the_gpu_kernel_keeps_the_contract() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "BATCHNORM_KERNELS": "gpu"}
    files = [str(HERE / name) for name in ("test_contract.py", "test_gpu_kernel.py")]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, env=environment, cwd=HERE.parent.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " skipped" not in done.stdout
