"""The kinds of files that people have, as docs/checkpoints.md lists them: read, or named with what to do."""

from __future__ import annotations

import argparse
import pickle
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seeds import hdf5_file, keras_archive, network, saved
from torch import nn

import batchnorm as bn
from batchnorm.checks.readers import CheckpointError
from batchnorm.checks.sources import SourceError

DOCS = Path(__file__).parents[3] / "docs" / "checkpoints.md"
STATE = network().state_dict()
LAYERS = ["1", "4"]
ELSEWHERE = """
import sys, torch
from torch import nn
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.03)
class DetectionModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(Block(), nn.SiLU())
        self.yaml, self.names = {"nc": 2}, {0: "cat", 1: "dog"}
path, form = sys.argv[1:]
model = DetectionModel().half()
what = {"model": model, "ema": None, "optimizer": None, "train_args": {"lr0": 0.01}, "date": "2025-01-01"}
torch.save(model if form == "model" else what, path)
"""


def save(value: Any, path: Path, **settings: Any) -> Path:
    path.write_bytes(saved(value, **settings))
    return path


def elsewhere(form: str, folder: Path) -> Path:
    """Saved by a package that is not installed here."""
    (folder / "elsewhere.py").write_text(ELSEWHERE + "\n")
    program = "import runpy, sys; sys.path.insert(0, '.'); import elsewhere"
    path = folder / "model.pt"
    subprocess.run([sys.executable, "-c", program, str(path), form], check=True, cwd=folder)
    return path


def training() -> dict[str, Any]:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    settings = argparse.Namespace(lr=0.1, out=Path("runs"), betas=np.float64(0.9))
    return {
        "epoch": 3,
        "args": settings,
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "losses": np.arange(3.0),
        "rng": torch.get_rng_state(),
    }


def lightning(path: Path) -> Path:
    state = {f"model.{name}": tensor for name, tensor in STATE.items()}
    extra = {"hyper_parameters": argparse.Namespace(lr=1e-3), "pytorch-lightning_version": "2.4.0", "loops": {}}
    return save({"epoch": 1, "state_dict": state, **extra}, path)


def detectron(path: Path) -> Path:
    model = {
        f"backbone.bn1.{name.partition('.')[2]}": tensor.numpy() for name, tensor in STATE.items() if name[0] == "1"
    }
    path.write_bytes(pickle.dumps({"model": model, "__author__": "a zoo"}))
    return path


def safetensors(folder: Path) -> Path:
    save_file = pytest.importorskip("safetensors.torch").save_file
    save_file(STATE, folder / "model.safetensors")
    return folder / "model.safetensors"


def sharded(folder: Path, suffix: str) -> Path:
    import json

    write = pytest.importorskip("safetensors.torch").save_file if suffix == ".safetensors" else torch.save
    names = sorted(STATE)
    parts = {f"part-{at}{suffix}": {name: STATE[name] for name in names[at::2]} for at in range(2)}
    for name, part in parts.items():
        write(part, folder / name)
    index = {"weight_map": {tensor: name for name, part in parts.items() for tensor in part}}
    stem = "model" if suffix == ".safetensors" else "pytorch_model"
    (folder / f"{stem}{suffix}.index.json").write_text(json.dumps(index))
    return folder


def onnx(folder: Path, external: bool = False, folded: bool = False) -> Path:
    onnx = pytest.importorskip("onnx")
    path, model = folder / "model.onnx", network().eval()
    settings: dict[str, Any] = {"do_constant_folding": folded, "dynamo": False}
    settings["training"] = torch.onnx.TrainingMode.EVAL if folded else torch.onnx.TrainingMode.PRESERVE
    if folded:
        model = nn.Sequential(model[0], model[2], model[3])
    torch.onnx.export(model, (torch.zeros(2, 3, 8, 8),), path, **settings)
    if external:
        loaded = onnx.load(path)
        onnx.save(loaded, path, save_as_external_data=True, location="model.data", size_threshold=0)
    return path


