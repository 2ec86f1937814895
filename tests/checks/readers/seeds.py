"""Small checkpoints of every format, as bytes: the seeds of the fuzzer. One whose maker is not installed is absent."""

from __future__ import annotations

import functools
import io
import json
import tempfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

Seeds = dict[str, tuple[str, bytes]]
"""By format: the suffix and the bytes."""


def network() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 1, bias=False), nn.BatchNorm2d(6)
    )
    model(torch.randn(2, 3, 8, 8))
    return model.eval()


def saved(value: object, **settings: object) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer, **settings)
    return buffer.getvalue()


def contents() -> dict[str, object]:
    """A training's checkpoint with containers, views and types of all kinds."""
    model = network()
    table = torch.arange(24.0).reshape(4, 6)
    return {
        "state_dict": OrderedDict(("module." + name, tensor) for name, tensor in model.state_dict().items()),
        "ema": model.state_dict(),
        "parameter": nn.Parameter(torch.ones(3)),
        "views": [table, table.t(), table[1:, ::2], (table.bfloat16(), table.half(), table.double())],
        "expanded": torch.ones(1).expand(5),
        "optimizer": {
            "state": {0: {"step": torch.tensor(3), "exp_avg": torch.zeros(4)}},
            "lr": 0.1,
            "betas": (0.9, 0.999),
        },
        "flags": torch.tensor([True, False]),
        "epoch": 7,
        "best": None,
        "names": {"a", "b"},
        "device": torch.device("cpu"),
        "shape": torch.Size([1, 2]),
        "dtype": torch.float16,
    }


