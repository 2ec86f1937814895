"""Public names are imported at first use, also while other threads import and fork."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import batchnorm.importing
from batchnorm.importing import load_module

FORKING = """
    import os, sys, threading, time
    import batchnorm as bn
    sys.path.insert(0, {folder!r})
    bn._HOME["slow"] = bn._PUBLIC["slow"] = "slow"
    thread = threading.Thread(target=lambda: bn.slow)
    thread.start()
    while "slow" not in sys.modules:
        time.sleep(0.001)
    child = os.fork()
    if child == 0:
        os._exit(7 if bn.slow == "here" else 3)
    thread.join()
    for _ in range(200):
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.05)
    else:
        os.kill(child, 9)
        os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status) if done else "hangs", bn.slow)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() on this system")
def test_a_child_forked_while_another_thread_imports_goes_on(tmp_path: Path) -> None:
    """The module's lock would never be released in the child."""
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(0.5)\nslow = 'here'\n")
    script = textwrap.dedent(FORKING.format(folder=str(tmp_path)))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.split() == ["7", "here"], done.stdout + done.stderr


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() on this system")
def test_a_module_that_forks_while_it_is_imported_does_not_wait_for_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "forks_itself.py").write_text("import os\nif not (child := os.fork()):\n    os._exit(5)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = load_module("forks_itself")
    assert os.waitstatus_to_exitcode(os.waitpid(module.child, 0)[1]) == 5
    assert not batchnorm.importing._importing


def test_an_import_that_fails_is_over() -> None:
    with pytest.raises(ModuleNotFoundError):
        load_module("batchnorm.no_such_module")
    assert not batchnorm.importing._importing


def test_a_fork_that_began_before_these_handlers_were_there_ends() -> None:
    batchnorm.importing._after_fork()
