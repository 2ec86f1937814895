"""PyTorch's checkpoints against torch.load: the same names, shapes and numbers. Nothing in them is executed."""

from __future__ import annotations

import argparse
import collections
import enum
import functools
import io
import os
import pickle
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seeds import contents, network, saved

import batchnorm as bn
from batchnorm.checks.readers import CheckpointError, read


class Color(enum.Enum):
    RED = 1


FORMATS = {"zip": {}, "legacy": {"_use_new_zipfile_serialization": False}}


def flat(value: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], torch.Tensor]:
    """The tensors of what torch.load gives, by path."""
    if isinstance(value, torch.Tensor):
        return {path or ("",): value}
    if isinstance(value, dict):
        entries = list(value.items())
    elif isinstance(value, list | tuple):
        entries = list(enumerate(value))
    else:
        return {}
    found: dict[tuple[str, ...], torch.Tensor] = {}
    for key, entry in entries:
        found |= flat(entry, (*path, str(key)))
    return found


def assert_same(path: Path) -> None:
    expected = flat(torch.load(path, weights_only=True, map_location="cpu"))
    found = read(path)
    assert list(found.tensors) == list(expected)
    assert found.size == path.stat().st_size
    for name, tensor in expected.items():
        stored = found.tensors[name]
        assert (stored.shape, f"torch.{stored.dtype}") == (tuple(tensor.shape), str(tensor.dtype)), name
        values = stored.values()
        assert values.dtype == np.float64
        np.testing.assert_array_equal(values, tensor.detach().double().numpy(), err_msg=str(name))


@pytest.mark.parametrize("form", FORMATS)
def test_everything_that_a_training_saves(form: str, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(contents(), path, **FORMATS[form])
    assert_same(path)
    assert read(path).format == {"zip": "PyTorch", "legacy": "PyTorch (legacy)"}[form]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_later_protocols_of_pickle(protocol: int, form: str, tmp_path: Path) -> None:
    """torch.load(weights_only=True) does not read them."""
    more: dict[str, object] = {"bytes": b"abc", "array": bytearray(b"abc"), "long": "x" * 300}
    if protocol > 3:
        more["frozen"] = frozenset("ab")
    torch.save(contents(), tmp_path / "two.pt", **FORMATS[form])
    torch.save(contents() | more, tmp_path / "later.pt", pickle_protocol=protocol, **FORMATS[form])
    expected, found = read(tmp_path / "two.pt").tensors, read(tmp_path / "later.pt").tensors
    assert list(found) == list(expected)
    for name, stored in expected.items():
        np.testing.assert_array_equal(found[name].values(), stored.values())


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    "value",
    [
        torch.arange(6.0),
        torch.tensor(3.5),
        torch.empty(0, 4),
        [torch.ones(2), {"a": torch.zeros(1)}],
        {},
        {1: torch.ones(1), False: torch.zeros(2), None: torch.ones(3), 2.5: torch.ones(4)},
        {"a": {"b": {"c": [torch.ones(1)] * 3}}},
        Counter({"a": 2}),
        {"long": 2**70, "negative": -(2**40), "bytes": b"\x00\xff", "array": bytearray(b"abc"), "complex": 1j},
        OrderedDict(x=torch.arange(60.0).view(3, 4, 5).permute(2, 0, 1), y=torch.arange(8.0)[::3]),
        {"ünïcode.名前": torch.ones(2)},
        {"parameter": torch.nn.Parameter(torch.ones(2)), "buffer": torch.nn.Buffer(torch.zeros(2))},
    ],
    ids=str,
)
def test_values_of_all_kinds(form: str, value: Any, tmp_path: Path) -> None:
    torch.save(value, tmp_path / "model.pt", **FORMATS[form])
    assert_same(tmp_path / "model.pt")


@pytest.mark.parametrize(
    "name", ["float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz", "float8_e8m0fnu"]
)
def test_every_float8(name: str, tmp_path: Path) -> None:
    codes = torch.arange(256, dtype=torch.int32).to(torch.uint8)
    torch.save(codes.view(getattr(torch, name)), tmp_path / "model.pt")
    found = read(tmp_path / "model.pt").tensors["",]
    expected = codes.view(getattr(torch, name)).to(torch.float32).double().numpy()
    np.testing.assert_array_equal(found.values(), expected)


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_every_sixteen_bits(name: str, tmp_path: Path) -> None:
    codes = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(getattr(torch, name))
    torch.save(codes, tmp_path / "model.pt")
    np.testing.assert_array_equal(read(tmp_path / "model.pt").tensors["",].values(), codes.double().numpy())


