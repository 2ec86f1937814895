"""The guarded process itself: limits, crashes, hostile answers, the network, and what it may import."""

from __future__ import annotations

import os
import socket
import sys
import time
import zipfile
from pathlib import Path

import pytest
import torch
from seeds import MAKERS, seed

from batchnorm.checks.readers import CheckpointError, guard, read

SAY = "import sys; sys.stdout.buffer.write({})"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    torch.save({"bn.running_mean": torch.arange(3.0), "bn.running_var": torch.ones(3)}, path)
    return path


@pytest.mark.parametrize("name", MAKERS)
def test_every_format(name: str, tmp_path: Path) -> None:
    suffix, data = seed(name)
    (tmp_path / f"model{suffix}").write_bytes(data)
    found = read(tmp_path / f"model{suffix}")
    assert found.tensors
    assert all(stored.values().shape == stored.shape for stored in found.tensors.values())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "says"),
    [
        ("import os; os.abort()", "crashed"),
        ("raise SystemExit(3)", "crashed"),
        ("import time; time.sleep(60)", "too long"),
        ("a = bytearray(2**29); b = bytearray(2**29); import time; time.sleep(60)", "too much memory"),
        ("pass", "makes no sense"),
        (SAY.format("b'{'"), "makes no sense"),
        (SAY.format("b'[]'"), "makes no sense"),
        (SAY.format("b'[' * 10**5"), "makes no sense"),
        (SAY.format("b'x' * 10**8"), "makes no sense"),
        (SAY.format("b'{\"tensors\": [1]}'"), "makes no sense"),
        (SAY.format('b\'{"tensors": [{"shape": [2], "dtype": 1, "at": 5, "stored": [2]}]}\''), "makes no sense"),
        (SAY.format('b\'{"tensors": [{"shape": [-2], "dtype": 1}]}\''), "makes no sense"),
        (SAY.format('b\'{"error": "a\\\\u001b[2J"}\''), r"a\?\[2J"),
    ],
)
def test_the_process_fails(program: str, says: str, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "PROGRAM", program.replace("{", "{{").replace("}", "}}"))
    monkeypatch.setattr(guard, "TIMEOUT", 5)
    with pytest.raises(CheckpointError, match=says) as refused:
        read(model)
    assert str(refused.value).isprintable()
    assert str(model) in str(refused.value)


def test_no_process(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(model))
    with pytest.raises(CheckpointError, match="no process could be started"):
        read(model)


def test_nothing_is_imported_from_where_we_are(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(tmp_path)
    assert len(read(Path(model.name)).tensors) == 2


@pytest.mark.parametrize(
    ("name", "library", "extra"),
    [
        ("safetensors", "safetensors", "tools"),
        ("onnx", "onnx", "onnx"),
        ("hdf5", "h5py", "hdf5"),
        ("keras", "h5py", "hdf5"),
    ],
)
def test_the_extra_is_named(
    name: str, library: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    suffix, data = seed(name)
    (tmp_path / f"model{suffix}").write_bytes(data)
    (tmp_path / f"{library}.py").write_text(f"raise ModuleNotFoundError('no', name='{library}')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    with pytest.raises(CheckpointError, match=rf"{library}: pip install 'batchnorm\[{extra}\]'"):
        read(tmp_path / f"model{suffix}")


def in_the_child(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Run code in the process before it reads, under its limits."""
    limited = f"\nimport batchnorm.checks.readers.child as c; c.limit(0)\n{code}\nmain()"
    assert "\nmain()" in guard.PROGRAM
    monkeypatch.setattr(guard, "PROGRAM", guard.PROGRAM.replace("\nmain()", limited))


@pytest.mark.skipif(sys.platform != "linux", reason="namespaces are Linux's")
def test_the_network_is_denied(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system allows it; the child then has no interface but one that is down."""
    in_the_child(
        monkeypatch,
        "import socket, json, os; names = socket.if_nameindex(); "
        "print(json.dumps({{'error': f'{{len(names)}} interfaces'}}), flush=True); os._exit(0)",
    )
    with pytest.raises(CheckpointError, match="interfaces") as refused:
        read(model)
    if "1 interfaces" not in str(refused.value):
        pytest.skip("this system allows no namespaces")
    assert len(socket.if_nameindex()) > 0


@pytest.mark.skipif(sys.platform != "linux", reason="Landlock is Linux's")
def test_no_file_is_written(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_child(
        monkeypatch,
        f"import os\ntry:\n    open({str(tmp_path / 'written')!r}, 'w')\nexcept PermissionError:\n"
        '    print(\'{{"error": "denied"}}\', flush=True)\nelse:\n    print(\'{{"error": "written"}}\', flush=True)\n'
        "os._exit(0)",
    )
    with pytest.raises(CheckpointError, match=r"denied|written") as refused:
        read(model)
    if "written" in str(refused.value.args[0]):
        pytest.skip("this system has no Landlock")
    assert not (tmp_path / "written").exists()


@pytest.mark.slow
def test_hostile_files_are_stopped_in_time(tmp_path: Path) -> None:
    """A gigabyte in a small archive, and keys of one hash: 10 seconds (20 on a loaded machine) and 1 GiB at most."""
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        with file.open("archive/data.pkl", "w", force_zip64=True) as entry:
            for _ in range(2**10):
                entry.write(b"N" * 2**20)
        file.writestr("archive/version", "3\n")
    keys = tmp_path / "keys.pkl"
    keys.write_bytes(
        b"\x80\x02}("
        + b"".join(b"\x8a\x0b" + (at * (2**61 - 1)).to_bytes(11, "little") + b"N" for at in range(1, 50_000))
        + b"u."
    )
    memo = tmp_path / "memo.pkl"
    memo.write_bytes(b"\x80\x02]r\xff\xff\xff\x7fj\xff\xff\xff\x7f0.")
    for one in (path, keys, memo):
        begin = time.monotonic()
        with pytest.raises(CheckpointError, match=r"too much memory|too long"):
            read(one)
        assert time.monotonic() - begin < 20


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds all private memory on Linux alone")
def test_the_kernel_bounds_memory_where_the_guard_is_late(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_the_child(monkeypatch, "a = bytearray(2**30)")
    monkeypatch.setattr(guard, "MAX_MEMORY", 2**40)
    with pytest.raises(CheckpointError, match="crashed"):
        read(model)


def test_large_shards_have_the_limits_of_their_size(tmp_path: Path) -> None:
    """The index is small, and its file is mapped as a whole: sparse, so that it takes no disk."""
    state = {"bn.running_mean": torch.arange(8.0), "w": torch.empty(2**29), "bn.running_var": torch.ones(8)}
    with torch.serialization.skip_data():
        torch.save(state, tmp_path / "one.bin")
    index = '{"weight_map": {"bn.running_mean": "one.bin", "bn.running_var": "one.bin", "w": "one.bin"}}'
    (tmp_path / "pytorch_model.bin.index.json").write_text(index)
    assert read(tmp_path).tensors["w",].shape == (2**29,)
