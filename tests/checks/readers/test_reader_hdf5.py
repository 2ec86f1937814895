"""HDF5 and Keras files, against h5py and Keras."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from seeds import hdf5_file, keras_archive

from batchnorm.checks.layers import ROLES, Place
from batchnorm.checks.readers import CheckpointError, read

h5py = pytest.importorskip("h5py")


def values(norm: Place) -> list[list[float] | None]:
    found = map(norm.tensors.get, ("gamma", "beta", "running_mean", "running_var"))
    return [None if at is None else at.values().tolist() for at in found]


def test_whole_model_of_keras_2(tmp_path: Path) -> None:
    path = tmp_path / "model.h5"
    path.write_bytes(hdf5_file())
    found = read(path)
    assert found.format == "HDF5"
    with h5py.File(path) as file:
        expected: dict[str, Any] = {}
        file.visititems(
            lambda name, item: expected.update({name: item[()]}) if isinstance(item, h5py.Dataset) else None
        )
    assert {"/".join(name) for name in found.tensors} == set(expected)
    for name, stored in found.tensors.items():
        array = expected["/".join(name)]
        assert (stored.shape, stored.dtype) == (array.shape, str(array.dtype))
        np.testing.assert_array_equal(stored.values(), array)
    bn1, deep = found.norms
    assert (bn1.name, bn1.settings) == ("bn1", {"eps": 1e-5, "momentum": 0.1})
    assert values(bn1) == [[at, at + 1, at + 2, at + 3] for at in range(4)]
    assert (deep.name, deep.settings) == ("deep", {"eps": 1e-3, "momentum": 0.01})
    assert values(deep) == [None, [10, 11, 12], [20, 21, 22], [30, 31, 32]]


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_archive_of_keras_3(method: int, tmp_path: Path) -> None:
    (tmp_path / "stored.keras").write_bytes(keras_archive())
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(tmp_path / "stored.keras") as archive, zipfile.ZipFile(path, "w", method) as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    found = read(path)
    assert found.format == "Keras"
    a, b = found.norms
    assert (a.name, a.settings) == ("bn_a", {"eps": 1e-5, "momentum": 0.1})
    assert [at and at[0] for at in values(a)] == [0, 10, 20, 30]
    assert (b.name, b.settings) == ("bn_b", {"eps": 1e-3, "momentum": 0.01})
    assert [at and at[0] for at in values(b)] == [None, 0, 10, 20]
    kernel = found.tensors["layers/conv2d/vars/0",]
    np.testing.assert_array_equal(kernel.values(), np.zeros((3, 3, 1, 5)))


PROGRAM = """
import os, sys
os.environ["KERAS_BACKEND"] = "torch"
import keras, numpy as np
keras.utils.set_random_seed(0)
L = keras.layers
inner = keras.Sequential([keras.Input((6, 6, 4)), L.BatchNormalization(center=False, name="deep")], name="inner")
entry = keras.Input((8, 8, 3))
x = L.Conv2D(4, 3)(entry)
x = L.BatchNormalization(name="bn_a", epsilon=1e-5, momentum=0.9)(x)
x = L.BatchNormalization(name="bn_b", scale=False)(x)
model = keras.Model(entry, L.LayerNormalization()(inner(x)))
model.compile("adam", "mse")
model.fit(np.random.randn(8, 8, 8, 3), np.random.randn(8, 6, 6, 4), verbose=0)
for suffix in ("keras", "h5"):
    model.save(sys.argv[1] + "/model." + suffix)
