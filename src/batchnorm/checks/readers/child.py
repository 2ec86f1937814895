"""The program that reads one file, in a process that `guard` watches: it recognizes the format, prints the tensors."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import sys
import tempfile
import zipfile
from pathlib import Path

from batchnorm.checks.readers.directory import INDEX, MAX_TENSORS, Directory, RefusedError, size_of, well_formed
from batchnorm.importing import with_install_hint

MAX_SECONDS = 5
"""Seconds of processor time for a small file, without the import of its library."""
MAX_MEMORY, COPIES = 2**30, 4
"""Bytes of private memory, plus this many times the size of the file; the guard usually stops the process before."""
MAX_WRITTEN = 2**30
"""The most bytes that this process writes to a file: its output, or an unpacked part of an archive."""
WRITES = 0x1FF2
"""Landlock's rights to write, create and remove files. This process gives them up: its output is open already."""
MAX_INDEX, MAX_SHARDS = 2**24, 1024
"""Bytes of an index of shards, and files that it names."""
MARK = b"\x89HDF\r\n\x1a\n"
LOAD = "a checkpoint of TensorFlow: load it in Keras and save the model as .keras or .h5"
ENDINGS = {
    ".msgpack": "msgpack of Flax: flax.serialization.msgpack_restore and batchnorm.conventions.from_flax make of it a "
    "state dict",
    ".distcp": "a part of a checkpoint of torch.distributed.checkpoint: make one file of its folder with "
    "torch.distributed.checkpoint.format_utils.dcp_to_torch_save(folder, file)",
    "saved_model.pb": "a SavedModel of TensorFlow: convert it with tf2onnx, or save the model as .keras or .h5",
} | dict.fromkeys((".index", ".data-00000-of-00001", ".tflite"), LOAD)
BEGINNINGS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file: `git lfs pull` fetches it",
    b"<": "a web page, not the file: the download failed",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"BZh": "compressed with bzip2: unpack it first",
    b"\xfd7zXZ": "compressed with xz: unpack it first",
    b"\x93NUMPY": "a NumPy array, not a checkpoint",
    b"model_checkpoint_path:": LOAD,
    b"GGUF": "a GGUF file, which holds no batch norm: check the checkpoint that it was made of",
}
"""Known file types that are not read, by the end of the name or the first bytes, with advice."""


def read(path: Path, found: Directory) -> None:
    """Add what a file holds; its content decides the format, only ONNX goes by its suffix too."""
    size, suffix = path.stat().st_size, path.suffix.lower()
    found.found["size"] += size
    with path.open("rb") as file:
        head = file.read(4096)
    length = int.from_bytes(head[:8], "little")
    for refused in [what for end, what in ENDINGS.items() if path.name.endswith(end)] + [
        what for start, what in BEGINNINGS.items() if head.startswith(start)
    ]:
        raise RefusedError(refused)
    if not head:
        raise RefusedError("the file is empty")
    if head[257:262] == b"ustar":
        raise RefusedError("a tar archive: torch.save wrote those before 0.1.10; load it with torch and save it again")
    if head.startswith(b"PK"):
        reader = _zip_reader(path)
    elif any(head[at : at + 8] == MARK for at in (0, 512, 1024, 2048)):
        reader = ("hdf5", "read", "HDF5")
    elif suffix == ".safetensors" or (head[8:9] == b"{" and 2 <= length <= size - 8):
        reader = ("safetensors", "read", "safetensors")
    elif head[:1] == b"\x80" or suffix == ".pkl":
        reader = ("pytorch", "read_legacy", "pickle")
    elif suffix == ".onnx" or (len(head) > 2 and head[0] == 0x08 and 0 < head[1] < 0x20):
        reader = ("onnx", "read", "ONNX")
    else:
        raise RefusedError("no checkpoint of a known kind: PyTorch, safetensors, ONNX, HDF5, Keras and .npz are read")
    module, function, found.found["format"] = reader
    getattr(importlib.import_module(f"batchnorm.checks.readers.{module}"), function)(path, found)


def _zip_reader(path: Path) -> tuple[str, str, str]:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    inner = {name.partition("/")[2] for name in names}
    if len({*names}) < len(names):
        raise RefusedError("the archive is damaged: two entries have the same name")
    if "constants.pkl" in inner:
        raise RefusedError("a TorchScript archive holds code: torch.jit.load it and save its state_dict()")
    if inner & {"archive_format", "archive_version", "models/model.json", "serialized_exported_program.json"}:
        raise RefusedError("a program of torch.export: torch.export.load it and save its state_dict with torch.save")
    if "model.weights.h5" in names:
        return "hdf5", "read_keras", "Keras"
    if "data.pkl" in inner:
        return "pytorch", "read_zip", "PyTorch"
    if names and all(name.endswith(".npy") for name in names):
        return "pytorch", "read_npz", "NumPy"
    raise RefusedError("a zip archive, but neither of torch.save nor of Keras nor of numpy.savez")


def read_shards(path: Path, found: Directory) -> None:
    """Add the tensors of every shard that an index names: {"weight_map": {tensor: file}}."""
    found.found["size"] += path.stat().st_size
    if found.found["size"] > MAX_INDEX:
        raise RefusedError(f"the index has more bytes than any checkpoint needs: {MAX_INDEX}")
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
    order, tensors = {well_formed(name): at for at, name in enumerate(names)}, found.found["tensors"]
    for name in order.keys() - {record["path"][-1] for record in tensors}:
        raise RefusedError(f"the index names the tensor {name:.80}, which its file does not hold")
    tensors.sort(key=lambda record: order.get(record["path"][-1], len(order)))


def limit(size: int) -> None:
    """Bound this process's processor time and memory, deny it the network and new files, where the system can."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        spent = resource.getrusage(resource.RUSAGE_SELF)
        seconds = int(spent.ru_utime + spent.ru_stime) + MAX_SECONDS + (size >> 26)
        resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
        memory = MAX_MEMORY + COPIES * size
        resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))  # private memory, pages of a file that is mapped too
        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_WRITTEN, MAX_WRITTEN))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc, network, user = ctypes.CDLL(None), 0x40000000, 0x10000000
        if sys.platform == "linux" and libc.unshare(network):  # a namespace without a network
            libc.unshare(network | user)
        rules = libc.syscall(444, WRITES.to_bytes(8, "little"), 8, 0) if sys.platform == "linux" else -1
        if rules >= 0 and not libc.prctl(38, 1, 0, 0, 0):  # PR_SET_NO_NEW_PRIVS, which Landlock asks for
            libc.syscall(446, rules, 0)


def main() -> None:
    """Read the file that the command line names, and print what it holds or why it is not read."""
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # libraries may print
    scratch = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process; opened before files are denied)
    path, found, what = Path(sys.argv[1]), Directory(scratch), ""
    limit(size_of(path))
    try:
        (read_shards if path.name.endswith(INDEX) else read)(path, found)
        found.write(output)
    except RefusedError as error:
        what = str(error)
    except ModuleNotFoundError as error:
        what = str(with_install_hint(error))
    except Exception as error:  # of whatever kind: the libraries' have no common one
        says = " ".join(f"{error}".partition(" (Could this error")[0].split())
        if isinstance(error, MemoryError) or "allocate memory" in says:
            what = "the file takes too much memory to be read: it is damaged or hostile"
        else:
            what = f"the file is truncated or damaged: {found.found['format'] or 'zip'}: {type(error).__name__}: {says}"
    if what:
        output.write(json.dumps({"error": what[:2000]}).encode() + b"\n")
    output.flush()
    os._exit(0)  # what the libraries do at exit has no use here
