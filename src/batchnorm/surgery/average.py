"""The former place of `batchnorm.merging.average`, for imports of 0.2."""

from __future__ import annotations

from batchnorm.merging.average import Averaging, average

__all__ = ["Averaging", "average"]
