"""Programs of torch.export as files, against what torch.export.load makes of them, and damaged ones."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seeds import network, seed
from torch import nn

import batchnorm as bn
from batchnorm.checks.readers import CheckpointError, read

# PyTorch itself warns when it copies a program.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
CONFIG, GRAPH = "data/weights/model_weights_config.json", "models/model.json"


def written(path: Path, changed: dict[str, Any] | None = None, without: str = "") -> Path:
    """The program of the seeds, with entries of the archive changed or left out; functions change their JSON."""
    path.write_bytes(seed("export")[1])
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries.items():
            inner = name.partition("/")[2]
            change = (changed or {}).get(inner, data)
            if callable(change):
                value = json.loads(data)
                change(value)
                change = json.dumps(value)
            if inner != without:
                archive.writestr(name, change)
    return path


def test_against_torch(tmp_path: Path) -> None:
    path = written(tmp_path / "model.pt2")
    found, state = read(path), torch.export.load(path).state_dict
    assert (found.format, set(found.tensors)) == ("torch.export", {(name,) for name in state})
    for name, tensor in state.items():
        assert found.tensors[name,].shape == tuple(tensor.shape)
        assert found.tensors[name,].dtype == str(tensor.dtype).removeprefix("torch.")
        np.testing.assert_array_equal(found.tensors[name,].values(), tensor.detach().double().numpy())
    assert found.settings[(), "1"]["eps"] == 1e-5


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_types(kind: torch.dtype, tmp_path: Path) -> None:
    program = torch.export.export(network().to(kind), (torch.zeros(2, 3, 8, 8, dtype=kind),))
    torch.export.save(program, tmp_path / "model.pt2")
    found = read(tmp_path / "model.pt2").tensors["1.running_var",]
    assert found.dtype == str(kind).removeprefix("torch.")
    np.testing.assert_array_equal(found.values(), program.state_dict["1.running_var"].double().numpy())


def test_a_layer_under_two_names_is_one(tmp_path: Path) -> None:
    model = network()
    torch.export.save(
        torch.export.export(nn.Sequential(model, nn.Conv2d(6, 3, 1), model).eval(), (torch.zeros(2, 3, 8, 8),)),
        tmp_path / "model.pt2",
    )
    found = bn.check(tmp_path / "model.pt2").network
    assert [(layer.name, layer.settings["aliases"]) for layer in found.layers] == [("0.1", ("2.1",)), ("0.4", ("2.4",))]
    assert all(layer.settings["eps_known"] for layer in found.layers)


def larger(config: dict[str, Any]) -> None:
    config["config"]["1.running_var"]["tensor_meta"]["sizes"] = [{"as_int": 1000}]


def backwards(config: dict[str, Any]) -> None:
    config["config"]["1.running_var"]["tensor_meta"]["strides"] = [{"as_int": -1}]


def pickled(config: dict[str, Any]) -> None:
    config["config"]["1.running_var"]["use_pickle"] = True


def of_another_type(config: dict[str, Any]) -> None:
    config["config"]["1.running_var"]["tensor_meta"]["dtype"] = 11


def symbolic(config: dict[str, Any]) -> None:
    config["config"]["1.running_var"]["tensor_meta"]["sizes"] = [{"as_expr": "s0"}]


def elsewhere(config: dict[str, Any]) -> None:
    config["config"]["1.running_var"]["path_name"] = "../../../../etc/passwd"


def without_nodes(program: dict[str, Any]) -> None:
    del program["graph_module"]["graph"]["nodes"]


DAMAGES: dict[str, tuple[dict[str, bytes | Callable[[dict[str, Any]], None]], str]] = {
    "storage too small": ({CONFIG: larger}, "its elements are not in the file"),
    "negative stride": ({CONFIG: backwards}, "its elements are not in the file"),
    "pickled weights": ({CONFIG: pickled}, "a tensor of a special class is not read"),
    "unknown type": ({CONFIG: of_another_type}, "type 11 is not read"),
    "symbolic size": ({CONFIG: symbolic}, "truncated or damaged: torch.export: KeyError"),
    "entry outside": ({CONFIG: elsewhere}, "float32 cannot be read"),
    "no nodes": ({GRAPH: without_nodes}, "truncated or damaged: torch.export: KeyError"),
    "no JSON": ({GRAPH: b"{"}, "truncated or damaged: torch.export: JSONDecodeError"),
    "deep JSON": ({GRAPH: b"[" * 100_000}, "truncated or damaged: torch.export: RecursionError"),
    "big-endian": ({"byteorder": b"big"}, "big-endian order is not read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_programs_are_refused_in_a_line(damage: str, tmp_path: Path) -> None:
    changed, message = DAMAGES[damage]
    with pytest.raises(CheckpointError, match=message) as refused:
        bn.check(written(tmp_path / "model.pt2", changed))
    assert "\n" not in str(refused.value)


def test_programs_of_other_kinds_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"torch\.export\.load it and pass the program to batchnorm\.check"):
        bn.check(written(tmp_path / "model.pt2", without=CONFIG))
    with zipfile.ZipFile(tmp_path / "old.pt2", "w") as archive:  # as PyTorch wrote it before 2.8
        archive.writestr("serialized_exported_program.json", "{}")
    with pytest.raises(CheckpointError, match=r"torch\.export\.load it"):
        bn.check(tmp_path / "old.pt2")
