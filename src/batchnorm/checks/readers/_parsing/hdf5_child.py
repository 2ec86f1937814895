"""A program that reads one HDF5 file and prints what it found, a line of JSON each. Run by `hdf5`, never imported.

libhdf5 can crash on a damaged file, or take any time and memory; here it takes down only this process, whose memory
and time are bounded. The program knows nothing of the package, so that it starts fast and without torch.

Input, one line of JSON: path; weights: [offset, packed, size, method], where the HDF5 file lies inside it, or null for
all of it; config: likewise, of a JSON text; want: a dataset whose values to print, or null for the directory.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import sys
import tempfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO

MAX_ADDRESSES = 2**31
"""Bytes of address space: what h5py and NumPy map when they are imported, and one tensor."""
MAX_SECONDS = 20
"""Processor time."""
MAX_UNPACKED = 2**30
"""Bytes of a compressed part that are unpacked, into a temporary file."""
MAX_CONFIG = 2**25
"""Bytes of a network's configuration in JSON."""
MAX_DATASETS = 2**16
MAX_NAMES = 2**23
"""Bytes of all names."""
MAX_NAME = 1024
MAX_OBJECTS = 2**18
"""Groups and datasets looked at."""
MAX_DEPTH = 64
AT_HAND = 2**16
"""Elements of a tensor of one dimension that is handed over at once: a norm's tensors and biases are."""
AT_HAND_ALL = 2**21
"""Elements of all of these."""
NORMS = ("BatchNormalization", "BatchNormalizationV1", "BatchNormalizationV2", "SyncBatchNormalization")


