"""ONNX models against the onnx package and torch's exporter: norms, what their inputs come from, and their settings."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seeds import network, onnx_model

import batchnorm as bn
from batchnorm.checks.layers import Place
from batchnorm.checks.readers import CheckpointError, Stored, read

onnx = pytest.importorskip("onnx")
FLOAT = onnx.TensorProto.FLOAT
CASTS = ("DOUBLE", "FLOAT16", "INT64", "BOOL")
helper = onnx.helper


def varint(value: int) -> bytes:
    """A protobuf integer."""
    found = b""
    while value > 0x7F:
        found, value = found + bytes([value & 0x7F | 0x80]), value >> 7
    return found + bytes([value])


def field(number: int, content: bytes | int) -> bytes:
    """A protobuf field: a message, a text, or a number."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def values(norm: Place) -> list[list[float] | None]:
    found = map(norm.tensors.get, ("gamma", "beta", "running_mean", "running_var"))
    return [None if at is None else at.values().tolist() for at in found]


def test_every_place_of_a_constant(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(onnx_model(functions=True))
    model = onnx.load(path)
    expected = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    found = read(path)
    assert found.format == "ONNX"
    assert list(found.tensors) == [(name,) for name in expected]
    for name, array in expected.items():
        stored = found.tensors[name,]
        assert (stored.shape, stored.dtype) == (array.shape, str(array.dtype))
        np.testing.assert_array_equal(stored.values(), array)
    gamma, beta, mean, var = (
        expected[f"bn1.{name}"].tolist() for name in ("weight", "bias", "running_mean", "running_var")
    )
    by_name = {norm.name: norm for norm in found.norms[:-1]} | {"within": found.norms[-1]}
    assert [norm.name for norm in found.norms] == ["bn1", "second", "third", "choice/bn1", "choice/bn1", "bn1"]
    assert values(by_name["bn1"]) == [gamma, beta, mean, var]
    assert values(by_name["second"]) == [gamma, beta, mean, var]
    assert values(by_name["third"]) == [gamma, [1, 2, 3, 4], mean, var]
    assert values(by_name["choice/bn1"]) == [gamma, beta, mean, var]
    assert values(by_name["within"]) == [gamma, beta, mean, var]
    common = {"training_mode": False, "eps": 1e-5, "momentum": 0.1}
    assert by_name["bn1"].settings == common | {"eps": 1e-3, "momentum": 0.2}
    assert by_name["second"].settings == common
    assert by_name["third"].settings == common | {"training_mode": True}
    assert by_name["within"].settings == common | {"eps": 0.25}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_exported_by_torch(training: bool, tmp_path: Path) -> None:
    model = network().train(training)
    with torch.no_grad():
        for value in model.parameters():
            value.copy_(torch.randn_like(value))
    mode = torch.onnx.TrainingMode.TRAINING if training else torch.onnx.TrainingMode.PRESERVE
    settings: dict[str, Any] = {"training": mode, "do_constant_folding": False, "dynamo": False}
    torch.onnx.export(model, (torch.zeros(2, 3, 8, 8),), tmp_path / "model.onnx", **settings)
    found = read(tmp_path / "model.onnx").norms
    assert [norm.name for norm in found] == ["1", "4"]
    for norm in found:
        layer = model.get_submodule(norm.name)
        tensors = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
        assert values(norm)[:2] == [tensor.tolist() for tensor in tensors[:2]]
        assert norm.settings["training_mode"] is training
        if not training:
            assert values(norm) == [tensor.tolist() for tensor in tensors]


@pytest.mark.parametrize(
    "kind",
    ["FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "INT64", "INT32", "INT8", "UINT8", "BOOL", "UINT64", "FLOAT8E4M3FN"],
)
@pytest.mark.parametrize("raw", [False, True])
def test_every_type_and_field(kind: str, raw: bool, tmp_path: Path) -> None:
    code = getattr(onnx.TensorProto, kind)
    numbers = np.array([1, 0, 1, 1] if kind in ("BOOL", "UINT8", "UINT64") else [1, -2, 0, 3])
    dtype = helper.tensor_dtype_to_np_dtype(code)
    tensor = helper.make_tensor("t", code, [2, 2], numbers.astype(dtype).tobytes() if raw else numbers, raw)
    save([], [tensor], tmp_path / "model.onnx")
    (stored,) = read(tmp_path / "model.onnx").tensors.values()
    np.testing.assert_array_equal(stored.values(), numbers.reshape(2, 2))


def save(nodes: list[Any], initializers: list[Any], path: Path, **settings: Any) -> Path:
    inputs = [helper.make_tensor_value_info("x", FLOAT, None)]
    outputs = [helper.make_tensor_value_info("y", FLOAT, None)]
    onnx.save(helper.make_model(helper.make_graph(nodes, "g", inputs, outputs, initializers)), path, **settings)
    return path


def tensors(*names: str, size: int = 4) -> list[Any]:
    arrays = [np.arange(size, dtype=np.float32) + at for at in range(len(names))]
    return [onnx.numpy_helper.from_array(array, name) for array, name in zip(arrays, names, strict=True)]


def norm(*inputs: str, **attributes: Any) -> Any:
    return helper.make_node("BatchNormalization", ["x", *inputs], ["y"], "bn", **attributes)


def test_no_norms(tmp_path: Path) -> None:
    found = read(save([helper.make_node("Relu", ["x"], ["y"])], tensors("w"), tmp_path / "model.onnx"))
    assert found.norms == ()
    assert list(found.tensors) == [("w",)]


def test_inputs_computed_while_it_runs(tmp_path: Path) -> None:
    nodes = [helper.make_node("Exp", ["a"], ["e"]), norm("e", "a", "a", "nowhere")]
    (found,) = read(save(nodes, tensors("a"), tmp_path / "model.onnx")).norms
    assert values(found) == [None, [0, 1, 2, 3], [0, 1, 2, 3], None]
    assert found.settings["unknown"] == "gamma, running_var"


def test_casts_are_evaluated(tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["a"], [f"a{kind}"], to=getattr(onnx.TensorProto, kind)) for kind in CASTS]
    (found,) = read(save([*nodes, norm(*(f"a{kind}" for kind in CASTS))], tensors("a"), tmp_path / "model.onnx")).norms
    assert values(found) == [[0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 1, 1]]


def test_a_constant_that_lists_floats(tmp_path: Path) -> None:
    nodes = [helper.make_node("Constant", [], [name], value_floats=[1.0, 2.5]) for name in "abcd"]
    (found,) = read(save([*nodes, norm(*"abcd")], [], tmp_path / "model.onnx")).norms
    assert values(found) == [[1, 2.5]] * 4


def test_parameters_that_are_unknown_are_no_error(tmp_path: Path) -> None:
    nodes = [helper.make_node("Exp", ["a"], ["e"]), norm("e", "a", "a", "b")]
    for inputs in (("e", "a", "a", "b"), ("a", "a", "e", "e"), ("e", "e", "e", "e")):
        found = bn.check(save([nodes[0], norm(*inputs)], tensors("a", "b"), tmp_path / "model.onnx"))
        assert found.healthy
        (layer,) = found.network.layers
        assert ("gamma" in layer.arrays) is (inputs[0] == "a")
        str(bn.checks.check.explain(tmp_path / "model.onnx"))


def test_identities_in_a_loop(tmp_path: Path) -> None:
    """Also one after another further than anyone goes."""
    nodes = [helper.make_node("Identity", [a], [b]) for a, b in (("p", "q"), ("q", "p"), ("s", "s"))]
    nodes += [helper.make_node("Identity", [f"i{at}"], [f"i{at + 1}"]) for at in range(1000)]
    path = save([*nodes, norm("p", "s", "i1000", "i0")], tensors("i0"), tmp_path / "model.onnx")
    (found,) = read(path).norms
    assert values(found) == [None, None, None, [0, 1, 2, 3]]


def test_older_opsets_show_training_by_outputs(tmp_path: Path) -> None:
    node = helper.make_node("BatchNormalization", ["x", "a", "b", "c", "d"], ["y", "m", "v", "sm", "sv"])
    (found,) = read(save([node], tensors(*"abcd"), tmp_path / "model.onnx")).norms
    assert found.settings["training_mode"] is True


def test_functions_that_call_themselves(tmp_path: Path) -> None:
    calls = [helper.make_node("f", ["x"], ["y"], domain="mine")] * 2
    function = helper.make_function("mine", "f", ["x"], ["y"], calls, [helper.make_opsetid("mine", 1)])
    model = helper.make_model(helper.make_graph(calls, "g", [], []), functions=[function])
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="recursive"):
        read(tmp_path / "model.onnx")