def content(path: Path, data: bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def weights(folder: Path) -> Path:
    h5py = pytest.importorskip("h5py")
    with h5py.File(folder / "model.weights.h5", "w") as file:
        for at in range(4):
            file[f"layers/batch_normalization/vars/{at}"] = np.arange(3.0) + at
    return folder / "model.weights.h5"


def scripted(folder: Path) -> Path:
    torch.jit.save(torch.jit.trace(network(), torch.zeros(1, 3, 8, 8)), folder / "model.pt")
    return folder / "model.pt"


def exported(folder: Path) -> Path:
    program = torch.export.export(network(), (torch.zeros(1, 3, 8, 8),))
    torch.export.save(program, folder / "model.pt2")
    return folder / "model.pt2"


def distributed(folder: Path) -> Path:
    import torch.distributed.checkpoint as checkpoint

    checkpoint.save({"model": STATE}, checkpoint_id=folder / "dcp")
    return folder / "dcp"


def tensorflow(folder: Path) -> Path:
    content(folder / "tf" / "checkpoint", b'model_checkpoint_path: "model"\n')
    content(folder / "tf" / "model.index", b"\0" * 64)
    content(folder / "tf" / "model.data-00000-of-00001", b"\0" * 64)
    return folder / "tf"


def npz(folder: Path) -> Path:
    np.savez(folder / "model.npz", **{name: tensor.numpy() for name, tensor in STATE.items()})
    return folder / "model.npz"


Kind = tuple[Callable[[Path], Path], list[str] | str]
"""How to make it, and the names of its layers; or what the error says."""

KINDS: dict[str, Kind] = {
    "state dict": (lambda d: save(STATE, d / "model.pth"), LAYERS),
    "training checkpoint with a Namespace and NumPy": (lambda d: save(training(), d / "last.ckpt"), LAYERS),
    "DataParallel prefix": (lambda d: save({f"module.{n}": t for n, t in STATE.items()}, d / "a.pt"), LAYERS),
    "Lightning": (lambda d: lightning(d / "a.ckpt"), ["model.1", "model.4"]),
    "whole pickled model": (lambda d: elsewhere("model", d), ["model.0.bn"]),
    "Ultralytics": (lambda d: elsewhere("zoo", d), ["model.0.bn"]),
    "EMA pair": (
        lambda d: save({"model": STATE, "model_ema": STATE}, d / "a.pt"),
        [f"{copy}: {name}" for copy in ("model", "model_ema") for name in LAYERS],
    ),
    "torch.save before 1.6": (lambda d: save(STATE, d / "a.pth", _use_new_zipfile_serialization=False), LAYERS),
    "pickle protocols 3 to 5": (lambda d: save(STATE, d / "a.pth", pickle_protocol=4), LAYERS),
    "Detectron2 .pkl": (lambda d: detectron(d / "R-50.pkl"), ["backbone.bn1"]),
    "safetensors": (safetensors, LAYERS),
    "sharded safetensors with index": (lambda d: sharded(d, ".safetensors"), LAYERS),
    "sharded .bin with index": (lambda d: sharded(d, ".bin"), LAYERS),
    "ONNX": (onnx, LAYERS),
    "ONNX with external data": (lambda d: onnx(d, external=True), LAYERS),
    "folded ONNX": (lambda d: onnx(d, folded=True), []),
    "Keras 2 .h5": (lambda d: content(d / "model.h5", hdf5_file()), ["bn1", "deep"]),
    "Keras 3 .keras": (lambda d: content(d / "model.keras", keras_archive()), ["bn_a", "bn_b"]),
    "Keras .weights.h5": (weights, ["batch_normalization"]),
    "NumPy .npz": (npz, LAYERS),
    "TorchScript": (scripted, "torch.jit.load it and save its state_dict()"),
    "torch.export .pt2": (exported, LAYERS),
    "torch.distributed.checkpoint": (distributed, "dcp_to_torch_save"),
    "TensorFlow checkpoint": (tensorflow, "load it"),
    "TensorFlow SavedModel": (lambda d: content(d / "s" / "saved_model.pb", b"\x08\x01\x12").parent, "tf2onnx"),
    "Flax msgpack": (lambda d: content(d / "flax_model.msgpack", b"\x81\xa6params\x80"), "msgpack_restore"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_kind(kind: str, tmp_path: Path) -> None:
    make, expected = KINDS[kind]
    path = make(tmp_path)
    if isinstance(expected, str):
        with pytest.raises((CheckpointError, SourceError), match=re.escape(expected)) as refused:
            bn.check(path)
        assert "\n" not in str(refused.value)
    else:
        found = bn.check(path)
        assert [layer.name for layer in found.network.layers] == expected


def test_a_model_of_another_package_has_its_settings(tmp_path: Path) -> None:
    (layer,) = bn.check(elsewhere("zoo", tmp_path)).network.layers
    assert (layer.settings["eps"], layer.settings["momentum"], layer.settings["eps_known"]) == (1e-3, 0.03, True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["model.index", "model.data-00000-of-00001", "checkpoint"])
def test_files_of_tensorflow(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="checkpoint of TensorFlow"):
        bn.check(tensorflow(tmp_path) / name)


def test_the_table_in_docs() -> None:
    """One row for each kind, read or not as here."""
    rows = [line.split("|")[1:3] for line in DOCS.read_text().splitlines() if line.startswith("| ")][1:]
    table = {kind.strip(): result.strip() == "read" for kind, result in rows}
    assert table == {kind: not isinstance(expected, str) for kind, (_, expected) in KINDS.items()}
