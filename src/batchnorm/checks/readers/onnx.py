"""ONNX models, read by the onnx package: their initializers, and their BatchNormalization nodes."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any

from batchnorm.checks.layers import Place
from batchnorm.checks.readers._parsing.files import CheckpointError, File, Region, opened, shown, well_formed
from batchnorm.checks.readers._parsing.process import Job
from batchnorm.checks.readers._parsing.stored import SIZES, Checkpoint, Stored, Strided, Unreadable

MAX_MODEL = 2**31 - 1
"""Bytes of a model: protobuf's limit. Larger models keep their numbers in files beside them."""


@dataclass
class Beside:
    """Files beside a model with the numbers of its tensors."""

    model: Path
    files: dict[str, File | None] = field(default_factory=dict)

    def tensor(self, shape: tuple[int, ...], dtype: str, place: dict[str, str]) -> Stored:
        """The tensor at a place, as the model describes it: location, offset and length.

        Raises:
            CheckpointError: outside of the model's folder, or beyond the end of the file.
        """
        location = place.get("location", "")
        if location not in self.files:
            self.files[location] = self._file(location)
        file = self.files[location]
        if file is None:
            return Unreadable(shape, dtype, f"the numbers lie in {shown(location)}, which is missing beside the model")
        needed = math.prod(shape) * SIZES[dtype]
        offset, length = (_decimal(place.get(key), least) for key, least in (("offset", 0), ("length", needed)))
        if length < needed or offset + needed > file.size:
            raise CheckpointError(f"{shown(location)} beside the model is truncated or belongs to another model")
        return Strided(shape, dtype, Region(file, offset, needed))

    def _file(self, location: str) -> File | None:
        """The file, which must lie in the model's folder, or where links to both lead to one folder."""
        named = PureWindowsPath(location)  # knows both separators and drives
        if not location or "\0" in location or named.drive or named.root or ".." in named.parts:
            raise CheckpointError(f"the model refers to the file {shown(location)}, which is not in its folder")
        path = self.model.parent / location
        try:
            found = path.resolve()
            homes = {self.model.parent.resolve(), self.model.resolve().parent}
            exists = found.exists()
        except (OSError, RuntimeError):
            return None
        if not any(found.is_relative_to(home) for home in homes):
            raise CheckpointError(f"the model refers to the file {shown(location)}, which is not in its folder")
        return opened(found) if exists else None


def looks_like(head: bytes) -> bool:
    """Whether a file that begins so may be one: the first field is the version of the format, a small number."""
    return len(head) > 2 and head[0] == 0x08 and 0 < head[1] < 0x20


def read_file(path: Path, file: File) -> Checkpoint:
    """The initializers of a model by name, and its batch norm nodes.

    Raises:
        CheckpointError: the package is not installed; no ONNX model, damaged, or with numbers in files elsewhere.
    """
    if file.size > MAX_MODEL:
        raise CheckpointError(f"the model has {file.size} bytes: ONNX allows {MAX_MODEL}, and more in files beside it")
    job, beside = Job("ONNX", "onnx", "formats", file), Beside(path)
    found: dict[int, Stored] = {}
    tensors: dict[tuple[str, ...], Stored] = {}
    norms: list[Place[Stored]] = []
    try:
        for record in job.run():
            if "norm" in record:
                roles = {str(role): found[at] for role, at in record["tensors"].items()}
                norms.append(Place(well_formed(record["norm"]), "", roles, "ONNX", dict(record["settings"])))
            else:
                found[record["id"]] = _tensor(record, job, beside)
                if record["path"] is not None:
                    tensors[tuple(map(well_formed, record["path"]))] = found[record["id"]]
    except (AttributeError, KeyError, TypeError, ValueError):
        raise job.damaged from None
    size = file.size + sum(part.size for part in beside.files.values() if part is not None)
    return Checkpoint(path, "ONNX", tensors, tuple(norms), size)


def _tensor(record: dict[str, Any], job: Job, beside: Beside) -> Stored:
    shape, dtype = job.shape(record), str(record["dtype"])
    if dtype not in SIZES:
        return Unreadable(shape, dtype, f"tensors of type {shown(dtype, 20)} are not read")
    if "beside" in record:
        return beside.tensor(shape, dtype, dict(record["beside"]))
    if record.get("empty"):
        return Unreadable(shape, dtype, "the model does not hold the numbers of this tensor")
    return job.tensor(record, int(record["id"]))


def _decimal(text: str | None, default: int) -> int:
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise CheckpointError("the model is damaged: the place of a tensor beside it is no number")
    return int(text)