def external(folder: Path, location: str = "model.data", **settings: Any) -> Path:
    """A model whose numbers lie elsewhere; what it says of the place is `location` and `settings`."""
    path = save([norm(*"abcd")], tensors(*"abcd", size=512), folder / "model.onnx")
    model = onnx.load(path)
    onnx.external_data_helper.convert_model_to_external_data(model, location="model.data", size_threshold=0)
    onnx.save(model, path)
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = str({"location": location, **settings}.get(entry.key, entry.value))
    path.write_bytes(model.SerializeToString())
    return path


def test_external_data(tmp_path: Path) -> None:
    path = external(tmp_path)
    found = read(path)
    assert path.stat().st_size < 2000
    assert found.size == path.stat().st_size + (tmp_path / "model.data").stat().st_size
    assert values(found.norms[0]) == [(np.arange(512) + at).tolist() for at in range(4)]
    (tmp_path / "model.data").unlink()
    with pytest.raises(CheckpointError, match=r"model\.data, which is missing"):
        read(path).norms[0].tensors["gamma"].values()


def test_external_data_in_the_cache_of_a_hub(tmp_path: Path) -> None:
    """Both are links to one other folder."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    external(tmp_path / "blobs")
    (tmp_path / "blobs" / "model.data").rename(tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot" / "model.onnx").symlink_to("../blobs/model.onnx")
    (tmp_path / "snapshot" / "model.data").symlink_to("../blobs/0123")
    gamma = read(tmp_path / "snapshot" / "model.onnx").norms[0].tensors["gamma"]
    assert isinstance(gamma, Stored)
    assert gamma.values()[3] == 3


@pytest.mark.parametrize(
    "location",
    ["../model.data", "a/../../model.data", "/etc/passwd", "C:\\secret", "..\\model.data", "link", "", "a\0b"],
)
def test_external_data_elsewhere(location: str, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "model.data").write_bytes(bytes(10**5))
    (tmp_path / "inside" / "link").symlink_to("../model.data")
    with pytest.raises(CheckpointError, match="not in its folder"):
        read(external(tmp_path / "inside", location))


@pytest.mark.parametrize(
    "settings", [{"offset": 2**62}, {"offset": -1}, {"offset": "x"}, {"length": 1}, {"offset": 10**30}]
)
def test_external_data_out_of_bounds(settings: dict[str, Any], tmp_path: Path) -> None:
    norms = read(external(tmp_path, **settings)).norms
    with pytest.raises(CheckpointError):
        norms[0].tensors["gamma"].values()


def test_external_data_that_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    norms = read(external(tmp_path, "folder")).norms
    with pytest.raises(CheckpointError, match="missing: put it beside the model"):
        norms[0].tensors["gamma"].values()


@pytest.mark.parametrize(
    "data",
    [
        field(1, 8),
        field(7, b"\xff" * 20),
        field(7, b"")[:-1] + b"\x7f",
        b"\x08\x08\x3b",
        field(1, 8) + field(7, b"") + b"\x00\x00",
        field(7, b"\x12\x10") + field(2, b"a" * 100),
        field(7, field(5, field(1, 2**63) + field(2, 1) + field(9, b""))),
        field(7, field(5, field(1, 4) + field(2, 1) + field(9, b"\0" * 15))),
        field(7, field(5, b"".join(field(1, 1) for _ in range(100)) + field(2, 1))),
        field(7, field(5, field(1, b"\x80" * 20))),
    ],
    ids=lambda data: data[:12].hex(),
)
def test_damaged(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"damaged|cannot be read|does not hold"):
        for stored in read(tmp_path / "model.onnx").tensors.values():
            stored.values()


@pytest.mark.parametrize(("depth", "says"), [(20, None), (1000, "damaged")])
def test_graphs_in_graphs(depth: int, says: str | None, tmp_path: Path) -> None:
    graph = b""
    for _ in range(depth):
        graph = field(1, field(4, b"If") + field(5, field(1, b"then") + field(6, graph)))
    (tmp_path / "model.onnx").write_bytes(field(1, 8) + field(7, graph))
    with pytest.raises(CheckpointError, match=says) if says else nullcontext():
        assert read(tmp_path / "model.onnx").norms == ()


def test_a_model_that_takes_too_much_memory(tmp_path: Path) -> None:
    """Of two bytes protobuf makes an object of a hundred."""
    (tmp_path / "model.onnx").write_bytes(field(1, 8) + field(7, field(1, b"") * (40 * 2**20)))
    with pytest.raises(CheckpointError, match=r"crashed|MemoryError|damaged|too many|more than"):
        read(tmp_path / "model.onnx")


def test_a_model_larger_than_the_format_allows(tmp_path: Path) -> None:
    with (tmp_path / "model.onnx").open("wb") as file:
        file.write(field(1, 8))
        file.truncate(2**31)
    with pytest.raises(CheckpointError, match="ONNX allows"):
        read(tmp_path / "model.onnx")


def test_of_large_tensors_only_vectors_are_read(tmp_path: Path) -> None:
    array = np.arange(2**17, dtype=np.float16)
    given = [
        *tensors("a"),
        *(onnx.numpy_helper.from_array(one, f"{one.ndim}") for one in (array, array.reshape(2, -1))),
    ]
    found = read(save([norm(*"aaaa")], given, tmp_path / "model.onnx")).tensors
    np.testing.assert_array_equal(found["1",].values(), array.astype(np.float64))
    assert (found["2",].shape, found["2",].dtype) == ((2, 2**16), "float16")
    with pytest.raises(CheckpointError, match="only vectors"):
        found["2",].values()


def test_too_many_nodes(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(field(1, 8) + field(7, field(1, field(4, b"R")) * 10**6))
    with pytest.raises(CheckpointError, match=r"more than [0-9]+ nodes"):
        read(tmp_path / "model.onnx")


def test_truncated_at_every_length(tmp_path: Path) -> None:
    data = save([norm(*"abcd")], tensors(*"abcd"), tmp_path / "whole.onnx").read_bytes()
    graph_end = len(data) - len(data.split(b"g")[-1])
    for length in range(0, graph_end, 11):
        (tmp_path / "model.onnx").write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read(tmp_path / "model.onnx")
