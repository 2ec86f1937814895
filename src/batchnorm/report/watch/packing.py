"""Numbers for the page, compactly: float32 without its last eight bits of mantissa, three bytes, four characters.

Sign, exponent and 15 bits of mantissa: 4.8 significant digits over the whole range, NaN included. watch.js unpacks
them. A ResNet-50's page holds about a million numbers.
"""

from __future__ import annotations

import base64

import numpy as np
from numpy.typing import NDArray

KEPT = np.uint32(0xFFFFFF00)
HALF = np.uint32(0x80)


def pack(values: NDArray[np.float64]) -> str:
    """Row by row. What is not finite becomes NaN."""
    finite = np.where(np.abs(values) < 3e38, values, np.nan).astype("<f4")
    bits = np.ascontiguousarray(finite).view("<u4").ravel()
    rounded = np.where(np.isnan(finite).ravel(), np.uint32(0x7FC00000), (bits + HALF) & KEPT).astype("<u4")
    return base64.b64encode(rounded.view(np.uint8).reshape(-1, 4)[:, 1:].tobytes()).decode("ascii")


def unpack(text: str) -> NDArray[np.float64]:
    """What `pack` wrote, in one row."""
    parts = np.frombuffer(base64.b64decode(text), np.uint8).reshape(-1, 3)
    whole = np.zeros((len(parts), 4), np.uint8)
    whole[:, 1:] = parts
    return whole.view("<f4").ravel().astype(np.float64)
