"""Runs a worker in several gloo processes of this machine, in bounded time."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

SECONDS = 120


def launch(script: str, ranks: int, *arguments: str, folder: Path) -> list[subprocess.CompletedProcess[str]]:
    """What each process printed; those still there after SECONDS are killed, and counted as -9."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    environment["WORLD_SIZE"] = str(ranks)
    file = folder / "worker.py"
    file.write_text(script, encoding="utf-8")
    workers = [
        subprocess.Popen(
            [sys.executable, str(file), *arguments],
            env={**environment, "RANK": str(rank)}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(ranks)
    ]  # fmt: skip
    done = []
    for worker in workers:
        try:
            out, err = worker.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            for each in workers:
                each.kill()
            out, err = worker.communicate()
        done.append(subprocess.CompletedProcess(worker.args, worker.returncode, out, err))
    return done


def succeed(script: str, ranks: int, *arguments: str, folder: Path) -> list[str]:
    """The last line that each process printed; all of them must end well."""
    done = launch(script, ranks, *arguments, folder=folder)
    assert [each.returncode for each in done] == [0] * ranks, "\n".join(each.stderr[-3000:] for each in done)
    return [each.stdout.strip().splitlines()[-1] for each in done]
