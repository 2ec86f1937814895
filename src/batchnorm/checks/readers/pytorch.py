"""PyTorch's checkpoints, other pickles and arrays of NumPy: torch.load, with an unpickler that executes nothing.

torch.load(weights_only=True) refuses protocols 3 to 5, whole models, and every class that is not on its list. So the
full unpickler runs, and `Unpickler.find_class` returns functions that rebuild tensors, plain containers, or `Inert`.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from batchnorm.checks.readers.directory import Directory, RefusedError
from batchnorm.frameworks import stamped

MAPPED = 2**26
"""Bytes of an archive that is mapped; a smaller one is read, which checks its checksums."""
MAX_DEPTH, MAX_VISITS = 64, 2**21
"""Containers and modules inside one another, and entries looked at: a shared container is looked at every time."""
HARMFUL = {"os", "posix", "nt", "subprocess", "sys", "pty", "socket", "shutil", "runpy", "webbrowser", "ctypes"}
HARMFUL |= {"importlib", "code", "pdb", "commands", "io.open"}
HARMFUL |= {f"builtins.{name}" for name in ("eval", "exec", "compile", "__import__", "open", "execfile")}
"""Modules and functions that no checkpoint needs. A file that names one is malicious."""


class Inert(dict[Any, Any]):
    """A placeholder for objects that are not in ALLOWED: it stores the contents of the pickle, and does nothing."""

    kind = ""
    dump_patches = False  # torch reads this of the modules in old files
    state: Any = None

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__()

    def __call__(self, *arguments: Any, **keywords: Any) -> Inert:
        return Inert()

    def __setstate__(self, state: Any) -> None:
        self.state = state[0] if isinstance(state, tuple) and state else state

    def append(self, value: Any) -> None:
        self[len(self)] = value

    add = append
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


class Unpickler(pickle.Unpickler):
    """Build tensors, arrays and plain containers only."""

    def find_class(self, module: str, name: str) -> Any:
        module = {"__builtin__": "builtins", "copy_reg": "copyreg"}.get(module, module)  # as Python 2 calls them
        full = f"{module}.{name}".replace("numpy._core", "numpy.core")
        if {module, module.partition(".")[0], full} & HARMFUL:
            says = f"the file runs code when it is loaded: {full:.100}"
            raise RefusedError(f"{says}. Do not load it, ask for its state_dict")
        if full not in ALLOWED:
            ALLOWED[full] = type("Inert", (Inert,), {"kind": name})
        return ALLOWED[full]


def _load(file: Any, **settings: Any) -> Any:
    os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD", None)
    # Of modules in old files torch compares the source with today's, and would write a patch where their class asks.
    torch.serialization.get_source_lines_and_file = None  # type: ignore[attr-defined, assignment]
    # In place of the module `pickle`.
    own = SimpleNamespace(
        __name__="pickle", Unpickler=Unpickler, load=lambda file, **names: Unpickler(file, **names).load()
    )
    return torch.load(file, map_location="cpu", pickle_module=own, weights_only=False, **settings)


def _parameter(value: Any, requires_grad: Any = True, *_: Any) -> Any:
    """A tensor that still shows whether it is trained."""
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.is_leaf:
        value.requires_grad_(requires_grad is True)
    return value


ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "copyreg._reconstructor": lambda cls, *_: cls() if isinstance(cls, type) and issubclass(cls, Inert) else Inert(),
    "_codecs.encode": lambda text, *_: text.encode("latin1"),
    "torch.Size": tuple,
    "torch.storage.UntypedStorage": torch.UntypedStorage,
    "torch.storage._load_from_bytes": lambda data: _load(io.BytesIO(data)),
    "torch._tensor._rebuild_from_type_v2": lambda function, kind, arguments, state: function(*arguments),
    "numpy.core.multiarray._reconstruct": np.ndarray(0).__reduce__()[0],
    "numpy.core.multiarray.scalar": np.float64(0).__reduce__()[0],
    "numpy.core.numeric._frombuffer": lambda data, kind, shape, order: np.ndarray(shape, kind, data, order=order),
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "torch.nn.parameter.Parameter": _parameter,
}  # fmt: skip
for kind in (set, frozenset, list, dict, tuple, complex, bytearray):
    ALLOWED[f"builtins.{kind.__name__}"] = kind
for name in ("parameter", "parameter_with_state"):
    ALLOWED[f"torch._utils._rebuild_{name}"] = _parameter
for name in ("device_tensor_from_cpu_tensor", "device_tensor_from_numpy"):
    ALLOWED[f"torch._utils._rebuild_{name}"] = lambda value, *_: value
for name in ("tensor", "tensor_v2", "tensor_v3", "meta_tensor_no_storage", "qtensor", "sparse_tensor"):
    ALLOWED[f"torch._utils._rebuild_{name}"] = getattr(torch._utils, f"_rebuild_{name}")
NAMED = torch.dtype | torch.qscheme | torch.layout
ALLOWED |= {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, NAMED)}


def read(path: Path, found: Directory) -> None:
    """Add the tensors of a file. Raises RefusedError."""
    Walk(found).visit(_contents(path, found), (), ())


def _contents(path: Path, found: Directory) -> Any:
    """What torch.save, numpy.savez or pickle.dump wrote."""
    if found.format == "NumPy":
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    if found.format == "PyTorch":
        with zipfile.ZipFile(path) as archive:
            stored = all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())
        return _load(str(path), mmap=stored and path.stat().st_size > MAPPED)
    with path.open("rb") as file:
        value = Unpickler(file, encoding="latin1").load()  # the encoding of Python 2's arrays
    if type(value) is int and value == torch.serialization.MAGIC_NUMBER:  # torch.save wrote those before 1.6
        found.format = "PyTorch (legacy)"
        return _load(str(path))
    if not isinstance(value, dict | list | tuple | torch.Tensor):
        raise RefusedError("a pickle without tensors: save the model's state_dict() with torch.save")
    return value


class Walk:
    """Adds every tensor in what a pickle holds, by the keys that lead to it, and the settings of its modules."""

    def __init__(self, found: Directory) -> None:
        self.found, self.visits = found, 0

    def visit(self, value: Any, path: tuple[str, ...], inside: tuple[int, ...], prefix: str = "") -> None:
        """Add a value's tensors; `inside`: its containers' ids, `prefix`: its module's name. Raises RefusedError."""
        self.visits += 1
        if self.visits > MAX_VISITS or len(inside) > MAX_DEPTH:
            raise RefusedError("the containers in the file hold one another too often: save the state_dict alone")
        if isinstance(value, torch.Tensor | np.ndarray):
            self.tensor(value, path or ("",))
            return
        if id(value) in inside or not isinstance(value, dict | list | tuple):
            return
        state = value.state if isinstance(value, Inert) and isinstance(value.state, dict) else {}
        inside = (*inside, id(value))
        for name, settings in stamped(getattr(value, "_metadata", None)):
            self.found.modules.append((path, name, settings))
        if not isinstance(value, Inert) or "_modules" not in state:
            for key, entry in (_entries(value) | _entries(state)).items():
                self.visit(entry, (*path, key), inside)
            return
        settings = {name: float(state[name]) for name in ("eps", "momentum") if type(state.get(name)) in (int, float)}
        settings |= {"training": state["training"]} if isinstance(state.get("training"), bool) else {}
        settings |= {"cumulative": True} if state.get("momentum", 0) is None else {}
        parameters = [one for one in _entries(state.get("_parameters")).values() if isinstance(one, torch.Tensor)]
        is_fixed = bool(parameters) and not any(one.requires_grad for one in parameters)
        settings["frozen"] = is_fixed or value.kind.startswith("Frozen")
        self.found.modules.append((path, prefix.removesuffix("."), settings | {"class": value.kind}))
        for part in ("_parameters", "_buffers", "_modules"):
            for key, entry in _entries(state.get(part)).items():
                if isinstance(entry, torch.Tensor):
                    self.tensor(entry, (*path, prefix + key))
                elif isinstance(entry, Inert) and part == "_modules":
                    self.visit(entry, path, inside, f"{prefix}{key}.")

    def tensor(self, value: Any, path: tuple[str, ...]) -> None:
        """Add a tensor, without the sizes along which it is expanded."""
        dtype = str(value.dtype).removeprefix("torch.")
        if isinstance(value, np.ndarray) or value.layout != torch.strided or value.is_meta or value.is_quantized:
            self.found.tensor(path, value.shape, dtype, lambda: _numbers(value))
            return
        part = value.detach()
        for axis, step in enumerate(value.stride()):
            part = part.narrow(axis, 0, 1) if step == 0 and part.shape[axis] > 1 else part
        key = f"{value.data_ptr()} {value.stride()} {tuple(value.shape)} {dtype}" if value.numel() else ""
        self.found.tensor(path, value.shape, dtype, part.resolve_neg, part.shape, key)


def _entries(value: Any) -> dict[str, Any]:
    """The entries of a container by name, of equal names the last; none of anything else."""
    entries = enumerate(value) if isinstance(value, list | tuple) else value.items() if isinstance(value, dict) else ()
    plain = (str, int, float, type(None))
    return {str(key) if isinstance(key, plain) else type(key).__name__: entry for key, entry in entries}


def _numbers(value: Any) -> Any:
    if isinstance(value, torch.Tensor) and (value.is_meta or not value.is_quantized):
        raise RefusedError(
            "a tensor on the meta device has no numbers" if value.is_meta else "sparse tensors are not read"
        )
    return value.detach().dequantize() if isinstance(value, torch.Tensor) else value
