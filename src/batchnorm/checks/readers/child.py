"""The program that reads one file, in a process that `guard` watches: it recognizes the format, prints the tensors."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import re
import sys
import zipfile
from pathlib import Path

from batchnorm.checks.readers.directory import INDEX, MAX_TENSORS, UNREAD, Directory, RefusedError, explained, size_of

MAX_SECONDS = 5
"""Seconds of processor time for a small file, without the import of its library."""
MAX_MEMORY, COPIES = 2**30, 4
"""Bytes of private memory, plus this many times the size of the file; the guard usually stops the process before."""
MAX_SHARDS = 1024
MODULES = {"safetensors": "safetensors", "ONNX": "onnx", "HDF5": "hdf5", "Keras": "hdf5", "torch.export": "export"}
"""Which module reads a format, if not `pytorch`."""


def read(path: Path, found: Directory) -> None:
    """Add the content of a file. Raises RefusedError."""
    found.size += path.stat().st_size
    with path.open("rb") as file:
        head = file.read(4096)
    for mark, what in UNREAD.items():
        if path.name.endswith(mark) if isinstance(mark, str) else re.match(mark, head, re.DOTALL):
            raise RefusedError(what)
    found.format = _zip_format(path) if head.startswith(b"PK") else _format(path, head)
    module = importlib.import_module(f"batchnorm.checks.readers.{MODULES.get(found.format, 'pytorch')}")
    module.read(path, found)


def _format(path: Path, head: bytes) -> str:
    """What the content says; only ONNX goes by its suffix too."""
    suffix, length = path.suffix.lower(), int.from_bytes(head[:8], "little")
    formats = {
        "HDF5": any(head.startswith(b"\x89HDF\r\n\x1a\n", at) for at in (0, 512, 1024, 2048)),
        "safetensors": suffix == ".safetensors" or (head[8:9] == b"{" and 2 <= length <= path.stat().st_size - 8),
        "pickle": head[0] == 0x80 or suffix == ".pkl",
        "ONNX": suffix == ".onnx" or (len(head) > 2 and head[0] == 0x08 and 0 < head[1] < 0x20),
    }
    for name in formats:
        if formats[name]:
            return name
    raise RefusedError("no checkpoint of a known kind: PyTorch, safetensors, ONNX, HDF5, Keras and .npz are read")


def _zip_format(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    inner = {name.partition("/")[2] for name in names}
    if len({*names}) < len(names):
        raise RefusedError("the archive is damaged: two entries have the same name")
    if "constants.pkl" in inner:
        raise RefusedError("a TorchScript archive holds code: torch.jit.load it and save its state_dict()")
    if {"models/model.json", "data/weights/model_weights_config.json"} <= inner:
        return "torch.export"
    if inner & {"archive_format", "archive_version"} or "serialized_exported_program.json" in {*names} | inner:
        raise RefusedError(
            "a program of an old or compiled kind: torch.export.load it and pass the program to batchnorm.check"
        )
    if "model.weights.h5" in names:
        return "Keras"
    if "data.pkl" in inner:
        return "PyTorch"
    if names and all(name.endswith(".npy") for name in names):
        return "NumPy"
    raise RefusedError("a zip archive, but neither of torch.save nor of Keras nor of numpy.savez")


def read_shards(path: Path, found: Directory) -> None:
    """Add the tensors of all shards of an index, {"weight_map": {tensor: file}}. Raises RefusedError."""
    found.size += path.stat().st_size
    try:
        names = json.loads(path.read_bytes())["weight_map"]
        shards = sorted(set(names.values()))
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise RefusedError("the index is damaged: it is not the JSON of a checkpoint's index") from None
    if not 0 < len(shards) <= MAX_SHARDS or len(names) > MAX_TENSORS:
        raise RefusedError(f"the index names {len(shards)} files: a checkpoint has 1 to {MAX_SHARDS}")
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or shard in (".", "..") or "\\" in shard:
            raise RefusedError(f"the index names the file {shard!s:.80}, which is not beside it")
        if not (path.parent / shard).is_file():
            raise RefusedError(f"the index names the file {shard}, and there is no such file beside it")
        read(path.parent / shard, found)
    if found.norms:  # their positions would change with the order
        raise RefusedError(f"the index names files of {found.format}: those of safetensors and PyTorch are read")
    order = {name: at for at, name in enumerate(names)}
    for name in order.keys() - {record["path"][-1] for record in found.tensors}:
        raise RefusedError(f"the index names the tensor {name:.80}, which its file does not hold")
    found.tensors.sort(key=lambda record: order.get(record["path"][-1], len(order)))


def limit(size: int) -> None:
    """Bound this process's processor time and memory, deny it the network and new files, where the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        spent = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(spent.ru_utime + spent.ru_stime) + MAX_SECONDS + (size >> 26)
        memory = MAX_MEMORY + COPIES * size  # private memory, pages of a file that is mapped too
        for name, most in (("CPU", seconds), ("DATA", memory), ("FSIZE", 2**27), ("CORE", 0)):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (most, most + 1))  # CPU: SIGXCPU before SIGKILL
    if sys.platform != "linux":
        return
    with contextlib.suppress(OSError, AttributeError):
        libc, network, user = ctypes.CDLL(None), 0x40000000, 0x10000000
        if libc.unshare(network):  # a namespace without a network
            libc.unshare(network | user)
        writes = 0x1FF2.to_bytes(8, "little")  # Landlock's rights to write, create and remove files
        rules = libc.syscall(444, writes, 8, 0)
        if rules >= 0 and not libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS, which Landlock asks for
            libc.syscall(446, rules, 0)


def main() -> None:
    """Read the file that the command line names, and print what it holds or why it is not read."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries may print
    path, found = Path(sys.argv[1]), Directory()
    limit(size_of(path))
    try:
        (read_shards if path.name.endswith(INDEX) else read)(path, found)
        line = _line({name: vars(found)[name] for name in ("format", "size", "tensors", "norms", "modules")})
    except Exception as error:  # of whatever kind: the libraries' have no common one
        says = " ".join(f"{error}".partition(" (Could this error")[0].split())
        what = f"the file is truncated or damaged: {found.format or 'zip'}: {type(error).__name__}: {says}"
        if isinstance(error, MemoryError) or "allocate memory" in says:
            what = "the file takes too much memory to be read: it is damaged or hostile"
        line, found.numbers = _line({"error": explained(error, what)[:2000]}), bytearray()
    output.write(line + found.numbers)
    output.flush()
    os._exit(0)  # what the libraries do at exit has no use here


def _line(answer: object) -> bytes:
    """Halves of surrogate pairs become question marks."""
    return json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace") + b"\n"
