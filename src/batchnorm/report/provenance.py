"""The provenance on a page: what run.json says, in groups."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Facts:
    """A group of the provenance: names and values as they stand in run.json."""

    title: str
    entries: tuple[tuple[str, str], ...]


def ran(info: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """What a run did, by these keys, and how long it took."""
    seconds = info.get("seconds")
    took = f"{seconds:,.1f} s" if isinstance(seconds, int | float) else None
    return {**{key: info.get(key) for key in keys}, "took": took}


def grouped(groups: Mapping[str, Any]) -> list[Facts]:
    """The groups that are known, without what is not known in them."""
    return [
        Facts(title, tuple((str(key), _plain(value)) for key, value in facts.items() if value is not None))
        for title, facts in groups.items()
        if isinstance(facts, dict) and facts
    ]


def _plain(value: Any) -> str:
    return ", ".join(str(entry) for entry in value) if isinstance(value, list) else str(value)