@pytest.mark.parametrize("form", FORMATS)
def test_tagged_cuda(form: str, tmp_path: Path) -> None:
    data = saved({"bn.running_mean": torch.arange(3.0)}, **FORMATS[form])
    assert b"X\x03\x00\x00\x00cpu" in data
    (tmp_path / "model.pt").write_bytes(changed(data, b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:7"))
    with pytest.raises((RuntimeError, AssertionError)):
        torch.load(tmp_path / "model.pt", weights_only=True)
    assert read(tmp_path / "model.pt").tensors["bn.running_mean",].values().tolist() == [0, 1, 2]


def changed(data: bytes, old: bytes, new: bytes) -> bytes:
    """Bytes of a pickle replaced, inside a zip archive too."""
    if not data.startswith(b"PK"):
        return data.replace(old, new)
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as archive, zipfile.ZipFile(buffer, "w") as other:
        for name in archive.namelist():
            other.writestr(name, archive.read(name).replace(old, new))
    return buffer.getvalue()


def test_meta_tensors_have_a_shape_and_no_numbers(tmp_path: Path) -> None:
    torch.save({"m": torch.empty(3, 4, device="meta"), "x": torch.ones(1)}, tmp_path / "model.pt")
    found = read(tmp_path / "model.pt").tensors
    assert found["m",].shape == (3, 4)
    with pytest.raises(CheckpointError, match="meta"):
        found["m",].values()


def test_big_endian(tmp_path: Path) -> None:
    data = changed(saved({"x": torch.arange(4.0)}), b"little", b"big")
    swapped = np.arange(4, dtype=">f4").tobytes()
    (tmp_path / "model.pt").write_bytes(changed(data, np.arange(4, dtype="<f4").tobytes(), swapped))
    assert read(tmp_path / "model.pt").tensors["x",].values().tolist() == [0, 1, 2, 3]
    assert_same(tmp_path / "model.pt")


def test_compressed_by_hand(tmp_path: Path) -> None:
    with (
        zipfile.ZipFile(io.BytesIO(saved(contents()))) as archive,
        zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as other,
    ):
        for name in archive.namelist():
            other.writestr(name, archive.read(name))
    assert_same(tmp_path / "model.pt")


def test_shared_storage_stays_where_it_is(tmp_path: Path) -> None:
    """A view of 4 numbers in a storage of 4 million is read without the storage."""
    large = torch.arange(2.0**22)
    torch.save({"view": large[5:9], "column": large.reshape(2048, 2048)[:, 3]}, tmp_path / "model.pt")
    found = read(tmp_path / "model.pt").tensors
    assert found["view",].values().tolist() == [5, 6, 7, 8]
    np.testing.assert_array_equal(found["column",].values(), large.reshape(2048, 2048)[:, 3].double().numpy())


def test_views_of_all_kinds(tmp_path: Path) -> None:
    table = torch.arange(2.0 * 30 * 50).reshape(2, 30, 50)
    views = {
        "a": table[:, ::7, 3],
        "b": table.permute(2, 0, 1)[::9],
        "c": table[1, 5],
        "d": table[:, 2:3].expand(2, 4, 50),
    }
    torch.save(views, tmp_path / "model.pt")
    assert_same(tmp_path / "model.pt")


def test_large_archives_are_mapped(tmp_path: Path) -> None:
    """Only what is read of them is loaded: the limit of memory does not count pages of the file."""
    state = {"bn.running_mean": torch.arange(4.0), "w": torch.zeros(2**25), "bn.running_var": torch.ones(4)}
    torch.save(state, tmp_path / "model.pt")
    found = read(tmp_path / "model.pt").tensors
    assert found["bn.running_mean",].values().tolist() == [0, 1, 2, 3]
    with pytest.raises(CheckpointError, match="not read"):
        found["w",].values()


class Calls:
    """An object whose pickle calls a function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> Any:
        return self.function, self.arguments


@pytest.mark.parametrize("form", FORMATS)
def test_nothing_is_executed(form: str, tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    torch.save({"x": torch.ones(1), "y": Calls(os.system, f"touch {mark}")}, tmp_path / "model.pt", **FORMATS[form])
    with pytest.raises(CheckpointError, match=r"posix\.system.*state_dict") as refused:
        read(tmp_path / "model.pt")
    assert "\n" not in str(refused.value)
    assert not mark.exists()
    torch.load(tmp_path / "model.pt", weights_only=False)
    assert mark.exists()  # it would have


HARMFUL = {"eval": Calls(eval, "1"), "exit": Calls(sys.exit, 1), "open": Calls(open, "/dev/null")}
INERT = {
    "getattr": Calls(getattr, "a", "upper"),
    "numpy number": np.float64(1),
    "path": Path("a"),
    "range": range(3),
    "function": len,
    "type": int,
    "namespace": argparse.Namespace(lr=0.1, momentum={"a": 1}),
    "partial": functools.partial(max, 1),
    "default": collections.defaultdict(list, a=[1]),
    "enum": Color.RED,
    "set of names": {Color.RED, Path("a")},
    "optimizer": torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1),
}


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("name", [*HARMFUL, *INERT])
def test_what_torch_refuses(form: str, protocol: int, name: str, tmp_path: Path) -> None:
    """Names that only harmful files need are refused; objects of other classes are stand-ins that do nothing."""
    path, value = tmp_path / "model.pt", (HARMFUL | INERT)[name]
    torch.save({"x": torch.ones(1), "y": value}, path, pickle_protocol=protocol, **FORMATS[form])
    if name in HARMFUL:
        with pytest.raises(CheckpointError, match="runs code"):
            read(path)
    else:
        assert read(path).tensors["x",].values().tolist() == [1]


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_whole_model(form: str, protocol: int, tmp_path: Path) -> None:
    """Names as in its state dict; eps, momentum and training of its modules; nothing imported."""
    model = torch.nn.Sequential(collections.OrderedDict(net=network(), bn=torch.nn.BatchNorm1d(2, 0.25, None)))
    path = tmp_path / "model.pt"
    torch.save({"epoch": 3, "ema": model, "model": None}, path, pickle_protocol=protocol, **FORMATS[form])
    found = read(path)
    assert {name for _, name in found.tensors} == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        np.testing.assert_array_equal(found.tensors["ema", name].values(), tensor.double().numpy())
    assert found.settings[("ema",), "net.1"] == {
        "eps": 1e-5,
        "momentum": 0.1,
        "class": "BatchNorm2d",
        "training": False,
        "frozen": False,
    }
    settings = {"eps": 0.25, "cumulative": True, "class": "BatchNorm1d", "training": True, "frozen": False}
    assert found.settings[("ema",), "bn"] == settings


def test_a_model_of_a_package_that_is_not_installed(tmp_path: Path) -> None:
    (tmp_path / "elsewhere.py").write_text(
        "import torch\n\n\nclass Norm(torch.nn.BatchNorm2d):\n    pass\n\n\nclass Net(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.norm = Norm(3, eps=1e-3)\n"
        "        self.inst = torch.nn.InstanceNorm2d(3, track_running_stats=True)\n"
        "        self.again = self.norm\n        self.itself = [self]\n"
    )
    program = "import sys, torch, elsewhere; torch.save({'model': elsewhere.Net().half()}, sys.argv[1])"
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "model.pt")], check=True, cwd=tmp_path)
    (layer,) = bn.check(tmp_path / "model.pt").network.layers
    assert (layer.name, layer.settings["eps"], layer.settings["class"]) == ("norm", 1e-3, "Norm")
    assert layer.settings["aliases"] == ("again",)


def test_pickles_of_arrays(tmp_path: Path) -> None:
    """As Detectron2's model zoo has them."""
    names = ("weight", "bias", "running_mean", "running_var")
    model = {f"backbone.bn1.{name}": np.arange(4, dtype=np.float32) + at for at, name in enumerate(names)}
    for protocol in range(2, 6):
        path = tmp_path / f"{protocol}.pkl"
        path.write_bytes(pickle.dumps({"model": model, "__author__": "third"}, protocol=protocol))
        found = read(path)
        assert found.format == "pickle"
        for name, array in model.items():
            np.testing.assert_array_equal(found.tensors["model", name].values(), array)
    (tmp_path / "tensors.pkl").write_bytes(pickle.dumps({"a": torch.arange(3.0)}))
    assert read(tmp_path / "tensors.pkl").tensors["a",].values().tolist() == [0, 1, 2]


def test_other_pickles(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(3, protocol=2))
    with pytest.raises(CheckpointError, match="without tensors"):
        read(path)
    torch.save({"a": torch.ones(1)}, path, pickle_protocol=4)
    assert list(read(path).tensors) == [("a",)]
    path.write_bytes(path.read_bytes().replace(b"\x94", b"P"))
    with pytest.raises(CheckpointError, match="damaged"):
        read(path)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_torchscript(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(network(), torch.zeros(1, 3, 8, 8)), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="TorchScript"):
        read(tmp_path / "model.pt")
