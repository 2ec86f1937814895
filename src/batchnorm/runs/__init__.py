"""A Run on disk: a folder of measurements. Recording and studies write it; reports and checks read it. No torch."""

from __future__ import annotations

VIEWS: dict[str, str] = {}
"""What a Run shows of itself, as "module:function" by name: `card` for notebooks, `frame` for dataframes.

Filled by the package's `__init__`, so that a Run names nothing that is above it; imported at first use.
"""
