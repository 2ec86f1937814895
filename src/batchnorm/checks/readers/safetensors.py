"""safetensors files, by the package of that name."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from batchnorm.checks.readers.directory import Directory, RefusedError

TYPES = {f"{kind}{bits}": f"{name}{bits}" for kind, name in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)}
TYPES |= {"F16": "float16", "F32": "float32", "F64": "float64", "BF16": "bfloat16", "BOOL": "bool", "C64": "complex64"}
TYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu"}


def read(path: Path, found: Directory) -> None:
    """Add the tensors of a file. Raises RefusedError."""
    from safetensors import safe_open

    with path.open("rb") as raw:
        if int.from_bytes(raw.read(8), "little") > path.stat().st_size - 8:
            raise RefusedError("the file is truncated or damaged: its header is longer than the file")
    with safe_open(path, framework="pt") as file:  # checks that the tensors follow one another and fill the file
        for name in file.offset_keys():
            part = file.get_slice(name)
            dtype = str(part.get_dtype())
            found.tensor((name,), part.get_shape(), TYPES.get(dtype, dtype), partial(file.get_tensor, name))
