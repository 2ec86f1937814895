"""Imports on first use, such that a fork() waits until no other thread is within one.

A module that another thread is importing stays locked for ever in a forked child: it would wait for it for ever.
"""

from __future__ import annotations

import os
import threading
from importlib import import_module
from types import ModuleType

EXTRAS = {"h5py": "hdf5", "onnx": "onnx", "ml_dtypes": "onnx", "google": "onnx", "tensorboard": "tensorboard"}
EXTRAS |= {"lightning": "lightning", "pytorch_lightning": "lightning", "polars": "dataframes", "pandas": "dataframes"}
EXTRAS |= dict.fromkeys(("pyarrow", "filelock", "rich", "typer", "altair", "vl_convert", "jinja2"), "tools")
EXTRAS |= dict.fromkeys(("sklearn", "safetensors"), "tools")
"""The extra of the package that installs a library."""

_PATIENCE = 30.0  # seconds: the other thread may be waiting for what the forking one is importing
_changed = threading.Condition()
_within: dict[int, int] = {}
_done: set[str] = set()
_held: list[int] = []


def imported(name: str) -> ModuleType:
    """The module of this full name. Threads do not wait here for each other, only in Python's own import."""
    if name in _done:
        return import_module(name)
    thread = threading.get_ident()
    with _changed:
        _within[thread] = _within.get(thread, 0) + 1
    try:
        module = import_module(name)
        _done.add(name)
    except ModuleNotFoundError as error:
        raise explained(error) from None
    finally:
        with _changed:
            _within[thread] -= 1
            if not _within[thread]:
                del _within[thread]
            _changed.notify_all()
    return module


def explained(error: ModuleNotFoundError) -> ModuleNotFoundError:
    """The same error, with the extra that installs the library, where it is one of an extra's."""
    library = (error.name or "").partition(".")[0]
    extra = EXTRAS.get(library)
    what = f"this needs {library}: pip install 'batchnorm[{extra}]'"
    return error if extra is None else ModuleNotFoundError(what, name=error.name, path=error.path)


def _before_fork() -> None:
    _changed.acquire()
    own = threading.get_ident()
    _changed.wait_for(lambda: _within.keys() <= {own}, _PATIENCE)
    _held.append(own)


def _after_fork() -> None:
    if _held:  # empty where this was imported while the fork waited for others
        _held.pop()
        _changed.release()


def _in_child() -> None:
    for thread in _within.keys() - {threading.get_ident()}:
        del _within[thread]
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_in_child)
