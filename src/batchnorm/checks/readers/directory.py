"""What the child found in a file: its tensors, with the numbers of the small ones, and its batch norm layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.importing import with_install_hint

INDEX = ".index.json"
MAX_TENSORS = 2**16
"""No network has more. Their names may have 128 characters each, on average."""
LARGEST = 2**20
"""Elements of the largest vector whose numbers are read: those of a norm and of a bias are vectors.

Other tensors, which `check` needs only where a norm is damaged, may have 256 times fewer.
"""
TENSORFLOW = "a checkpoint of TensorFlow: load it in Keras and save the model as .keras or .h5"
UNREAD: dict[str | bytes, str] = {
    "/.metadata": "a checkpoint of torch.distributed.checkpoint: make one file of it with "
    "torch.distributed.checkpoint.format_utils.dcp_to_torch_save(folder, file)",
    ".distcp": "a part of a checkpoint of torch.distributed.checkpoint: make one file of its folder with "
    "torch.distributed.checkpoint.format_utils.dcp_to_torch_save(folder, file)",
    "saved_model.pb": "a SavedModel of TensorFlow: convert it with tf2onnx, or save the model as .keras or .h5",
    "/checkpoint": "a checkpoint of TensorFlow or Flax: load it there, and save the model as .keras, .h5 or .npz",
    "/_CHECKPOINT_METADATA": "a checkpoint of Orbax: restore it in JAX and save its arrays with numpy.savez",
    ".msgpack": "msgpack of Flax: flax.serialization.msgpack_restore and batchnorm.conventions.from_flax make of it a "
    "state dict",
    **dict.fromkeys((".index", ".data-00000-of-00001", ".tflite", b"model_checkpoint_path:"), TENSORFLOW),
    rb"\Z": "the file is empty",
    b".{257}ustar": "a tar archive: torch.save wrote those before 0.1.10; load it with torch and save it again",
    b"version https://git-lfs": "a pointer of Git LFS, not the file: `git lfs pull` fetches it",
    b"<": "a web page, not the file: the download failed",
    b"\x1f\x8b": "compressed with gzip: unpack it first",
    b"BZh": "compressed with bzip2: unpack it first",
    b"\xfd7zXZ": "compressed with xz: unpack it first",
    b"\x93NUMPY": "a NumPy array, not a checkpoint",
    b"GGUF": "a GGUF file, which holds no batch norm: check the checkpoint that it was made of",
}
"""What is not read, and advice: by the end of a name ("/" where only a folder has such files), or a pattern of the
first bytes."""


class RefusedError(Exception):
    """Why a file or the numbers of a tensor are not read, in words for the user."""


class Directory:
    """Collects the tensors and layers of a file."""

    def __init__(self) -> None:
        self.format, self.size = "", 0
        self.tensors: list[dict[str, Any]] = []
        self.norms: list[tuple[str, dict[str, int], str, dict[str, Any]]] = []
        """Of batch norm layers: name, positions of its tensors by role, framework, settings."""
        self.modules: list[tuple[tuple[str, ...], str, dict[str, Any]]] = []
        """Of modules in a pickle or a graph: keys of containers, name, settings."""
        self.numbers = bytearray()
        self._names = 0
        self._left = {True: 4 * LARGEST, False: LARGEST // 4}

    def tensor(
        self,
        path: tuple[str, ...],
        shape: Sequence[int],
        dtype: str,
        values: Callable[[], Any],
        stored: Sequence[int] | None = None,
        key: str = "",
    ) -> int:
        """Add a tensor and return its position. Raises RefusedError if there are too many tensors.

        `path` has the keys of its containers, then its name; it is empty for one that a model computes. `values`
        returns the numbers as an array of NumPy or torch, and is called only where they are few. `stored` are the sizes
        without those along which it is expanded. `key` is equal for tensors that share their memory.
        """
        self._names += sum(map(len, path)) + len(dtype)
        if len(self.tensors) >= MAX_TENSORS or self._names > 128 * MAX_TENSORS:
            raise RefusedError(f"the file holds more than {MAX_TENSORS} tensors")
        sizes, stored = [*map(int, shape)], [*map(int, shape if stored is None else stored)]
        record: dict[str, Any] = {"path": path, "shape": sizes, "dtype": dtype, "key": key}
        is_vector, count = sum(size > 1 for size in stored) < 2, math.prod(stored)
        if 0 <= count <= min(LARGEST if is_vector else LARGEST // 256, self._left[is_vector]):
            self._left[is_vector] -= count
            try:
                array = _as_float64(values()).reshape(stored)
                record |= {"at": len(self.numbers), "stored": stored}
                self.numbers += array.tobytes()
            except Exception as error:
                record["why"] = explained(error, f"{dtype} cannot be read: {error}")
        else:
            record["why"] = f"a tensor of shape {sizes} is not read: only vectors of at most {LARGEST} elements are"
        self.tensors.append(record)
        return len(self.tensors) - 1


def explained(error: Exception, otherwise: str) -> str:
    """What the user reads of an error: its own words, or `otherwise` where a library raised it."""
    if isinstance(error, ModuleNotFoundError):
        return str(with_install_hint(error))
    return str(error) if isinstance(error, RefusedError) else otherwise


def _as_float64(values: Any) -> np.ndarray:
    if hasattr(values, "is_complex") and not values.is_complex():  # torch knows types that NumPy does not
        values = values.double()
    array = np.asarray(values)
    if array.dtype.kind not in "fiubV":  # V: bfloat16 and float8 of ml_dtypes
        raise RefusedError(f"tensors of type {array.dtype} are not read")
    with np.errstate(all="ignore"):  # signalling NaN
        return array.astype("<f8")


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files beside an index of shards: limits grow with them."""
    files = path.parent.iterdir() if path.name.endswith(INDEX) else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