def onnx_model(functions: bool = False) -> bytes:
    """Norms on initializers, on Constant nodes, behind Identity, in a subgraph, and in a function."""
    onnx = pytest.importorskip("onnx")
    helper, numpy_helper, kind = onnx.helper, onnx.numpy_helper, onnx.TensorProto.FLOAT
    rng = np.random.default_rng(0)
    weights = {
        name: rng.uniform(0.5, 2, 4).astype(np.float32) for name in ("weight", "bias", "running_mean", "running_var")
    }
    inputs = [f"bn1.{name}" for name in weights]
    initializers = [numpy_helper.from_array(value, f"bn1.{name}") for name, value in weights.items()]
    listed = helper.make_tensor("listed", kind, [4], [1.0, 2.0, 3.0, 4.0])
    half = helper.make_tensor("half", onnx.TensorProto.FLOAT16, [2], [1.0, -2.0])
    constants = [
        helper.make_node("Constant", [], [f"c{at}"], value=numpy_helper.from_array(value))
        for at, value in enumerate(weights.values())
    ]
    inner = helper.make_graph(
        [helper.make_node("BatchNormalization", ["x", *inputs], ["z"], "inner")],
        *("then", [], [helper.make_tensor_value_info("z", kind, None)]),
    )
    nodes = [
        *constants,
        helper.make_node("Identity", ["bn1.weight"], ["alias"]),
        helper.make_node("BatchNormalization", ["x", *inputs], ["y1"], "first", epsilon=1e-3, momentum=0.8),
        helper.make_node("BatchNormalization", ["y1", "c0", "c1", "c2", "c3"], ["y2"], "second"),
        helper.make_node(
            "BatchNormalization", ["y2", "alias", "listed", "c2", "c3"], ["y3", "", ""], "third", training_mode=1
        ),
        helper.make_node("If", ["cond"], ["y4"], "choice", then_branch=inner, else_branch=inner),
    ]
    body = []
    if functions:
        own = ["x", "g", "b", "m", "v"]
        norm = helper.make_node("BatchNormalization", own, ["y"], "within")
        norm.attribute.append(onnx.AttributeProto(name="epsilon", ref_attr_name="eps", type=onnx.AttributeProto.FLOAT))
        body = [helper.make_function("mine", "norm", own, ["y"], [norm], [helper.make_opsetid("", 17)], ["eps"])]
        nodes.append(helper.make_node("norm", ["x", *inputs], ["y5"], "call", domain="mine", eps=0.25))
    graph = helper.make_graph(
        *(nodes, "graph", [helper.make_tensor_value_info("x", kind, [1, 4, 2, 2])]),
        *([helper.make_tensor_value_info("y3", kind, None)], [*initializers, listed, half]),
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    return helper.make_model(graph, functions=body, opset_imports=opsets).SerializeToString()


def hdf5_file() -> bytes:
    """A whole model as Keras 2 wrote it: model_config, and groups of groups."""
    h5py = pytest.importorskip("h5py")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.h5"
        with h5py.File(path, "w") as file:
            layers = [
                {"class_name": "InputLayer", "config": {"name": "input"}},
                {"class_name": "BatchNormalization", "config": {"name": "bn1", "epsilon": 1e-5, "momentum": 0.9}},
                {"class_name": "Model", "config": {"name": "inside", "layers": [
                    {"class_name": "BatchNormalization", "config": {"name": "deep", "scale": False}},
                ]}},
            ]  # fmt: skip
            file.attrs["model_config"] = json.dumps({"class_name": "Model", "config": {"layers": layers}})
            for at, name in enumerate(("gamma", "beta", "moving_mean", "moving_variance")):
                file[f"model_weights/bn1/bn1/{name}:0"] = np.arange(4, dtype=np.float32) + at
                if at:
                    file[f"model_weights/inside/deep/{name}:0"] = np.arange(3, dtype=np.float32) + 10 * at
            file["model_weights/conv/conv/kernel:0"] = np.arange(36, dtype=np.float32).reshape(3, 3, 1, 4)
            file["optimizer_weights/iterations:0"] = np.int64(5)
        return path.read_bytes()


def keras_archive() -> bytes:
    """A .keras file as Keras 3 writes it: a configuration, and layers' tensors by number."""
    h5py = pytest.importorskip("h5py")
    layers = [
        {"class_name": "BatchNormalization", "config": {"name": "bn_a", "epsilon": 1e-5, "momentum": 0.9}},
        {"class_name": "BatchNormalization", "config": {"name": "bn_b", "scale": False, "center": True}},
    ]
    weights = io.BytesIO()
    with h5py.File(weights, "w") as file:
        for at, (name, count) in enumerate({"bn_a": 4, "bn_b": 3}.items()):
            group = file.create_group(f"layers/batch_normalization{f'_{at}' if at else ''}/vars")
            group.attrs["name"] = name
            for number in range(count):
                group[str(number)] = np.arange(5, dtype=np.float32) + 10 * number
        file["layers/conv2d/vars/0"] = np.zeros((3, 3, 1, 5), dtype=np.float32)
        file["optimizer/vars/0"] = np.int64(3)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", json.dumps({"class_name": "Sequential", "config": {"layers": layers}}))
        archive.writestr("model.weights.h5", weights.getvalue())
    return buffer.getvalue()


def safetensors_file() -> bytes:
    """The network's state dict, with metadata."""
    save = pytest.importorskip("safetensors.torch").save
    state = network().state_dict() | {"half": torch.ones(3).half(), "brain": torch.ones(3).bfloat16()}
    return save(state, metadata={"format": "pt", "note": 'a "quoted" {brace}'})


def exported() -> bytes:
    """The network as a program of torch.export."""
    buffer = io.BytesIO()
    torch.export.save(torch.export.export(network(), (torch.zeros(2, 3, 8, 8),)), buffer)
    return buffer.getvalue()


MAKERS: dict[str, tuple[str, Callable[[], bytes]]] = {
    "zip": (".pt", lambda: saved(contents())),
    "legacy": (".pth", lambda: saved(contents(), _use_new_zipfile_serialization=False)),
    "safetensors": (".safetensors", safetensors_file),
    "onnx": (".onnx", lambda: onnx_model(functions=True)),
    "hdf5": (".h5", hdf5_file),
    "keras": (".keras", keras_archive),
    "export": (".pt2", exported),
}


@functools.cache
def seed(name: str) -> tuple[str, bytes]:
    """Suffix and bytes of the seed of a format; the test that asks is skipped where it cannot be made."""
    suffix, make = MAKERS[name]
    return suffix, make()
