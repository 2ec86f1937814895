"""The data readers: embedded digits, small files in the published formats, and damaged files."""

import gzip
import pickle
import struct
import warnings

import numpy as np
import pytest

from batchnorm.study import data
from batchnorm.study.data import DataError, load


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}i", *array.shape) + array.tobytes()


@pytest.fixture
def mnist(tmp_path):
    """A folder of MNIST's four files with 20 and 10 images of 4x3, and the arrays in them."""
    random = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": random.integers(0, 256, (20, 4, 3), dtype=np.uint8),
        "train-labels-idx1-ubyte": np.arange(20, dtype=np.uint8) % 10,
        "t10k-images-idx3-ubyte": random.integers(0, 256, (10, 4, 3), dtype=np.uint8),
        "t10k-labels-idx1-ubyte": np.arange(10, dtype=np.uint8),
    }
    for name, array in arrays.items():
        (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    return tmp_path, arrays


def test_digits_are_embedded_and_every_class_is_on_both_sides():
    digits = load("digits")
    assert (digits.inputs, digits.classes) == (64, 10)
    assert len(digits.train_x) + len(digits.test_x) == 1797
    assert set(digits.train_y) == set(digits.test_y) == set(range(10))
    assert digits.train_x.dtype == np.float32
    assert digits.train_x.min() == 0
    assert digits.train_x.max() == 1


def test_digits_are_cut_the_same_way_each_time():
    first, second = load("digits"), load("digits")
    np.testing.assert_array_equal(first.test_x, second.test_x)
    rows = {row.tobytes() for row in first.train_x}
    assert sum(row.tobytes() in rows for row in first.test_x) == 0, "a test image is among the training images"


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_idx_files_are_read_as_pixels_in_0_to_1(mnist, name):
    folder, arrays = mnist
    read = load(name, folder)
    np.testing.assert_allclose(read.train_x, arrays["train-images-idx3-ubyte"].reshape(20, 12) / 255, rtol=1e-6)
    np.testing.assert_array_equal(read.test_y, arrays["t10k-labels-idx1-ubyte"])
    assert read.classes == 10


def test_unpacked_idx_files_are_read_too(mnist):
    folder, arrays = mnist
    for path in list(folder.iterdir()):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
        path.unlink()
    np.testing.assert_array_equal(load("mnist", folder).train_y, arrays["train-labels-idx1-ubyte"])


def wrong_magic(content):
    return gzip.compress(b"\0\0\x0d" + gzip.decompress(content)[3:])


def enormous_shape(content):
    return gzip.compress(bytes([0, 0, 8, 3]) + struct.pack(">3i", 2**31 - 1, 2**31 - 1, 2**31 - 1))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "cannot be read"),
        (lambda content: b"not gzip at all", "cannot be read"),
        (lambda content: b"", "is not an IDX file"),
        (lambda content: gzip.compress(gzip.decompress(content)[:-1]), "does not have the 240 bytes"),
        (wrong_magic, "is not an IDX file"),
        (enormous_shape, "declares 99035203"),
    ],
    ids=["truncated gzip", "no gzip", "empty", "short", "wrong type", "enormous shape"],
)
def test_damaged_idx_files_get_one_line_that_names_the_file(mnist, damage, message):
    folder, _ = mnist
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message) as caught:
        load("mnist", folder)
    assert "train-images-idx3-ubyte" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(mnist):
    folder, _ = mnist
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match=r"no file t10k-labels-idx1-ubyte\.gz"):
        load("mnist", folder)


def test_images_and_labels_must_be_equally_many(mnist):
    folder, _ = mnist
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(19, np.uint8))))
    with pytest.raises(DataError, match="20 training images but 19 labels"):
        load("mnist", folder)


