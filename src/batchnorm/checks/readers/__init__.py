"""Checkpoints on disk: the names and shapes of their tensors, and the numbers of the small ones.

guard      starts the child process that reads a file, limits it, and parses what it prints
child      that process: recognizes the format and prints the tensors
directory  what the child found, and the kinds of files that are not read
pytorch    PyTorch's checkpoints, other pickles and arrays of NumPy; imported in the child only
export     programs of torch.export, likewise
safetensors, onnx, hdf5    one format each, likewise

No file is trusted. Nothing in this process opens one, and nothing here imports torch.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from batchnorm.checks.readers.directory import INDEX, UNREAD
from batchnorm.checks.readers.guard import Checkpoint, CheckpointError, Stored, load, shown

__all__ = ["Checkpoint", "CheckpointError", "Stored", "read"]

MODELS = ("model.safetensors" + INDEX, "pytorch_model.bin" + INDEX, "model.safetensors", "pytorch_model.bin")
"""Usual names of the model in a folder, beside files of its optimizer and settings; the first one counts."""
SUFFIXES = (
    ".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".onnx", ".h5", ".hdf5", ".keras", ".th", ".pkl", ".npz", ".pt2",
)  # fmt: skip
MAX_LISTED = 10_000
"""The most entries of a folder that are read."""


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """Read the tensors of a checkpoint: a file, an index of shards, or a folder with one of them.

    The content decides which format a file has; the suffix decides only for ONNX, which has no mark.

    Raises:
        CheckpointError: no such file, damaged, hostile, or of a kind that is not read.
    """
    path = Path(path)
    try:
        found = _model_in(path) if path.is_dir() else path
        is_file = stat.S_ISREG(os.stat(found).st_mode)
    except FileNotFoundError:
        raise CheckpointError("there is no such file", path) from None
    except OSError as error:
        raise CheckpointError(f"the file cannot be read: {error.strerror or error}", path) from None
    except ValueError:  # a zero byte in the name
        raise CheckpointError("this is no file name", path) from None
    if not is_file:  # opening a device can have effects, opening a FIFO can wait for ever
        raise CheckpointError("this is no regular file", found)
    return load(found, path)


def _model_in(folder: Path) -> Path:
    """The checkpoint in a folder.

    Raises:
        CheckpointError: none, or several and none of them called as `MODELS`.
    """
    names = sorted(entry.name for entry, _ in zip(folder.iterdir(), range(MAX_LISTED), strict=False))
    found = [name for name in names if name.lower().endswith(SUFFIXES)]
    usual = [name for name in MODELS if name in names]
    if usual or len(found) == 1:
        return folder / (usual or found)[0]
    unread = [mark for mark in UNREAD if isinstance(mark, str) and any(f"/{name}".endswith(mark) for name in names)]
    what = UNREAD[unread[0]] if unread else "there is no checkpoint in the folder"
    if found:
        listed = ", ".join(shown(name, 40) for name in found[:8]) + (", …" if len(found) > 8 else "")
        what = f"there are {len(found)} checkpoints in the folder, name one: {listed}"
    raise CheckpointError(what, folder)
