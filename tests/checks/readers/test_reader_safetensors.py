"""safetensors files and folders of shards, against what the safetensors package writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seeds import network, onnx_model, saved

from batchnorm.checks.readers import CheckpointError, read


def written(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file with a header of our own making."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def entry(begin: int, end: int, shape: Any = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_against_the_package(tmp_path: Path) -> None:
    save_file = pytest.importorskip("safetensors.torch").save_file
    tensors = network().state_dict()
    kinds = (torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.bool)
    tensors |= {
        str(kind): torch.tensor([[0, 1], [1, 3]]).to(kind) for kind in (*kinds, torch.float8_e4m3fn, torch.float8_e5m2)
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"a": 'quoted "text" {[', "b": "\\"})
    found = read(tmp_path / "model.safetensors")
    assert found.format == "safetensors"
    assert set(found.tensors) == {(name,) for name in tensors}
    for name, tensor in tensors.items():
        stored = found.tensors[name,]
        assert (stored.shape, f"torch.{stored.dtype}") == (tuple(tensor.shape), str(tensor.dtype))
        np.testing.assert_array_equal(stored.values(), tensor.double().numpy())


def test_known_by_content(tmp_path: Path) -> None:
    found = read(written(tmp_path / "model.bin", {"a": entry(0, 8)}, np.float32([1, 2]).tobytes()))
    assert found.format == "safetensors"
    assert found.tensors["a",].values().tolist() == [1, 2]


TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}'
ONCE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]'


@pytest.mark.parametrize(
    ("header", "says", "size"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, "invalid offset", 12),
        ({"a": entry(0, 8), "b": entry(12, 20)}, "invalid offset", 20),
        ({"a": entry(0, 8)}, "not fully covered", 64),
        ({"a": entry(0, 4096)}, "not fully covered", 64),
        ({"a": entry(8, 4, [0])}, "invalid offset", 8),
        ({"a": entry(0, 8, [3])}, "invalid shape", 8),
        ({"a": entry(0, 8, [-2])}, "header", 8),
        ({"a": entry(0, 8, [2.0])}, "header", 8),
        ({"a": entry(0, 8, [True, 2])}, "header", 8),
        ({"a": entry(0, 8, [2**70])}, "header", 8),
        ({"a": entry(0, 0, [2**61, 2**61, 0])}, "overflow", 0),
        ({"a": entry(0, 0, [0, 2**62])}, "makes no sense", 0),
        ({"a": entry(0, 4, [1] * 40)}, "makes no sense", 4),
        ({"a": {"dtype": "F32", "shape": [2]}}, "header", 8),
        ({"a": []}, "header", 8),
        ({"a": {"dtype": 3, "shape": [], "data_offsets": [0, 1]}}, "header", 1),
        (TWICE, "invalid offset", 16),
        (b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', "duplicate", 8),
        (b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,8]}}', "header", 8),
        (b'{"__metadata__":{},"__metadata__":{}}', "duplicate", 0),
        (b"{", "header", 0),
        (b"{}}", "header", 0),
        (b'{"a"', "header", 0),
        (b'{"a\xff":1}', "header", 0),
        (b'{"a":' + b"[" * 10**6, "recursion", 0),
        (b'{"__metadata__":' + b"[" * 10**6 + b"]" * 10**6 + b"}", "header", 0),
        (b'{"\x1b[2J":{}}', "header", 0),
        ({"\x1b[2J" + "x" * 500: entry(4, 8)}, "invalid offset", 8),
        (ONCE.replace(b"F32", b"F" + b"9" * 5000) + b"}}", "unknown variant", 8),
    ],
    ids=lambda value: str(value)[:60],
)
def test_damaged_headers(header: Any, says: str, size: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=says) as refused:
        read(written(tmp_path / "model.safetensors", header, bytes(size)))
    assert str(refused.value).isprintable()
    assert len(refused.value.args[0]) < 300


def test_many_tensors_of_nothing(tmp_path: Path) -> None:
    header = {f"n{at}": entry(0, 0, [0]) for at in range(2**16 + 1)}
    with pytest.raises(CheckpointError, match="more than 65536 tensors"):
        read(written(tmp_path / "model.safetensors", header))


def test_what_the_header_says_besides_is_passed_over(tmp_path: Path) -> None:
    path = written(tmp_path / "model.safetensors", ONCE + b',"x":"' + b"y" * 5000 + b'"}}', bytes(8))
    assert read(path).tensors["a",].values().tolist() == [0, 0]


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 2**32, 65])
def test_header_longer_than_the_file(length: int, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="longer than the file"):
        read(written(tmp_path / "model.safetensors", b"{}", bytes(62), length))


def test_header_too_long(tmp_path: Path) -> None:
    path = written(tmp_path / "model.safetensors", b"{", length=2**30)
    with path.open("r+b") as file:
        file.truncate(2**30 + 100)  # sparse
    with pytest.raises(CheckpointError, match="header too large"):
        read(path)


def test_unknown_type_is_named_when_it_is_read(tmp_path: Path) -> None:
    found = read(written(tmp_path / "a.safetensors", {"a": entry(0, 4, [8], "F4"), "b": entry(4, 8)}, bytes(8)))
    assert found.tensors["a",].shape == (8,)
    with pytest.raises(CheckpointError, match="F4"):
        found.tensors["a",].values()
    assert found.tensors["b",].values().tolist() == [0]


def test_truncated_at_every_length(tmp_path: Path) -> None:
    data = written(tmp_path / "whole", {"a": entry(0, 8), "b": entry(8, 16)}, bytes(16)).read_bytes()
    path = tmp_path / "model.safetensors"
    for length in range(0, len(data), 5):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read(path)


def sharded(folder: Path, **changes: Any) -> Path:
    written(folder / "model-1.safetensors", {"a": entry(0, 8)}, np.float32([1, 2]).tobytes())
    written(folder / "model-2.safetensors", {"b": entry(0, 4)}, np.float32([3]).tobytes())
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"} | changes
    index = {"metadata": {"total_size": 12}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", ["", "model.safetensors.index.json"])
def test_shards(name: str, tmp_path: Path) -> None:
    found = read(sharded(tmp_path) / name)
    assert {path: stored.values().tolist() for path, stored in found.tensors.items()} == {("a",): [1, 2], ("b",): [3]}
    assert found.size == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert found.path == tmp_path / name


def test_shards_of_torch(tmp_path: Path) -> None:
    (tmp_path / "one.bin").write_bytes(saved({"a": torch.ones(2)}))
    (tmp_path / "two.bin").write_bytes(saved({"b": torch.zeros(1)}))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "one.bin", "b": "two.bin"}}))
    assert set(read(tmp_path).tensors) == {("a",), ("b",)}


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"a": "../model-1.safetensors"}, "not beside"),
        ({"a": "/etc/passwd"}, "not beside"),
        ({"a": "..\\model"}, "not beside"),
        ({"a": "missing.safetensors"}, r"missing\.safetensors, and there is no such file"),
        ({"c": "model-1.safetensors"}, "tensor c"),
        ({f"x{at}": f"{at}.safetensors" for at in range(2000)}, "2002 files"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_damaged_index(changes: dict[str, str], says: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=says):
        read(sharded(tmp_path, **changes))


def test_an_index_of_files_of_another_format(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(onnx_model())
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"bn1.weight": "model.onnx"}}), encoding="utf-8")
    with pytest.raises(
        CheckpointError, match="the index names files of ONNX: those of safetensors and PyTorch are read"
    ):
        read(index)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", '{"weight_map":3}', '{"weight_map":{}}', '{"weight_map":{"a":3}}', "[" * 10**6),
        '{"weight_map":{"a":"model-1.safetensors"},"x":[' + "[]," * 10**6 + "[]]}",
    ],
    ids=lambda text: text[:40],
)
def test_index_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError):
        read(tmp_path)


def test_folder_with_one_several_or_no_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match="no checkpoint in the folder"):
        read(tmp_path)
    (tmp_path / "epoch1.pt").write_bytes(saved({"a": torch.ones(1)}))
    assert list(read(tmp_path).tensors) == [("a",)]
    (tmp_path / "epoch2.pt").write_bytes(saved({"b": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"2 checkpoints.*epoch1\.pt, epoch2\.pt"):
        read(tmp_path)
    written(tmp_path / "model.safetensors", {"c": entry(0, 4)}, bytes(4))
    assert list(read(tmp_path).tensors) == [("c",)]
