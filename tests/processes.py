"""Run a script in several local gloo processes with a time limit."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

SECONDS = 120

# At exit, Python may meet a thread of PyTorch that still frees a collective's tensors, and then aborts the process
# ("terminate called without an active exception"), with or without this package. So scripts skip Python's teardown.
LEAVE = """
import os, sys
sys.stdout.flush()
os._exit(0)
"""


def launch(
    script: str, ranks: int, *arguments: str, folder: Path, grace: float = SECONDS
) -> list[subprocess.CompletedProcess[str]]:
    """Return each process's output. Processes are killed after SECONDS, or `grace` seconds after one failed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment["WORLD_SIZE"] = str(ranks)
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    file = folder / "worker.py"
    file.write_text(script + LEAVE, encoding="utf-8")
    with ExitStack() as opened:
        streams = [[opened.enter_context(open(folder / f"{n}{r}", "w+")) for n in ("out", "err")] for r in range(ranks)]
        workers = [
            subprocess.Popen(
                [sys.executable, str(file), *arguments], env={**environment, "RANK": str(rank)}, stdout=out, stderr=err
            )
            for rank, (out, err) in enumerate(streams)
        ]
        end = time.monotonic() + SECONDS
        while any(worker.poll() is None for worker in workers) and time.monotonic() < end:
            if any(worker.returncode for worker in workers):
                end = min(end, time.monotonic() + grace)
            time.sleep(0.05)
        for worker in workers:
            worker.kill()
            worker.wait()
        return [
            subprocess.CompletedProcess(worker.args, worker.returncode, *(_text(stream) for stream in pair))
            for worker, pair in zip(workers, streams, strict=True)
        ]


def _text(stream: TextIO) -> str:
    stream.seek(0)
    return stream.read()


def succeed(script: str, ranks: int, *arguments: str, folder: Path) -> list[str]:
    """The last line that each process printed; all of them must end well."""
    done = launch(script, ranks, *arguments, folder=folder)
    assert [each.returncode for each in done] == [0] * ranks, "\n".join(each.stderr[-3000:] for each in done)
    return [each.stdout.strip().rpartition("\n")[2] for each in done]
