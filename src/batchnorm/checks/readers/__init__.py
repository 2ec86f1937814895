"""Readers of checkpoints: the names, shapes and places of their tensors, and of their numbers only what is asked for.

stored       what every reader hands over: Checkpoint, Stored, CheckpointError
files        bytes, read where they are asked for; archive: those of a zip; json_text: a header in pieces
elements     types of numbers; strided: a tensor in a run of bytes
pytorch      pickles (an interpreter that describes and never loads: pickles, allowed, described, nested)
safetensors, onnx (protobuf), hdf5 (in a process of its own: hdf5_child), shards

No file is trusted: each reader is bounded in memory and time, whatever the file claims. Nothing here imports torch.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from batchnorm.checks.readers import hdf5, onnx, pytorch, safetensors
from batchnorm.checks.readers._parsing import archive
from batchnorm.checks.readers._parsing.files import File, opened
from batchnorm.checks.readers._parsing.stored import (
    Checkpoint,
    CheckpointError,
    Held,
    NormPlaces,
    Stored,
    Unreadable,
    naming,
)

__all__ = ["Checkpoint", "CheckpointError", "Held", "NormPlaces", "Stored", "Unreadable", "naming", "read"]

# What a file that is none is, by how it begins, and what to do.
_OTHERS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file: `git lfs pull` fetches it"),
    (b"<", "a web page, not the file: the download failed"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"BZh", "compressed with bzip2: unpack it first"),
    (b"\xfd7zXZ", "compressed with xz: unpack it first"),
    (b"\x93NUMPY", "a NumPy array, not a checkpoint"),
)


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """The directory of a checkpoint: a file, an index of shards, or a folder with one of them.

    What a file is, its content says; only ONNX, which has no mark, goes by its suffix.

    Raises:
        CheckpointError: no such file, damaged, hostile, of an unknown kind, or one that runs code when it is loaded.
    """
    path = Path(path)
    found = safetensors.chosen(path) if _is_folder(path) else path
    with naming(found):
        checkpoint = safetensors.read_index(found, _file) if found.name.endswith(safetensors.INDEX) else _file(found)
    return replace(checkpoint, path=path)


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def _file(path: Path) -> Checkpoint:
    with naming(path):
        try:
            return _by_content(path, opened(path))
        except (MemoryError, RecursionError):
            raise CheckpointError("the file takes more memory than there is") from None


def _by_content(path: Path, file: File) -> Checkpoint:
    if file.size == 0:
        raise CheckpointError("the file is empty")
    head = file.read(0, min(512, file.size))
    if head.startswith(b"PK"):
        return _zip(path, file)
    if hdf5.looks_like(file):
        return hdf5.read_file(path, file)
    if safetensors.looks_like(head, file.size):
        return safetensors.read_file(path, file)
    if head[:1] == b"\x80":
        return pytorch.read_legacy(path, file)
    if head[257:262] == b"ustar":
        raise CheckpointError(
            "a tar archive: torch.save wrote those before 0.1.10; load it with torch and save it again"
        )
    for mark, what in _OTHERS:
        if head.startswith(mark):
            raise CheckpointError(what)
    if path.suffix.lower() == ".safetensors":
        return safetensors.read_file(path, file)
    if path.suffix.lower() == ".onnx" or onnx.looks_like(head):
        return onnx.read_file(path, file)
    raise CheckpointError("no checkpoint of a known kind: PyTorch, safetensors, ONNX, HDF5 and Keras are read")


def _zip(path: Path, file: File) -> Checkpoint:
    found = archive.directory(file)
    if hdf5.KERAS_WEIGHTS in found.entries:
        return hdf5.read_keras(path, file, found)
    if any(name.endswith("/data.pkl") and name.count("/") == 1 for name in found.entries):
        return pytorch.read_zip(path, found, file.size)
    raise CheckpointError("a zip archive, but neither of torch.save nor of Keras")
