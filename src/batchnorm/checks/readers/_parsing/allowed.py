"""The names that a pickle of tensors may refer to, and what each stands for here: never the object itself.

The list is that of torch.load(weights_only=True); every other name means that loading the file runs code.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from batchnorm.checks.readers._parsing.elements import SIZES

_STORAGES = (
    {"Double": "float64", "Float": "float32", "Half": "float16", "BFloat16": "bfloat16"}
    | {"Long": "int64", "Int": "int32", "Short": "int16", "Char": "int8", "Byte": "uint8", "Bool": "bool"}
    | {"ComplexDouble": "complex128", "ComplexFloat": "complex64"}
    | {"QInt8": "qint8", "QInt32": "qint32", "QUInt8": "quint8", "QUInt4x2": "quint4x2", "QUInt2x4": "quint2x4"}
)
_TENSORS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_DTYPES = (
    *SIZES,
    *("complex32", "complex64", "complex128", "float4_e2m1fn_x2"),
    *("qint8", "qint32", "quint8", "quint4x2", "quint2x4"),
    *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
    *(f"{kind}{bits}" for kind in ("int", "uint") for bits in range(1, 8)),
)
_UTILS = (
    *("_rebuild_parameter", "_rebuild_parameter_with_state", "_rebuild_tensor", "_rebuild_tensor_v2"),
    *("_rebuild_tensor_v3", "_rebuild_qtensor", "_rebuild_sparse_tensor", "_rebuild_meta_tensor_no_storage"),
    *("_rebuild_nested_tensor", "_rebuild_wrapper_subclass"),
    *("_rebuild_device_tensor_from_numpy", "_rebuild_device_tensor_from_cpu_tensor"),
)
_QSCHEMES = (
    *("per_tensor_affine", "per_tensor_symmetric", "per_channel_affine", "per_channel_symmetric"),
    "per_channel_affine_float_qparams",
)


@dataclass(frozen=True, slots=True)
class Name:
    """What a name stands for: its kind, and of a storage or a dtype the type of its elements."""

    kind: str
    dtype: str = ""


def _table() -> dict[str, Name]:
    table = {
        "collections.OrderedDict": Name("mapping"),
        "collections.Counter": Name("mapping"),
        "builtins.set": Name("other"),
        "builtins.complex": Name("other"),
        "builtins.bytearray": Name("other"),
        "_codecs.encode": Name("encode"),
        "torch.Size": Name("size"),
        "torch.device": Name("other"),
        "torch.serialization._get_layout": Name("other"),
        "torch.nn.parameter.Parameter": Name("parameter"),
        "torch.Tensor": Name("tensor"),
        "torch._tensor._rebuild_from_type_v2": Name("_rebuild_from_type_v2"),
        "torch.storage.UntypedStorage": Name("storage", "uint8"),
        "torch.storage.TypedStorage": Name("other"),
    }
    for name, dtype in _STORAGES.items():
        table[f"torch.{name}Storage"] = Name("storage", dtype)
        if not name.startswith("Q"):
            table[f"torch.cuda.{name}Storage"] = Name("storage", dtype)
    for name in _TENSORS:
        kinds = ("torch", "torch.cuda", *(("torch.sparse", "torch.cuda.sparse") if name != "Bool" else ()))
        table |= {f"{kind}.{name}Tensor": Name("tensor") for kind in kinds}
    table |= {f"torch.{name}": Name("dtype", name) for name in _DTYPES}
    table |= {f"torch.{name}": Name("other") for name in _QSCHEMES}
    table |= {f"torch._utils.{name}": Name(name) for name in _UTILS}
    return table


ALLOWED: Mapping[str, Name] = _table()
PYTHON_2 = {"__builtin__": "builtins", "copy_reg": "copyreg"}
"""Modules as Python 2 called them, which pickles of protocol 2 still do."""
