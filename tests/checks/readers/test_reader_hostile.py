"""Files made to harm: pickles, archives and other things at a path, each with one line as the answer, soon."""

from __future__ import annotations

import os
import pickle
import struct
import sys
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from seeds import saved
from torch.serialization import MAGIC_NUMBER as MAGIC

import batchnorm as bn
from batchnorm.checks.readers import CheckpointError, read
from batchnorm.checks.sources import SourceError

START = b"\x80\x02"
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n("
STORAGE = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ\x04\x00\x00\x00tQ"


def archive(data: bytes, folder: Path, **entries: bytes) -> Path:
    """A PyTorch archive with a pickle of our own making, and a storage of four floats."""
    with zipfile.ZipFile(folder / "model.pt", "w") as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/data/0", np.arange(4, dtype=np.float32).tobytes())
        for name, content in entries.items():
            file.writestr(f"archive/{name}", content)
    return folder / "model.pt"


def legacy(data: bytes, folder: Path, rest: bytes = b"") -> Path:
    """A file as before 1.6 with a pickle of our own making."""
    parts = [pickle.dumps(part, protocol=2) for part in (MAGIC, 1001, {})]
    (folder / "model.pt").write_bytes(b"".join(parts) + data + rest)
    return folder / "model.pt"


def number(value: int) -> bytes:
    """An integer in a pickle."""
    width = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([width]) + value.to_bytes(width, "little", signed=True)


def tensor(offset: int = 0, shape: tuple[int, ...] = (4,), strides: tuple[int, ...] = (1,)) -> bytes:
    """A view of the storage, in a pickle."""
    sizes, steps = (b"(" + b"".join(map(number, of)) + b"t" for of in (shape, strides))
    return TENSOR + STORAGE + number(offset) + sizes + steps + b"\x89}tR"


def test_the_archive_made_here_is_read(tmp_path: Path) -> None:
    found = read(archive(START + tensor(1, (3,)) + b".", tmp_path))
    assert found.tensors["",].values().tolist() == [1, 2, 3]


DAMAGED = {
    "empty": b"",
    "no stop": START + b"}",
    "nothing on the stack": START + b".",
    "memo index of two billion": START + b"]r\xff\xff\xff\x7fj\xff\xff\xff\x7f0.",
    "memo never written": START + b"h\x05.",
    "memo with an empty stack": START + b"q\x00.",
    "append to a dict": START + b"}K\x01a.",
    "append to nothing": START + b"a.",
    "set in a list": START + b"]K\x01K\x01s.",
    "items without a mark": START + b"}K\x01K\x02u.",
    "odd items": START + b"}(K\x01u.",
    "tuple without a mark": START + b"t.",
    "tuple of three from one": START + b"K\x01\x87.",
    "reduce of a number": START + b"K\x01)R.",
    "reduce without arguments": START + b"ccollections\nOrderedDict\nK\x01R.",
    "ordered dict of numbers": START + b"ccollections\nOrderedDict\n(K\x01tR.",
    "ordered dict of one-tuples": START + b"ccollections\nOrderedDict\n(](K\x01\x85eetR.",
    "object of a function": START + b"ctorch._utils\n_rebuild_tensor\n)\x81.",
    "build of a number": START + b"K\x01}b.",
    "rebuild without arguments": START + b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
    "rebuild of no storage": START + TENSOR + b"K\x01K\x00)))}tR.",
    "storage of no tuple": START + b"K\x01Q.",
    "storage of nothing": START + b")Q.",
    "storage called module": START + b"(X\x06\x00\x00\x00moduleK\x01K\x01K\x01K\x01tQ.",
    "storage of no type": START + STORAGE.replace(b"ctorch\nFloatStorage\n", b"K\x01") + b".",
    "storage that is missing": START + STORAGE.replace(b"\x000X", b"\x001X") + b".",
    "storage of a key that leads out": START
    + STORAGE.replace(b"X\x01\x00\x00\x000", b"X\x06\x00\x00\x00../../")
    + b".",
    "storage larger than its entry": START + STORAGE.replace(b"J\x04", b"J\x05") + b".",
    "storage of negative size": START + STORAGE.replace(b"J\x04\x00\x00\x00", b"J\xff\xff\xff\xff") + b".",
    "tensor beyond its storage": START + tensor(1) + b".",
    "tensor before its storage": START + tensor(-1) + b".",
    "tensor of huge shape": START + tensor(0, (2**40, 2**40), (0, 0)) + b".",
    "tensor of huge strides": START + tensor(0, (4,), (2**61,)) + b".",
    "tensor of negative strides": START + tensor(3, (4,), (-1,)) + b".",
    "tensor of other strides than sizes": START + tensor(0, (2, 2), (1,)) + b".",
    "tensor of 200 dimensions": START + tensor(0, (1,) * 200, (1,) * 200) + b".",
    "string longer than the file": START + b"X\xff\xff\xff\x7fabc.",
    "string of four billion": START + b"X\xff\xff\xff\xffabc.",
    "string that is no text": START + b"X\x02\x00\x00\x00\xff\xfe.",
    "number without its bytes": START + b"\x8a\xff\x01.",
    "name without an end": START + b"c" + b"a" * 5000,
    "name that is no text": START + b"c\xff\n\xfe\n.",
    "memoize with an empty stack": START + b"\x94.",
    "name of numbers": START + b"K\x01K\x02\x93.",
    "name without a module": START + b"\x8c\x01a\x93.",
    "name on the stack that runs code": START + b"\x8c\x02os\x8c\x06system\x93)R.",
    "set of a dict": START + b"}(K\x01\x90.",
    "frozen set without a mark": START + b"\x91.",
    "list as key": START + b"}]" + tensor() + b"s.",
    "frame that ends early": START + b"\x95\x01",
    "bytes longer than the file": START + b"\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",
    "string of 64 bits": START + b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff.",
    "byte array of 64 bits": START + b"\x96\xff\xff\xff\xff\xff\xff\xff\xff.",
    "long of four billion bytes": START + b"\x8b\xff\xff\xff\x7f.",
    "persistent id as text": START + b"Pabc\n.",
    "instance": START + b"(ios\nsystem\n.",
    "object": START + b"(cos\nsystem\no.",
    "extension": START + b"\x82\x01.",
    "deep tuple as a key": START + b"})" + b"\x85" * 100_000 + b"K\x01s" + tensor(9) + b".",
}


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("form", [archive, legacy])
def test_damaged_pickles(name: str, form: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as refused:
        read(form(DAMAGED[name], tmp_path))
    assert str(refused.value).isprintable()
    assert len(refused.value.args[0]) < 300


@pytest.mark.parametrize(
    ("data", "paths"),
    [
        (b"}q\x00X\x01\x00\x00\x00ah\x00s" + b"X\x01\x00\x00\x00x" + tensor() + b"s.", [("x",)]),
        (b"]q\x00h\x00a" + tensor() + b"a.", [("1",)]),
        (b"]q\x00h\x00h\x00\x86a" + tensor() + b"a.", [("1",)]),
        (b"})" + b"\x85" * 100_000 + tensor() + b"s.", [("tuple",)]),
        (b"cTorch\nfloatstorage\n.", []),
        (b"\x8c\x05torch\x8c\x04Size\x93)}\x92.", []),
        (b"](Nq\x00" + tensor() + b"q\x00h\x00e.", [("1",), ("2",)]),
        (b"}" + number(2**2000) + tensor() + b"s.", [(str(2**2000),)]),
        (b"}X\x01\x00\x00\x00a" + tensor() + b"sX\x01\x00\x00\x00a]s.", []),
    ],
    ids=[
        "dict in itself",
        "list in itself",
        "pair of itself",
        "deep tuple as key",
        "unknown name",
        "object with keywords",
        "memo written twice",
        "huge key",
        "key twice",
    ],
)
def test_odd_containers(data: bytes, paths: list[tuple[str, ...]], tmp_path: Path) -> None:
    assert list(read(archive(START + data, tmp_path)).tensors) == paths


HUGE = {
    "a million lists in lists": b"]" * 10**6 + b"a" * (10**6 - 1) + b".",
    "a million marks": b"(" * 10**6 + b".",
    "ten million lists": b"]" * 10**7 + b".",
    "ten million numbers": b"(" + b"K\x01" * 10**7 + b"t.",
    "a memo of a million places": b"".join(b"Nr" + struct.pack("<I", 7 * at) for at in range(10**6)) + b".",
    "laughs in lists": b"]" + b"".join(b"q\x00]h\x00ah\x00a" for _ in range(20)) + b".",
    "more laughs": b"]" + b"".join(b"q\x00](" + b"h\x00" * 500 + b"e" for _ in range(10)) + b".",
    "a dict a million times": b"}q\x01(" + b"K\x01K\x01" * 10**5 + b"u](" + b"h\x01" * 10**6 + b"e.",
    "doubled tuples": b"K\x01" + b"q\x00h\x00\x86" * 10**6 + b".",
    "a large list copied": b"](" + b"N" * 10**6 + b"eq\x00" + b"ctorch\nSize\nh\x00\x85R" * 1000 + b".",
    "ten million memoized": b"K\x01" + b"\x94" * 10**7 + b".",
    "large bytes": (b"B" + struct.pack("<I", 10**6) + b"a" * 10**6) * 100 + b".",
    "large strings": (b"X" + struct.pack("<I", 10**6) + b"a" * 10**6) * 100 + b".",
    "wide strings": (b"X" + struct.pack("<I", 10**6) + b"a" * (10**6 - 4) + "😀".encode()) * 50 + b".",
    "a hundred thousand tensors": b"(" + tensor() + b"q\x00" + b"h\x00" * 10**5 + b"t.",
}


def outcome(path: Path) -> str:
    """Read a file in at most 10 seconds (20 on a loaded machine), to an error of one line or a checkpoint."""
    begin, says = time.monotonic(), "read"
    try:
        read(path)
    except CheckpointError as error:
        says = str(error)
    assert time.monotonic() - begin < 20
    assert says.isprintable()
    assert len(says) < 302 + len(str(path))
    return says


@pytest.mark.slow
@pytest.mark.parametrize("name", HUGE)
def test_huge_pickles(name: str, tmp_path: Path) -> None:
    path = archive(START + HUGE[name], tmp_path)
    tracemalloc.start()
    try:
        outcome(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100 * 2**20


@pytest.mark.slow
def test_keys_of_one_hash(tmp_path: Path) -> None:
    """Integers that Python hashes alike would take hours in a dict: the child's processor time is bounded."""
    keys = b"".join(number(at * (2**61 - 1)) + b"N" for at in range(1, 50_000))
    assert "too long" in outcome(archive(START + b"}(" + keys + b"u.", tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["zip", "legacy"])
def test_truncated_at_every_length(form: str, tmp_path: Path) -> None:
    settings = {} if form == "zip" else {"_use_new_zipfile_serialization": False}
    data = saved({"bn.weight": torch.ones(4), "bn.bias": torch.zeros(4)}, **settings)
    path = tmp_path / "model.pt"
    for length in range(0, len(data), 7):
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError):
            read(path)


def bomb(folder: Path) -> Path:
    """A pickle that unpacks to a gigabyte."""
    with (
        zipfile.ZipFile(folder / "model.pt", "w", zipfile.ZIP_DEFLATED) as file,
        file.open("archive/data.pkl", "w", force_zip64=True) as entry,
    ):
        for _ in range(2**10):
            entry.write(b"N" * 2**20)
        entry.close()
        file.writestr("archive/version", "3\n")
    return folder / "model.pt"


@pytest.mark.slow
def test_zip_bomb(tmp_path: Path) -> None:
    path = bomb(tmp_path)
    assert path.stat().st_size < 2**21
    with pytest.raises(CheckpointError, match=r"too much memory|too long|larger"):
        read(path)


def test_entry_that_unpacks_to_more_than_it_says(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", START + tensor() + b".")
        file.writestr("archive/version", "3\n")
        file.writestr("archive/data/0", bytes(2**24))
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<L", 2**24), struct.pack("<L", 16)))
    assert read(path).tensors["",].values().tolist() == [0] * 4


def directory(data: bytes) -> int:
    return data.rindex(b"PK\x05\x06")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        (("end", 10, "<H"), 0xFFFF),
        (("end", 12, "<L"), 2**31),
        (("end", 16, "<L"), 2**31),
        (("end", 16, "<L"), 5),
        (("entry", 20, "<L"), 2**31),
        (("entry", 24, "<L"), 2**31),
        (("entry", 42, "<L"), 2**30),
        (("entry", 42, "<L"), 3),
        (("entry", 8, "<H"), 1),
        (("entry", 10, "<H"), 14),
        (("entry", 28, "<H"), 0xFFFF),
    ],
)
def test_damaged_archives(field: tuple[str, int, str], value: int, tmp_path: Path) -> None:
    path = archive(START + tensor() + b".", tmp_path)
    data = bytearray(path.read_bytes())
    where, at, form = field
    struct.pack_into(form, data, (data.index(b"PK\x01\x02") if where == "entry" else directory(data)) + at, value)
    path.write_bytes(data)
    assert outcome(path) != "read"


@pytest.mark.filterwarnings("ignore:Duplicate name:UserWarning")
def test_other_archives(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for names, says in (
        (["archive/data.pkl", "archive/data.pkl"], "two entries"),
        (["data.pkl"], "neither"),
        (["a/b/data.pkl"], "neither"),
        (["x.txt"], "neither"),
        ([], "neither"),
        (["other/x", "archive/data.pkl"], "damaged"),
        (["archive/data.pkl", "archive/byteorder", "archive/version"], "damaged"),
    ):
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                file.writestr(name, START + b"}.")
        assert says in outcome(path), names


@pytest.mark.slow
def test_archive_of_many_entries(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as file:
        for at in range(2**17):
            file.writestr(f"archive/{at}", "")
    assert "zip archive" in outcome(tmp_path / "model.pt")


def test_what_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    for content, says in (
        (b"", "empty"),
        (b"x", "known kind"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:12", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"\x1f\x8b\x08\x00", "gzip"),
        (b"\x93NUMPY\x01\x00", "NumPy"),
        (bytes(257) + b"ustar" + bytes(250), "tar archive"),
        (b"PK\x03\x04", "truncated"),
    ):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=says):
            read(path)


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFOs")
def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.pt")
    (tmp_path / "dangling.pt").symlink_to("nowhere")
    (tmp_path / "circle.pt").symlink_to("circle.pt")
    (tmp_path / "folder.pt").mkdir()
    for name, says in (
        ("fifo.pt", "no regular file"),
        ("dangling.pt", "no such file"),
        ("circle.pt", "cannot be read"),
        ("folder.pt", "no checkpoint in the folder"),
        ("missing.pt", "no such file"),
        ("a\0b", "no file name"),
        ("x" * 5000, "cannot be read"),
        ("/dev/zero", "no regular file"),
    ):
        with pytest.raises(CheckpointError, match=says):
            read(tmp_path / name)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
def test_not_allowed(tmp_path: Path) -> None:
    path = archive(START + b"}.", tmp_path)
    path.chmod(0)
    with pytest.raises(CheckpointError, match="Permission denied"):
        read(path)


def test_names_that_are_no_text(tmp_path: Path) -> None:
    """Half a surrogate pair, which cannot be printed."""
    name = b"X\x04\x00\x00\x00a\xed\xa0\x80"
    (path,) = read(archive(START + b"}" + name + tensor() + b"s.", tmp_path)).tensors
    assert path in [("a?",), ("a???",)]  # surrogates are no UTF-8, or are replaced
    header = b'{"a\\ud800":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"x")
    with pytest.raises(CheckpointError, match="header"):
        read(tmp_path / "a.safetensors")


def test_an_expanded_tensor_costs_what_is_stored(tmp_path: Path) -> None:
    found = read(archive(START + tensor(0, (2**30,), (0,)) + b".", tmp_path)).tensors["",]
    assert found.shape == found.values().shape == (2**30,)
    assert found.values().strides == (0,)
    state = {f"bn.{name}": torch.ones(1).expand(2**29) for name in ("running_mean", "running_var")}
    torch.save(state, tmp_path / "model.pt")
    with pytest.raises(SourceError, match="hold 1,073,741,824 values"):
        bn.check(tmp_path / "model.pt")


def text(words: str) -> bytes:
    """A string in a pickle."""
    return b"X" + struct.pack("<I", len(words)) + words.encode()


def test_no_patch_is_written(tmp_path: Path) -> None:
    """torch.load compares the source of a module in an old file with today's, and may write a patch of it."""
    function = b"c_codecs\nencode\n" + b"(N}" + text("dump_patches") + b"\x88s"
    function += text("__name__") + text(str(tmp_path / "evil")) + b"stb"
    module = b"(" + text("module") + function + text("a.py") + text("anything\n") + b"tQ."
    outcome(legacy(START + module, tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_names_that_a_terminal_would_obey(tmp_path: Path) -> None:
    for module in (b"\x1b[2Jos\rsys", b"os"):
        outcome(archive(START + b"c" + module + b"\nsy\x07stem" + b"x" * 500 + b"\n.", tmp_path))
    assert "runs code" in outcome(tmp_path / "model.pt")


@pytest.mark.parametrize("form", ["safetensors", "zip", "onnx"])
def test_a_large_file_is_read_in_places(form: str, tmp_path: Path) -> None:
    """4 GiB of weights, which lie in a hole of the file, between two norms of eight units."""
    path = tmp_path / f"model.{form}"
    norm, size = np.arange(8, dtype=np.float32).tobytes(), 2**32
    if form == "zip":
        state = {"running_mean": torch.arange(8.0), "w": torch.empty(2**14, 2**16), "running_var": torch.arange(8.0)}
        with torch.serialization.skip_data():
            torch.save(state, path)
        with zipfile.ZipFile(path) as file:
            entries = [file.getinfo(f"model/data/{key}") for key in range(3)]
        data, places = path.open("r+b"), []
        for entry in entries:
            data.seek(entry.header_offset + 26)
            places.append(entry.header_offset + 30 + sum(struct.unpack("<2H", data.read(4))))
    elif form == "safetensors":
        places = [0, 32, 32 + size]
        names = zip(
            ["running_mean", "w", "running_var"], [[8], [2**14, 2**16], [8]], places, [32, size, 32], strict=True
        )
        header = ",".join(
            f'"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{at},{at + length}]}}'
            for name, shape, at, length in names
        )
        text = f"{{{header}}}".encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text)
        data, places = path.open("r+b"), [at + 8 + len(text) for at in places]
    else:
        onnx = pytest.importorskip("onnx")
        places = [0, 32, 32 + size]
        model = onnx.ModelProto(ir_version=8)
        shapes = ([8], [2**14, 2**16], [8])
        for name, shape, at in zip(("running_mean", "w", "running_var"), shapes, places, strict=True):
            tensor = model.graph.initializer.add(name=name, dims=shape, data_type=1, data_location=1)
            for key, value in (("location", "weights"), ("offset", str(at))):
                tensor.external_data.add(key=key, value=value)
        path.write_bytes(model.SerializeToString())
        data = (tmp_path / "weights").open("w+b")
        data.truncate(size + 64)
    with data:
        for place in (places[0], places[2]):
            data.seek(place)
            data.write(norm)
    tracemalloc.start()
    try:
        found = read(path).tensors
        assert any(stored.shape == (2**14, 2**16) for stored in found.values())
        for name in ("running_mean", "running_var"):
            assert found[name,].values().tolist() == list(range(8))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2**20
