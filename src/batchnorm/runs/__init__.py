"""Runs on disk: folders of measurements that recordings and studies write and reports read. Imports no torch."""

from __future__ import annotations

VIEWS: dict[str, str] = {}
"""Functions that show a Run, as "module:function": `card` for notebooks, `frame` for dataframes.

The package's `__init__` fills it, so that this package does not import reports. They are imported at first use.
"""