model.save_weights(sys.argv[1] + "/model.weights.h5")
layers = [model.get_layer("bn_a"), model.get_layer("bn_b"), inner.get_layer("deep")]
weights = {f"{layer.name}.{w.name}": keras.ops.convert_to_numpy(w) for layer in layers for w in layer.weights}
np.savez(sys.argv[1] + "/expected.npz", **weights)
"""


@pytest.mark.slow
def test_against_keras(tmp_path: Path) -> None:
    pytest.importorskip("h5py")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, str(tmp_path)], capture_output=True, text=True
    )
    if "No module named 'keras'" in done.stderr:
        pytest.skip("keras is not installed")
    assert done.returncode == 0, done.stderr
    names = {role: name for name, role in ROLES["Keras"].items()}
    with np.load(tmp_path / "expected.npz") as held:
        expected = dict(held)
    for file in ("model.keras", "model.h5", "model.weights.h5"):
        result = file != "model.weights.h5"
        found = {norm.name: norm for norm in read(tmp_path / file).norms}
        if result:
            assert set(found) == {"bn_a", "bn_b", "deep"}
            assert found["bn_a"].settings == {"eps": 1e-5, "momentum": 0.1}
            assert found["deep"].settings == {"eps": 1e-3, "momentum": 0.01}
        for name in ("bn_a", "bn_b", "deep") if result else ("bn_a",):
            for role, theirs in names.items():
                place = found[name].tensors.get(role)
                array = expected.get(f"{name}.{theirs}")
                assert (place is None) == (array is None), (file, name, role)
                if array is not None:
                    np.testing.assert_array_equal(place.values(), array)


def written(path: Path, fill: Any) -> Path:
    with h5py.File(path, "w") as file:
        fill(file)
    return path


def test_weights_alone(tmp_path: Path) -> None:
    def fill(file: Any) -> None:
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            file[f"block/bn/{name}"] = np.ones(3, dtype=np.float16)
        file["block/ln/gamma"] = np.ones(3)
        for at in range(4):
            file[f"optimizer/vars/{at}"] = np.ones(2)
        for at in range(3):
            file[f"layers/batch_normalization/vars/{at}"] = np.full(2, at)

    first, second = read(written(tmp_path / "a.weights.h5", fill)).norms
    assert (first.name, first.settings) == ("bn", {})
    assert values(second) == [None, None, [1, 1], [2, 2]]  # gamma or beta: nothing says which


def test_layers_that_are_only_counted(tmp_path: Path) -> None:
    """As Keras 3 wrote them before it put the layer's name beside its tensors."""
    weights = io.BytesIO()
    with h5py.File(weights, "w") as file:
        for at in range(11):
            name = f"layers/batch_normalization{f'_{at}' if at else ''}/vars"
            file[f"{name}/0"], file[f"{name}/1"], file[f"{name}/2"] = np.full(2, at), np.zeros(2), np.ones(2)
        file["layers/layer_normalization/vars/0"] = np.ones(2)
    named = [{"name": f"bn{at}", "scale": False, "epsilon": at / 8} for at in range(11)]
    config = {"layers": [{"class_name": "BatchNormalization", "config": one} for one in named]}
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("config.json", json.dumps({"class_name": "Sequential", "config": config}))
        archive.writestr("model.weights.h5", weights.getvalue())
    found = {norm.name: norm for norm in read(tmp_path / "model.keras").norms}
    assert set(found) == {f"bn{at}" for at in range(11)}
    for at in range(11):
        assert found[f"bn{at}"].settings["eps"] == at / 8
        assert values(found[f"bn{at}"]) == [None, [at, at], [0, 0], [1, 1]]


def test_a_group_that_is_numbered_inside_its_layer(tmp_path: Path) -> None:
    """Keras 2 does so where it counted a name twice: settings are those of the layer."""
    config = {"name": "batch_normalization_1", "epsilon": 1e-5, "momentum": 0.9}
    layers = [{"class_name": "BatchNormalization", "config": config}]
    with h5py.File(tmp_path / "model.h5", "w") as file:
        file.attrs["model_config"] = json.dumps({"class_name": "Model", "config": {"layers": layers}})
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            file[f"model_weights/batch_normalization_1/batch_normalization_1_1/{name}:0"] = np.ones(4)
    (norm,) = read(tmp_path / "model.h5").norms
    assert norm.name == "batch_normalization_1"
    assert norm.settings == {"eps": 1e-5, "momentum": 0.1}


