"""Types of elements, whatever a format calls them, and their numbers as float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Raw = npt.NDArray[np.generic]

NATIVE = (
    {"float64": "f8", "float32": "f4", "float16": "f2"}
    | {"int64": "i8", "int32": "i4", "int16": "i2", "int8": "i1"}
    | {"uint64": "u8", "uint32": "u4", "uint16": "u2", "uint8": "u1", "bool": "u1"}
)


def _bfloat16(raw: Raw) -> npt.NDArray[np.float64]:
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)


def _small(exponent: int, mantissa: int, bias: int, special: str) -> Callable[[Raw], npt.NDArray[np.float64]]:
    """Eight bits: by a table of all 256.

    `special`: "ieee": the largest exponent holds infinities and NaN; "fn": only its last code is NaN; "fnuz": only
    minus zero is NaN, and there is none.
    """
    code = np.arange(256)
    sign = np.where(code >> 7, -1.0, 1.0)
    power = (code >> mantissa) & (2**exponent - 1)
    part = (code & (2**mantissa - 1)) / 2**mantissa
    table = sign * np.where(power == 0, np.ldexp(part, 1 - bias), np.ldexp(1 + part, power - bias))
    if special == "ieee":
        largest = power == 2**exponent - 1
        table = np.where(largest, np.where(part == 0, sign * np.inf, np.nan), table)
    elif special == "fn":
        table = np.where(code & 0x7F == 0x7F, np.nan, table)
    else:
        table = np.where(code == 0x80, np.nan, table)
    return lambda raw: np.asarray(table[raw], dtype=np.float64)


def _exponents(raw: Raw) -> npt.NDArray[np.float64]:
    """float8_e8m0fnu: powers of two alone, and 255 is NaN."""
    code = raw.astype(np.int64)
    return np.where(code == 255, np.nan, np.ldexp(1.0, code - 127))


CODED: dict[str, tuple[str, Callable[[Raw], npt.NDArray[np.float64]]]] = {
    "bfloat16": ("u2", _bfloat16),
    "float8_e4m3fn": ("u1", _small(4, 3, 7, "fn")),
    "float8_e4m3fnuz": ("u1", _small(4, 3, 8, "fnuz")),
    "float8_e5m2": ("u1", _small(5, 2, 15, "ieee")),
    "float8_e5m2fnuz": ("u1", _small(5, 2, 16, "fnuz")),
    "float8_e8m0fnu": ("u1", _exponents),
}
SIZES = {name: int(code[1]) for name, code in NATIVE.items()} | {
    name: int(code[1]) for name, (code, _) in CODED.items()
}
"""Bytes an element, of every type whose numbers are read."""
WIDTHS = (
    SIZES
    | {"complex32": 4, "complex64": 8, "complex128": 16}
    | {"qint8": 1, "quint8": 1, "qint32": 4, "quint4x2": 1, "quint2x4": 1}
)
"""Bytes an element, of every type that has storages of its own."""


def float64(raw: Raw, dtype: str) -> npt.NDArray[np.float64]:
    """Numbers of elements as they lie in a file (an array of `raw_type(dtype)`)."""
    with np.errstate(all="ignore"):  # signalling NaN
        return raw.astype(np.float64) if dtype in NATIVE else CODED[dtype][1](raw)


def raw_type(dtype: str, order: str = "<") -> np.dtype[np.generic]:
    """What NumPy reads them as; `order` is "<" or ">"."""
    return np.dtype(order + (NATIVE[dtype] if dtype in NATIVE else CODED[dtype][0]))