def limit() -> None:
    """Bound this process, where the system can."""
    try:
        import resource
    except ImportError:
        return
    for what, most in (
        (resource.RLIMIT_AS, MAX_ADDRESSES),
        (resource.RLIMIT_CPU, MAX_SECONDS),
        (resource.RLIMIT_FSIZE, MAX_UNPACKED),
        (resource.RLIMIT_CORE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # macOS knows no bound on addresses
            resource.setrlimit(what, (most, resource.getrlimit(what)[1]))


class Part(io.RawIOBase):
    """A run of bytes of a file, as a file."""

    def __init__(self, whole: BinaryIO, start: int, size: int) -> None:
        self.whole, self.start, self.size, self.at = whole, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = max(0, offset + (0, self.at, self.size)[whence])
        return self.at

    def tell(self) -> int:
        return self.at

    def readinto(self, buffer: Any) -> int:
        self.whole.seek(self.start + self.at)
        wanted = max(0, min(len(buffer), self.size - self.at))
        found = self.whole.read(wanted)
        buffer[: len(found)] = found
        self.at += len(found)
        return len(found)


def part(whole: BinaryIO, place: list[int] | None) -> Any:
    """The part of the file that `place` says, unpacked where it is deflated."""
    if place is None:
        return whole
    offset, packed, size, method = place
    if method == 0:
        return Part(whole, offset, size)
    if size > MAX_UNPACKED:
        raise ValueError("a compressed part is too large: store it uncompressed")
    unpacked = tempfile.TemporaryFile()  # noqa: SIM115 (it lives as long as the process)
    whole.seek(offset)
    unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
    written = 0
    while packed and not unpacker.eof:
        block = whole.read(min(packed, 2**16))
        if not block:
            break
        packed -= len(block)
        while block and written <= size:
            piece = unpacker.decompress(block, 2**20)
            written += len(piece)
            unpacked.write(piece)
            block = unpacker.unconsumed_tail
    if written != size:
        raise ValueError("a compressed part is damaged")
    unpacked.seek(0)
    return unpacked


def datasets(group: Any, h5py: Any) -> Iterator[tuple[str, Any]]:
    """Every dataset of numbers, by path. Links out of the file, or to where one is already, are not followed.

    Groups come sorted by name, but for those in which Keras lists the order of its layers and their tensors.
    """
    seen = {h5py.h5o.get_info(group.id).addr}
    rank: dict[str, int] = {}
    waiting: list[Iterator[tuple[str, Any]]] = [iter([("", group)])]
    looked = names = found = 0
    while waiting:
        path, entry = next(waiting[-1], ("", None))
        if entry is None:
            waiting.pop()
        elif isinstance(entry, h5py.Dataset):
            names += len(path)
            found += 1
            if found > MAX_DATASETS or names > MAX_NAMES:
                raise ValueError("there are too many tensors in it")
            yield path, entry
        else:
            children = []
            for name in entry:
                looked += 1
                if looked > MAX_OBJECTS or len(waiting) > MAX_DEPTH or len(path) > 4096:
                    raise ValueError("it has too many groups")
                if not isinstance(entry.get(name, getlink=True), h5py.HardLink):
                    continue
                child = entry.get(name)
                if not isinstance(child, h5py.Group | h5py.Dataset):
                    continue
                address = h5py.h5o.get_info(child.id).addr
                if isinstance(child, h5py.Dataset) or address not in seen:
                    seen.add(address)
                    children.append((f"{path}/{name}" if path else name, child))
            for name in listed(entry):
                parts = f"{path}/{name}".strip("/").split("/")
                for end in range(1, len(parts) + 1):
                    rank.setdefault("/".join(parts[:end]), len(rank))
            children.sort(key=lambda child: rank.get(child[0], len(rank)))
            waiting.append(iter(children))


def listed(group: Any) -> list[str]:
    """What Keras says lies in a group, in the network's order; in pieces where the list is long."""
    found: list[str] = []
    for what in ("layer_names", "weight_names"):
        keys = [what] if what in group.attrs else [key for at in range(64) if (key := f"{what}{at}") in group.attrs]
        for key in keys:
            names = group.attrs[key]
            if getattr(names, "ndim", 0) == 1:
                found += [text(name)[:MAX_NAME] for name in names[: MAX_DATASETS - len(found)].tolist()]
    return found


def kind(dataset: Any) -> str | None:
    """The type of its numbers; None where it holds none."""
    dtype = dataset.dtype
    if dtype.kind == "V" and dtype.itemsize == 2 and text(dataset.attrs.get("dtype")) == "bfloat16":
        return "bfloat16"
    return str(dtype.newbyteorder("=").name) if dtype.kind in "fiub" else None


def values(dataset: Any) -> Any:
    """Its numbers as float64."""
    import numpy as np

    if dataset.external or dataset.is_virtual:
        raise ValueError("its numbers lie in another file")
    raw = dataset[()]
    if raw.dtype.kind == "V":
        raw = (np.frombuffer(raw.tobytes(), "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32)
    return np.asarray(raw, dtype="<f8").reshape(dataset.shape)


def text(value: Any) -> str:
    """A string attribute; the empty one where it is none."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value if isinstance(value, str) else ""


def layers(config: Any) -> list[dict[str, Any]]:
    """The configurations of the batch norm layers in a network's, in their order, in networks inside it too."""
    found = []
    waiting = [config]
    while waiting:
        entry = waiting.pop()
        if isinstance(entry, dict):
            inner = entry.get("config")
            if entry.get("class_name") in NORMS and isinstance(inner, dict):
                found.append(inner)
            waiting += reversed(entry.values())
        elif isinstance(entry, list):
            waiting += reversed(entry)
    return found


def directory(file: Any, config: Any, h5py: Any) -> Iterator[dict[str, Any]]:
    """A record for each tensor, each group of numbered tensors whose layer is named, and each norm's configuration."""
    groups: set[str] = set()
    left = AT_HAND_ALL
    for path, dataset in datasets(file, h5py):
        dtype = kind(dataset)
        if dtype is None or dataset.shape is None:
            continue
        record = {"tensor": path, "shape": dataset.shape, "dtype": dtype}
        if len(dataset.shape) == 1 and dataset.shape[0] <= min(AT_HAND, left):
            left -= dataset.shape[0]
            with contextlib.suppress(Exception):  # asked for again by those who need it, who are told why not
                record["values"] = base64.b64encode(values(dataset).tobytes()).decode()
        yield record
        group = path.rpartition("/")[0]
        if group.rpartition("/")[2] == "vars" and group not in groups:
            groups.add(group)
            yield {"group": group, "owner": text(file[group].attrs.get("name"))[:MAX_NAME]}
    if config is None and "model_config" in file.attrs:
        config = json.loads(text(file.attrs["model_config"]) or "null")
    for layer in layers(config):
        scalars = {key: layer.get(key) for key in ("name", "epsilon", "momentum", "scale", "center") if key in layer}
        yield {"layer": {key: value for key, value in scalars.items() if not isinstance(value, dict | list)}}


def say(record: dict[str, Any]) -> None:
    """Print a record."""
    sys.stdout.write(json.dumps(record) + "\n")


def main() -> None:
    """Print the records that are asked for, and a last one that says whether that was all."""
    limit()
    job = json.loads(sys.stdin.readline())
    try:
        import h5py

        with open(job["path"], "rb") as whole:
            config = None
            if job["config"] is not None:
                config = json.loads(part(whole, job["config"]).read(MAX_CONFIG))
            source = part(whole, job["weights"])
            with h5py.File(job["path"] if source is whole else source, "r") as file:
                if job["want"] is None:
                    records: Any = directory(file, config, h5py)
                else:
                    found = values(file[job["want"]])
                    records = [{"values": base64.b64encode(found.tobytes()).decode()}]
                for record in records:
                    say(record)
        say({"end": None})
    except Exception as error:  # of whatever kind: libhdf5's have no common one
        say({"end": f"{type(error).__name__}: {error}"[:300]})


if __name__ == "__main__":
    main()