@pytest.mark.parametrize(
    "config",
    ["", "[", "3", "null", '{"class_name": "BatchNormalization"}', '{"class_name": "BatchNormalization", "config": 3}'],
)
def test_configurations_that_are_none(config: str, tmp_path: Path) -> None:
    def fill(file: Any) -> None:
        file.attrs["model_config"] = config
        file["bn/moving_mean"], file["bn/moving_variance"] = np.ones(2), np.ones(2)

    path = written(tmp_path / "a.h5", fill)
    if config == "[":
        with pytest.raises(CheckpointError, match="JSON"):
            read(path)
    else:
        (found,) = read(path).norms
        assert found.settings == {}


@pytest.mark.parametrize("value", [True, "x", None, float("nan"), float("inf"), 10**400, [1], {"a": 1}])
def test_settings_that_are_none(value: Any, tmp_path: Path) -> None:
    layer = {
        "class_name": "BatchNormalization",
        "config": {"name": "bn", "epsilon": value, "momentum": value, "scale": value},
    }

    def fill(file: Any) -> None:
        file.attrs["model_config"] = json.dumps(layer)
        file["bn/moving_mean"], file["bn/moving_variance"] = np.ones(2), np.ones(2)

    (found,) = read(written(tmp_path / "a.h5", fill)).norms
    assert (found.name, found.settings) in (
        ("bn", {}),
        ("bn", {"eps": 1e-3, "momentum": 0.01}),
    )


def test_names_of_torch(tmp_path: Path) -> None:
    path = written(tmp_path / "a.h5", lambda file: file.create_dataset("bn1.running_mean", data=np.arange(3.0)))
    found = read(path)
    assert found.norms == ()
    assert found.tensors["bn1.running_mean",].values().tolist() == [0, 1, 2]


def test_links_out_of_the_file_and_loops(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(1000))

    def fill(file: Any) -> None:
        file["a/x"] = np.ones(2)
        file["a/loop"] = file["a"]
        file["a/again"] = file["/"]
        file["soft"] = h5py.SoftLink("/a/x")
        file["elsewhere"] = h5py.ExternalLink("other.h5", "/x")
        file.create_dataset("outside", (100,), "f4", external=[(str(tmp_path / "secret"), 0, 400)])
        layout = h5py.VirtualLayout((2,), "f4")
        layout[:] = h5py.VirtualSource(str(tmp_path / "other.h5"), "x", (2,))
        file.create_virtual_dataset("virtual", layout)
        file["text"] = "words"
        file["empty"] = h5py.Empty("f4")

    written(tmp_path / "other.h5", lambda file: file.create_dataset("x", data=np.ones(2, "f4")))
    found = read(written(tmp_path / "a.h5", fill)).tensors
    assert set(found) == {("a/x",), ("outside",), ("virtual",)}
    for name in ("outside", "virtual"):
        with pytest.raises(CheckpointError, match="another file"):
            found[name,].values()


def test_large_and_compressed(tmp_path: Path) -> None:
    def fill(file: Any) -> None:
        file.create_dataset("zeros", (2**40,), "f8", chunks=(2**20,), compression="gzip")
        file.create_dataset("wide", (2**26,), "f4", chunks=(2**26,), compression="gzip")
        file.create_dataset("small", data=np.arange(10.0), compression="gzip")

    found = read(written(tmp_path / "a.h5", fill)).tensors
    assert found["small",].values().sum() == 45
    assert found["zeros",].shape == (2**40,)
    for name in ("zeros", "wide"):
        with pytest.raises(CheckpointError, match="not read"):
            found[name,].values()


def test_truncated(tmp_path: Path) -> None:
    data = hdf5_file()
    for length in (8, 100, len(data) // 2, len(data) - 1):
        (tmp_path / "model.h5").write_bytes(data[:length])
        with pytest.raises(CheckpointError, match="HDF5"):
            read(tmp_path / "model.h5")