def test_no_images_are_refused(mnist):
    folder, _ = mnist
    (folder / "t10k-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros(0, np.uint8))))
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(np.zeros((0, 4, 3), np.uint8))))
    with pytest.raises(DataError, match="no test images"):
        load("mnist", folder)


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("t10k-images-idx3-ubyte", np.zeros((10, 2, 3), np.uint8), "12 pixels for training and 6 for the test"),
        ("t10k-labels-idx1-ubyte", np.full(10, 200, np.uint8), "test labels up to 200, training up to 9"),
        ("train-images-idx3-ubyte", np.zeros((20, 0, 28), np.uint8), "or they have no pixels"),
        ("train-labels-idx1-ubyte", np.full(20, 9, np.uint8), "a single class"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(mnist, name, array, message):
    folder, _ = mnist
    (folder / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
    with pytest.raises(DataError, match=message):
        load("mnist", folder)


def write_batches(folder, protocol=2, rows=2):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(1)
    written = {}
    for name in ["data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"]:
        images = random.integers(0, 256, (rows, 3072), dtype=np.uint8)
        written[name] = images
        batch = {b"batch_label": b"x", b"labels": [3, 9][:rows], b"data": images, b"filenames": [b"a.png"] * rows}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))
    return written


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("nested", [True, False])
def test_cifar_batches_are_read(tmp_path, protocol, nested):
    folder = tmp_path / "cifar-10-batches-py" if nested else tmp_path
    written = write_batches(folder, protocol)
    read = load("cifar10", tmp_path)
    assert read.train_x.shape == (10, 3072)
    np.testing.assert_allclose(read.test_x, written["test_batch"] / 255, rtol=1e-6)
    np.testing.assert_array_equal(read.test_y, [3, 9])


def test_cifar_batches_pickled_by_python_2_are_read(tmp_path):
    """The published files are of this form: byte strings for text, and numpy.core.multiarray by its old name."""
    write_batches(tmp_path)
    images = np.arange(3072, dtype=np.uint32).astype(np.uint8).reshape(1, 3072)
    raw = images.tobytes()
    dtype = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I1\nI3072\nt"
        + dtype
        + b"I00\nT"
        + struct.pack("<i", len(raw))
        + raw
        + b"tb"
    )
    old = b"(dS'labels'\n(lI7\nasS'data'\n" + array + b"s."
    (tmp_path / "test_batch").write_bytes(old)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read = load("cifar10", tmp_path)
    np.testing.assert_array_equal(read.test_y, [7])
    np.testing.assert_allclose(read.test_x, images / 255, rtol=1e-6)


class Evil:
    def __reduce__(self):
        return (print, ("EXECUTED",))


@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({b"data": Evil(), b"labels": []}),
        pickle.dumps(Evil()),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 1]})[:-20],
        pickle.dumps({b"data": np.zeros((2, 100), np.uint8), b"labels": [0, 1]}),
        pickle.dumps({b"data": np.zeros((2, 3072)), b"labels": [0, 1]}),
        pickle.dumps({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}),
        pickle.dumps([1, 2]),
        b"",
        b"garbage",
    ],
    ids=["code inside", "code", "truncated", "narrow", "floats", "few labels", "a list", "empty", "garbage"],
)
def test_an_invalid_batch_gets_one_line_and_runs_nothing(tmp_path, content, capsys):
    write_batches(tmp_path)
    (tmp_path / "data_batch_3").write_bytes(content)
    with pytest.raises(DataError, match="data_batch_3") as caught:
        load("cifar10", tmp_path)
    assert "\n" not in str(caught.value)
    assert "EXECUTED" not in capsys.readouterr().out


def test_unknown_names_and_folders_are_refused(tmp_path):
    with pytest.raises(DataError, match="use one of digits, mnist, fashion-mnist, cifar10"):
        load("imagenet")
    with pytest.raises(DataError, match="is not a folder"):
        load("mnist", tmp_path / "nowhere")
    with pytest.raises(DataError, match="digits is embedded"):
        load("digits", tmp_path)


def test_without_a_network_the_message_says_what_to_do(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("Name or service not known\nsecond line")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", offline)
    with pytest.raises(DataError, match=r"mnist could not be fetched.*data_dir=.*data='digits'") as caught:
        load("mnist")
    assert "\n" not in str(caught.value)


def test_openml_data_is_split_as_published(monkeypatch):
    class Bunch:
        data = np.arange(140_000, dtype=np.float64).reshape(70_000, 2) % 256
        target = np.array([str(i % 10) for i in range(70_000)], dtype=object)

    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *args, **kwargs: Bunch)
    read = load("mnist")
    assert (len(read.train_x), len(read.test_x)) == (60_000, 10_000)
    assert read.test_y.dtype == np.int64
    assert read.train_x.max() <= 1
    assert data._OPENML.keys() == set(data.NAMES) - {"digits"}
