"""Load the study's images: embedded in scikit-learn, from the published files, or from OpenML.

    digits           1,797 images of 8x8, inside scikit-learn
    mnist            60,000 + 10,000 of 28x28, four IDX .gz files
    fashion-mnist    the same format
    cifar10          50,000 + 10,000 of 32x32x3, the Python batches

Files are not trusted: sizes are checked before memory is allocated, and a pickle that names code is refused.
"""

from __future__ import annotations

import gzip
import math
import os
import pickle
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.float32]
Labels = NDArray[np.int64]

NAMES = ("digits", "mnist", "fashion-mnist", "cifar10")
_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_LARGEST_FILE = 2**30
_OPENML = {"mnist": ("mnist_784", 60_000), "fashion-mnist": ("Fashion-MNIST", 60_000), "cifar10": ("CIFAR_10", 50_000)}


class DataError(Exception):
    """Data is missing or invalid. The message is one line and says what to do."""


class DataArgumentError(DataError):
    """The arguments of `load` exclude each other or name no data set."""


@dataclass(frozen=True)
class Data:
    """Images as rows of pixels in 0..1, float32 (N, inputs), and their classes, int64 (N,)."""

    name: str
    train_x: Pixels
    train_y: Labels
    test_x: Pixels
    test_y: Labels

    @property
    def inputs(self) -> int:
        return int(self.train_x.shape[1])

    @property
    def classes(self) -> int:
        return int(self.train_y.max()) + 1


def load(data: str, data_dir: str | os.PathLike[str] | None = None) -> Data:
    """Load the data set `data` from files in the folder `data_dir`, from scikit-learn (digits), or from OpenML.

    Raises DataError for an unknown data set, for missing, truncated or invalid files, and without a network.
    """
    if data not in NAMES:
        raise DataArgumentError(f"unknown data={data!r}: use one of {', '.join(NAMES)}")
    if data == "digits":
        if data_dir is not None:
            raise DataArgumentError(
                "digits is embedded in scikit-learn: leave out data_dir=..., or choose another data=..."
            )
        return _digits()
    if data_dir is None:
        return _validate(_from_openml(data), f"{data} as OpenML sent it")
    path = Path(data_dir)
    if not path.is_dir():
        raise DataError(f"{path} is not a folder: data_dir=... names the folder that holds the files of {data}")
    read: Callable[[Path], tuple[Pixels, Labels, Pixels, Labels]] = _cifar10 if data == "cifar10" else _idx
    return _validate(Data(data, *read(path)), str(path))


def _validate(data: Data, source: str) -> Data:
    """Return the data. Raises DataError if images, labels, training and test set do not fit together."""
    remedy = "fetch the files again"
    for kind, images, labels in (("training", data.train_x, data.train_y), ("test", data.test_x, data.test_y)):
        if len(images) != len(labels):
            raise DataError(f"{source} has {len(images)} {kind} images but {len(labels)} labels: {remedy}")
        if images.size == 0:
            raise DataError(f"{source} has no {kind} images, or they have no pixels: {remedy}")
    if data.train_x.shape[1] != data.test_x.shape[1]:
        sizes = f"{data.train_x.shape[1]} pixels for training and {data.test_x.shape[1]} for the test"
        raise DataError(f"{source} has images of {sizes}: {remedy}")
    if data.test_y.max() >= data.classes:
        raise DataError(
            f"{source} has test labels up to {data.test_y.max()}, training up to {data.classes - 1}: {remedy}"
        )
    if data.train_y.min() == data.train_y.max():
        raise DataError(f"{source} has a single class, so there is nothing to learn: {remedy}")
    return data


def _digits() -> Data:
    from sklearn.datasets import load_digits

    bunch = load_digits()
    # The images are ordered in rounds of 0 to 9, so a regular split would hold out some digits completely.
    order = np.random.default_rng(0).permutation(len(bunch.data))
    x, y = (bunch.data[order] / 16).astype(np.float32), bunch.target[order].astype(np.int64)
    held_out = len(x) // 5
    return Data("digits", x[held_out:], y[held_out:], x[:held_out], y[:held_out])


