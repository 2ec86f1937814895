"""Readers of checkpoints: the names, shapes and places of their tensors, and of their numbers only what is asked for.

files        bytes, read where they are asked for, and CheckpointError; archive: those of a zip
stored       what every reader returns: Checkpoint, Stored; a tensor in a run of bytes, and types of numbers
pytorch      pickles (an interpreter that describes and never loads: pickles, described)
safetensors  by the package of that name
onnx, hdf5   by the packages onnx and h5py, in a guarded process (process starts it, child is what it runs)

No file is trusted: each reader is bounded in memory and time, whatever the file claims. Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

from batchnorm.checks.readers import hdf5, onnx, pytorch, safetensors
from batchnorm.checks.readers._parsing import archive
from batchnorm.checks.readers._parsing.files import CheckpointError, File, naming, opened, shown, well_formed
from batchnorm.checks.readers._parsing.stored import MAX_TENSORS, Checkpoint, Held, Stored, Unreadable

__all__ = ["Checkpoint", "CheckpointError", "Held", "Stored", "Unreadable", "naming", "read"]

# What a file that is none is, by how it begins, and what to do.
_OTHERS = (
    (b"version https://git-lfs", "a pointer of Git LFS, not the file: `git lfs pull` fetches it"),
    (b"<", "a web page, not the file: the download failed"),
    (b"\x1f\x8b", "compressed with gzip: unpack it first"),
    (b"BZh", "compressed with bzip2: unpack it first"),
    (b"\xfd7zXZ", "compressed with xz: unpack it first"),
    (b"\x93NUMPY", "a NumPy array, not a checkpoint"),
)

INDEX = ".index.json"
MODELS = ("model.safetensors" + INDEX, "pytorch_model.bin" + INDEX, "model.safetensors", "pytorch_model.bin")
"""What the model in a folder is called, by agreement, beside files of its optimizer and settings; the first counts."""
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".onnx", ".h5", ".hdf5", ".keras", ".th", ".pkl")
MAX_INDEX = 2**24
"""Bytes of an index: 256 for each of the most tensors."""
MAX_BRACKETS = 256
"""Opening brackets of an index. It has two or three; each can become an object of a hundred bytes."""
MAX_SHARDS = 1024
MAX_LISTED = 10_000
"""Entries of a folder that are looked at."""


def read(path: str | os.PathLike[str]) -> Checkpoint:
    """The directory of a checkpoint: a file, an index of shards, or a folder with one of them.

    What a file is, its content says; only ONNX, which has no mark, goes by its suffix.

    Raises:
        CheckpointError: no such file, damaged, hostile, of an unknown kind, or one that runs code when it is loaded.
    """
    path = Path(path)
    found = _chosen(path) if _is_folder(path) else path
    with naming(found):
        checkpoint = _index(found) if found.name.endswith(INDEX) else _file(found)
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


def _chosen(folder: Path) -> Path:
    """The checkpoint in a folder.

    Raises:
        CheckpointError: none, or several and none of them called as `MODELS`.
    """
    try:
        names = sorted(entry.name for entry, _ in zip(folder.iterdir(), range(MAX_LISTED), strict=False))
    except OSError as error:
        raise CheckpointError(f"the folder cannot be read: {error.strerror or error}", folder) from None
    for name in MODELS:
        if name in names:
            return folder / name
    found = [name for name in names if name.lower().endswith(SUFFIXES)]
    if not found:
        raise CheckpointError("there is no checkpoint in the folder", folder)
    if len(found) > 1:
        listed = ", ".join(shown(name, 40) for name in found[:8]) + (", …" if len(found) > 8 else "")
        raise CheckpointError(f"there are {len(found)} checkpoints in the folder, name one: {listed}", folder)
    return folder / found[0]


def _index(path: Path) -> Checkpoint:
    """The tensors of every shard that an index names: {"weight_map": {tensor: file}}."""
    names = _weight_map(path)
    shards = sorted(set(names.values()))
    if not shards or len(shards) > MAX_SHARDS:
        raise CheckpointError(f"the index names {len(shards)} files: a checkpoint has 1 to {MAX_SHARDS}")
    tensors: dict[tuple[str, ...], Stored] = {}
    parts = []
    for shard in shards:
        if Path(shard).name != shard or shard in (".", "..") or "\\" in shard:
            raise CheckpointError(f"the index names the file {shown(shard)}, which is not beside it")
        part = _file(path.parent / shard)
        parts.append(part)
        tensors |= part.tensors
        if len(tensors) > MAX_TENSORS:
            raise CheckpointError(f"the files hold more than {MAX_TENSORS} tensors")
    tensors = {(name,): tensors[name,] for name in names if (name,) in tensors} | tensors  # the index has the order
    missing = next((name for name in names if (name,) not in tensors), None)
    if missing is not None:
        raise CheckpointError(f"the index names the tensor {shown(missing)}, which its file does not hold")
    size = opened(path).size + sum(part.size for part in parts)
    return replace(parts[0], path=path.parent, tensors=tensors, size=size)


def _weight_map(path: Path) -> dict[str, str]:
    file = opened(path)
    if file.size > MAX_INDEX:
        raise CheckpointError(f"the index has {file.size} bytes: no checkpoint needs more than {MAX_INDEX}")
    text = file.read(0, file.size)
    try:
        index = json.loads(text) if text.count(b"[") + text.count(b"{") < MAX_BRACKETS else None
        names = index["weight_map"]  # type: ignore[index]
    except (ValueError, TypeError, KeyError, RecursionError):
        names = None
    if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
        raise CheckpointError("the index is damaged: it is not the JSON of a checkpoint's index")
    if len(names) > MAX_TENSORS:
        raise CheckpointError(f"the index names more than {MAX_TENSORS} tensors")
    return {well_formed(name): shard for name, shard in names.items()}
