"""PyTorch checkpoints: what torch.save writes now (a zip archive) and wrote before 1.6 (pickles, then the numbers)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from batchnorm.checks.readers._parsing.archive import Archive
from batchnorm.checks.readers._parsing.described import DAMAGED, Name, Storage, tensors
from batchnorm.checks.readers._parsing.files import CheckpointError, File, Region, Window
from batchnorm.checks.readers._parsing.pickles import Interpreter
from batchnorm.checks.readers._parsing.stored import MAX_SIZE, WIDTHS, Checkpoint

MAGIC = 0x1950A86A20F9469CFC6C
PROTOCOL = 1001


def read_zip(path: Path, archive: Archive, size: int) -> Checkpoint:
    """A zip archive with the pickle `data.pkl` and an entry for each storage, in one folder of any name."""
    folder = next(iter(archive.entries)).partition("/")[0]
    if f"{folder}/constants.pkl" in archive.entries:
        raise CheckpointError("a TorchScript archive holds code: torch.jit.load it and save its state_dict()")
    order = "<"
    if f"{folder}/byteorder" in archive.entries:
        mark = archive.open(f"{folder}/byteorder")
        named = mark.read(0, min(mark.size, 16))
        if named not in (b"little", b"big"):
            raise CheckpointError("the archive is damaged: its byteorder is neither little nor big")
        order = "<" if named == b"little" else ">"
    storages: dict[str, Storage] = {}

    def persistent(named: tuple[Any, ...]) -> Storage:
        dtype, key, length = _storage(named[:5], 5)
        if key not in storages:
            source = archive.open(f"{folder}/data/{key}")
            if source.size < length:
                raise CheckpointError("the archive is damaged: a storage is shorter than it claims")
            storages[key] = Storage(dtype, length, source, order=order)
        return storages[key]

    window = Window(archive.through(f"{folder}/data.pkl"))
    return Checkpoint(path, "PyTorch", tensors(Interpreter(window, persistent).load()), size=size)


def read_legacy(path: Path, file: File) -> Checkpoint:
    """Pickles in a row: a magic number, a version, the system, the object, the keys of its storages; their bytes."""
    storages: dict[str, Storage] = {}
    views: dict[str, Storage] = {}

    def persistent(named: tuple[Any, ...]) -> Storage:
        dtype, key, length = _storage(named[:5], 5)
        whole = storages.setdefault(key, Storage(dtype, length))
        view = named[5] if len(named) > 5 else None
        if view is None:
            return whole
        if not isinstance(view, tuple) or len(view) != 3 or not all(_count(number) for number in view[1:]):
            raise CheckpointError(DAMAGED)
        name, start, count = str(view[0]), view[1] * WIDTHS[dtype], view[2] * WIDTHS[dtype]
        if start + count > whole.size:
            raise CheckpointError(DAMAGED)
        return views.setdefault(name, Storage(dtype, count, base=whole, start=start))

    window = Window(file)
    pickles = Interpreter(window, persistent)
    if pickles.load() != MAGIC or pickles.load() != PROTOCOL:
        raise CheckpointError(
            "a pickle, but not one that torch.save wrote: save the model's state_dict() with torch.save"
        )
    pickles.load()  # byte order and sizes of integers: those of every machine that torch runs on
    value = pickles.load()
    keys = pickles.load()
    if not isinstance(keys, list):
        raise CheckpointError(DAMAGED)
    for key in keys:
        storage = storages.get(str(key))
        length = int.from_bytes(window.take(8), "little")
        if storage is None or storage.source is not None or length * WIDTHS[storage.dtype] != storage.size:
            raise CheckpointError(DAMAGED)
        storage.source = Region(file, window.at, storage.size)
        window.at += storage.size
        if window.at > file.size:
            raise CheckpointError("the file is truncated: copy or save it again")
    return Checkpoint(path, "PyTorch (legacy)", tensors(value), size=file.size)


def _storage(named: tuple[Any, ...], least: int) -> tuple[str, str, int]:
    """Type of elements, key and bytes of ("storage", type, key, location, elements)."""
    if len(named) < least or named[0] != "storage":
        raise CheckpointError(DAMAGED)
    _, kind, key, _, count = named
    if not isinstance(kind, Name) or kind.kind != "storage" or not isinstance(key, str | int) or not _count(count):
        raise CheckpointError(DAMAGED)
    return kind.dtype, str(key), count * WIDTHS[kind.dtype]


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_SIZE