def _from_openml(name: str) -> Data:
    from sklearn.datasets import fetch_openml

    dataset, train = _OPENML[name]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # one per retry; the error below is enough
            bunch = fetch_openml(dataset, version=1, as_frame=False, parser="liac-arff")
    except Exception as error:  # the types depend on the transport and differ between versions
        raise DataError(
            f"{name} could not be fetched from OpenML ({type(error).__name__}: {_first_line(error)}): "
            "pass the folder with its files as data_dir=..., or use data='digits', which needs no network"
        ) from error
    x, y = (bunch.data / 255).astype(np.float32), bunch.target.astype(np.int64)
    return Data(name, x[:train], y[:train], x[train:], y[train:])


# --- MNIST's IDX ------------------------------------------------------------------------------------------------------


def _idx(folder: Path) -> tuple[Pixels, Labels, Pixels, Labels]:
    found = ((_find(folder, f"{name}.gz", name), 3 if "images" in name else 1) for name in _IDX_FILES)
    train_x, train_y, test_x, test_y = (_read_idx(path, dims) for path, dims in found)
    return _pixels(train_x), train_y.astype(np.int64), _pixels(test_x), test_y.astype(np.int64)


def _read_idx(path: Path, dims: int) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes: 0, 0, 8, the number of dimensions, the lengths as big-endian int32, the bytes."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            header = file.read(4 + 4 * dims)
            if len(header) < 4 + 4 * dims or header[:4] != bytes([0, 0, 8, dims]):
                raise DataError(f"{path} is not an IDX file of bytes in {dims} dimensions: fetch the published file")
            shape = [int.from_bytes(header[4 + 4 * i : 8 + 4 * i], "big") for i in range(dims)]
            expected = math.prod(shape)
            if expected > _LARGEST_FILE:
                raise DataError(f"{path} declares {expected} bytes: fetch the published file")
            content = file.read(expected + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({_first_line(error)}): fetch it again") from error
    if len(content) != expected:
        raise DataError(f"{path} does not have the {expected} bytes it declares: it is damaged, fetch it again")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _pixels(images: NDArray[np.uint8]) -> Pixels:
    return images.reshape(len(images), math.prod(images.shape[1:])).astype(np.float32) / np.float32(255)


# --- CIFAR-10's python batches ----------------------------------------------------------------------------------------


def _cifar10(folder: Path) -> tuple[Pixels, Labels, Pixels, Labels]:
    nested = folder / "cifar-10-batches-py"
    folder = nested if nested.is_dir() else folder
    train = [_read_batch(_find(folder, f"data_batch_{i}")) for i in range(1, 6)]
    test_x, test_y = _read_batch(_find(folder, "test_batch"))
    return np.concatenate([x for x, _ in train]), np.concatenate([y for _, y in train]), test_x, test_y


class _ArraysOnly(pickle.Unpickler):
    """Unpickles NumPy arrays and plain containers; refuses everything else."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return lambda *_: np.zeros(0, np.int8)
        if (module, name) in (("numpy", "ndarray"), ("numpy", "dtype")):
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode("latin-1")
        raise pickle.UnpicklingError(f"it names {module}.{name}, which is not data")


def _read_batch(path: Path) -> tuple[Pixels, Labels]:
    try:
        with path.open("rb") as file:
            batch = _ArraysOnly(file, encoding="bytes").load()
        images = np.asarray(batch[b"data"] if b"data" in batch else batch["data"])
        labels = np.asarray(batch[b"labels"] if b"labels" in batch else batch["labels"])
    except Exception as error:  # a damaged pickle raises almost anything
        raise DataError(f"{path} is not a CIFAR-10 python batch ({_first_line(error)}): fetch it again") from error
    if images.dtype != np.uint8 or images.ndim != 2 or images.shape[1] != 3072 or labels.shape != images.shape[:1]:
        raise DataError(f"{path} has no CIFAR-10 images (3,072 bytes each, with a label): fetch it again")
    return _pixels(images), labels.astype(np.int64)


def _find(folder: Path, *names: str) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise DataError(f"{folder} has no file {names[0]}: data_dir=... names the folder with the published files")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
