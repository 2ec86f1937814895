"""Imports at first use; fork() waits until no other thread is inside one.

A module that another thread is importing would stay locked in a forked child, which would wait for it for ever.
"""

from __future__ import annotations

import os
import sys
import threading
from importlib import import_module
from types import ModuleType

EXTRAS = {"h5py": "hdf5", "onnx": "onnx", "ml_dtypes": "onnx", "google": "onnx", "tensorboard": "tensorboard"}
EXTRAS |= {"lightning": "lightning", "pytorch_lightning": "lightning", "polars": "dataframes", "pandas": "dataframes"}
EXTRAS |= dict.fromkeys(("pyarrow", "filelock", "rich", "typer", "altair", "vl_convert", "jinja2"), "tools")
EXTRAS |= dict.fromkeys(("sklearn", "safetensors"), "tools")
"""The extra of this package that installs a library."""

_FORK_TIMEOUT = 30.0  # seconds; the other thread may be waiting for a module that the forking one is importing
_changed = threading.Condition()
_importing: dict[int, int] = {}
"""Unfinished imports by thread."""
_loaded: set[str] = set()
_locked_for_fork: list[int] = []


def load_module(name: str) -> ModuleType:
    """Import a module by its full name, in parallel threads too. Raises ModuleNotFoundError with the missing extra."""
    loaded = sys.modules.get(name)
    if name in _loaded and loaded is not None:
        return loaded
    thread = threading.get_ident()
    with _changed:
        _importing[thread] = _importing.get(thread, 0) + 1
    try:
        module = import_module(name)
        _loaded.add(name)
    except ModuleNotFoundError as error:
        raise with_install_hint(error) from None
    finally:
        with _changed:
            _importing[thread] -= 1
            if not _importing[thread]:
                del _importing[thread]
            _changed.notify_all()
    return module


def with_install_hint(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """An error that names the extra with the missing library; the same error if no extra has it."""
    library = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(library)
    message = f"this needs {library}: pip install 'batchnorm[{extra}]'"
    return error if extra is None else ModuleNotFoundError(message, name=error.name, path=error.path)


def _before_fork() -> None:
    _changed.acquire()
    thread = threading.get_ident()
    _changed.wait_for(lambda: _importing.keys() <= {thread}, _FORK_TIMEOUT)
    _locked_for_fork.append(thread)


def _after_fork() -> None:
    if _locked_for_fork:  # empty if the hooks were registered while the fork waited for others
        _locked_for_fork.pop()
        _changed.release()


def _in_child() -> None:
    for thread in _importing.keys() - {threading.get_ident()}:
        del _importing[thread]
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)
