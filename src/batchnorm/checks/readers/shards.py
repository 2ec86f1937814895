"""A checkpoint in several files, or a folder with one checkpoint in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from batchnorm.checks.readers._parsing.files import opened
from batchnorm.checks.readers._parsing.json_text import DAMAGED, Text
from batchnorm.checks.readers._parsing.stored import (
    MAX_TENSORS,
    Checkpoint,
    CheckpointError,
    Stored,
    shown,
)

INDEX = ".index.json"
MODELS = ("model.safetensors" + INDEX, "pytorch_model.bin" + INDEX, "model.safetensors", "pytorch_model.bin")
"""What the model in a folder is called, by agreement, beside files of its optimizer and settings; the first counts."""
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".onnx", ".h5", ".hdf5", ".keras", ".th", ".pkl")
MAX_INDEX = 2**24
"""Bytes of an index: 256 for each of the most tensors."""
MAX_SHARDS = 1024
MAX_LISTED = 10_000
"""Entries of a folder that are looked at."""

Read = Callable[[Path], Checkpoint]


def chosen(folder: Path) -> Path:
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


def read_index(path: Path, read: Read) -> Checkpoint:
    """The tensors of every shard that an index names: {"weight_map": {tensor: file}}. `read` reads one shard."""
    names = _weight_map(path)
    shards = sorted(set(names.values()))
    if not shards or len(shards) > MAX_SHARDS:
        raise CheckpointError(f"the index names {len(shards)} files: a checkpoint has 1 to {MAX_SHARDS}")
    tensors: dict[tuple[str, ...], Stored] = {}
    parts = []
    for shard in shards:
        if Path(shard).name != shard or shard in (".", "..") or "\\" in shard:
            raise CheckpointError(f"the index names the file {shown(shard)}, which is not beside it")
        part = read(path.parent / shard)
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
    text = Text(file.read(0, file.size))
    names: dict[str, str] = {}
    for key in text.pairs():
        if key != "weight_map":
            text.skip()
            continue
        for name in text.pairs():
            names[name] = text.string()
            if len(names) > MAX_TENSORS:
                raise CheckpointError(f"the index names more than {MAX_TENSORS} tensors")
    text.end()
    if not names:
        raise CheckpointError(DAMAGED)
    return names
