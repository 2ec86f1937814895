"""The public names with their signatures are those of gold/api.txt, so that each change of them is on purpose.

`BATCHNORM_UPDATE_GOLD=1 python -m pytest tests/test_api.py` writes the file again.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

from gold import assert_gold
from test_public import SURFACE


def signature(value: Any) -> str:
    try:
        return str(inspect.signature(value)).replace(" -> 'None'", "")
    except (TypeError, ValueError):
        return ""


def lines_of(name: str, value: Any) -> Iterator[str]:
    """A name, and of a class of this package its public methods, properties and fields."""
    if inspect.ismodule(value):
        yield f"{name}: module"
    elif not inspect.isclass(value):
        yield f"{name}{signature(value)}" if callable(value) else f"{name}: {type(value).__name__}"
    else:
        yield f"class {name}{signature(value)}"
        for base in value.__mro__:
            if base.__module__.startswith("batchnorm."):
                for key, member in sorted(vars(base).items()):
                    function = getattr(member, "__func__", member)
                    if not key.startswith("_") and isinstance(member, property):
                        yield f"    {key}: property"
                    elif not key.startswith("_") and inspect.isfunction(function):
                        yield f"    {key}{signature(function)}"


def test_the_public_names_and_signatures() -> None:
    found = []
    for module, names in SURFACE.items():
        found += [f"# {module}"]
        for name in names:
            value = getattr(importlib.import_module(module), name)
            at_root = module != "batchnorm" and name in SURFACE["batchnorm"]
            found += [f"{name}: as in batchnorm"] if at_root else lines_of(name, value)
    assert_gold("api.txt", "\n".join(found) + "\n")
