"""The import rule of the house: data flows one way, and what reports need never needs torch.

    activations, spec, moments ← kernels ← autograd ← functional ← layers ← variants ← {surgery, recording, study}
    surgery ← merging
    runs.run, quantities ← {checks, report}
    study.runner, which trains and then reports, above both, and bench, which only measures; cli on top

Read from the syntax tree of every file, imports inside functions and under TYPE_CHECKING included.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "batchnorm"

# A string such as "batchnorm.report:card" is an import that comes later.
NAMES_A_MODULE = re.compile(r"batchnorm(\.\w+)+(:\w+)?")

# What each part may import of the package itself, besides itself; "" is the package's __init__.
MAY_IMPORT: dict[str, set[str]] = {
    "activations": set(),
    "frameworks": set(),
    "spec": {"activations"},
    "moments": set(),
    "errors": set(),
    "runs.interrupts": set(),
    "kernels": {"activations", "moments", "running_stats", "spec"},
    "autograd": {"activations", "kernels", "moments", "running_stats"},
    "compiled": {"autograd", "kernels", "moments", "running_stats"},
    "functional": {"activations", "autograd", "compiled", "kernels", "moments", "running_stats", "errors"},
    "masks": set(),
    "importing": set(),
    "restoring": set(),
    "wrappers": set(),
    "records": set(),
    "allocator": {"records"},
    "running_stats": {"moments", "restoring"},
    "layers": {"activations", "running_stats", "functional", "kernels", "moments", "errors", "masks"},
    "quantities": {"activations", "spec", "moments"},
    "words": {"quantities"},
    "runs.run": {"importing", "moments", "runs"},
    "runs.history": {"runs", "runs.run", "quantities", "moments", "spec"},
    "runs": set(),
    "report.terminal": set(),
}
MATHEMATICS = {
    "frameworks",
    "activations",
    "spec",
    "masks",
    "restoring",
    "wrappers",
    "records",
    "words",
    "running_stats",
    "moments",
    "kernels",
    "functional",
    "layers",
    "quantities",
    "runs.run",
}
MAY_IMPORT |= {
    "variants": MATHEMATICS,
    "surgery": MATHEMATICS | {"autograd", "variants", "words"},
    "surgery.average": {"merging"},  # the former place of merging.average
    "merging": MATHEMATICS | {"surgery", "variants"},
    "saved_tensors": MATHEMATICS | {"autograd", "surgery"},
    "recording": MATHEMATICS | {"variants", "runs", "runs.history"},
    "study": MATHEMATICS | {"surgery", "variants", "recording", "runs"},
    "study.runner": MATHEMATICS | {"study", "report", "runs", "runs.interrupts"},
    "testing": {"activations", "spec"},
    "checks": {
        "frameworks",
        "importing",
        "runs.run",
        "quantities",
        "runs.history",
        "runs",
        "records",
        "moments",
        "spec",
        "words",
    },
    "report": {
        "report.terminal",
        *("runs", "runs.run", "quantities", "runs.history"),
        *("moments", "spec", "checks", "words"),
    },
    "bench": MATHEMATICS
    | {
        "testing",
        "report.terminal",
        "surgery",
        "saved_tensors",
        "recording",
        "runs",
        "runs.interrupts",
    },
    "integrations": MATHEMATICS | {"importing", "recording", "runs", "runs.history"},
    "": {
        *("functional", "kernels", "layers", "moments", "runs.run", "recording", "saved_tensors", "surgery", "merging"),
        *("checks", "importing", "variants", "runs", "runs.history", "report", "allocator"),
    },
}
CHILD = "batchnorm.checks.readers.pytorch"
"""Runs in the readers' process only, where it is imported by name."""
NO_TORCH = {
    "frameworks",
    "report.terminal",
    "importing",
    "activations",
    "spec",
    "moments",
    "quantities",
    "words",
    "records",
    "runs",
    "runs.run",
    "runs.history",
    "report",
    "checks",
}
TOP = {"cli", "__main__"}


def imported(code: str, module: str) -> list[str]:
    """Full names of everything a module's code imports: the module, and for `from a import b` also a.b."""
    names: list[str] = []
    package = module.split(".")
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: -node.level]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            names += [base, *[f"{base}.{alias.name}" for alias in node.names]]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module":
            names += [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and NAMES_A_MODULE.fullmatch(node.value):
            names.append(node.value.partition(":")[0])
    return names


def part_of(name: str) -> str:
    """The part of the house that a name under batchnorm belongs to; some files are parts of their own."""
    parts = name.split(".")[1:]
    own = (".".join(parts[:depth]) for depth in (3, 2))
    return next((name for name in own if name in MAY_IMPORT), "".join(parts[:1]))


def violations(code: str, module: str) -> list[str]:
    """What a module imports against the rule, in words."""
    part = part_of(module)
    if part in TOP:
        return []
    if part not in MAY_IMPORT:
        return [f"{module} is in no part of the house: give {part!r} its place in MAY_IMPORT"]
    wrong = []
    for name in imported(code, module):
        root = name.split(".")[0]
        if root == "torch" and part in NO_TORCH and module != CHILD:
            wrong.append(f"{module} imports {name}, but must work without torch")
        if root != "batchnorm" or name == "batchnorm":
            continue
        target = part_of(name)
        known = target in MAY_IMPORT or target in TOP
        if known and target not in {part, ""} | MAY_IMPORT[part]:
            wrong.append(f"{module} imports {name}, which is not below it")
    return wrong


def module_name(path: Path) -> str:
    parts = ["batchnorm", *path.relative_to(SOURCE).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = sorted(SOURCE.rglob("*.py"))


def test_there_are_files_to_look_at() -> None:
    assert {"batchnorm", "batchnorm.spec", "batchnorm.kernels.aten", "batchnorm.runs.run"} <= set(
        map(module_name, FILES)
    )


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_follow_the_data(path: Path) -> None:
    assert violations(path.read_text(encoding="utf-8"), module_name(path)) == []


def reaches(start: set[str], graph: dict[str, set[str]]) -> set[str]:
    """Everything that the modules in `start` import, directly or through others."""
    seen, todo = set(), list(start)
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += graph.get(name, set())
    return seen


def import_graph(sources: dict[str, str]) -> dict[str, set[str]]:
    """Which module of the package imports which, and torch."""
    return {
        module: {name for name in imported(code, module) if name in sources or name.split(".")[0] == "torch"}
        - {"batchnorm", module}
        for module, code in sources.items()
    }


def torch_reachers(sources: dict[str, str]) -> list[str]:
    """The modules that must work without torch, yet import it through another."""
    graph = import_graph(sources)
    free = [module for module in sources if part_of(module) in NO_TORCH]
    return [module for module in free if any(name.split(".")[0] == "torch" for name in reaches({module}, graph))]


def test_what_reports_need_never_reaches_torch() -> None:
    sources = {module_name(path): path.read_text(encoding="utf-8") for path in FILES}
    assert len(sources) > 10
    assert torch_reachers(sources) == [CHILD]


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("batchnorm.spec", "import torch"),
        ("batchnorm.spec", "from batchnorm.moments import Moments"),
        ("batchnorm.moments", "def f():\n    from torch import Tensor"),
        ("batchnorm.kernels.aten", "from batchnorm.functional import batch_norm"),
        ("batchnorm.kernels.aten", "from batchnorm import functional"),
        ("batchnorm.kernels.aten", "from ..layers import BatchNorm2d"),
        ("batchnorm.functional", "import batchnorm.layers"),
        ("batchnorm.layers", "from batchnorm.study import experiment"),
        ("batchnorm.runs.run", "if TYPE_CHECKING:\n    import torch.nn"),
        ("batchnorm.runs.run", "from batchnorm.layers import BatchNorm2d"),
        ("batchnorm.quantities", "from batchnorm.kernels.aten import activate"),
        ("batchnorm.report.study.page", "from batchnorm.study import experiment"),
        ("batchnorm.report.study.page", "import torch"),
        ("batchnorm.report.study.page", "from importlib import import_module\nimport_module('torch')"),
        ("batchnorm.study.arms", "from batchnorm.cli import main"),
        ("batchnorm.study.arms", "from batchnorm.report.page import write"),
        ("batchnorm.study.arms", "from batchnorm.study.runner import run"),
        ("batchnorm.runs.run", "CARD = 'batchnorm.report:card'"),
        ("batchnorm.kernels.aten", "LATER = 'batchnorm.functional'"),
        ("batchnorm.newcomer", "import json"),
    ],
)
def test_the_rule_sees_a_violation(module: str, code: str) -> None:
    assert violations(code, module)


@pytest.mark.parametrize(
    ("module", "code"),
    [
        ("batchnorm.layers", "from batchnorm.kernels.contract import Tap\nfrom batchnorm import errors"),
        ("batchnorm.study.arms", "from batchnorm import quantities\nfrom batchnorm.layers import BatchNorm1d"),
        ("batchnorm.report.study.page", "from batchnorm.runs.run import Run\nfrom . import charts"),
        ("batchnorm.study.runner", "from batchnorm.report.page import write"),
        ("batchnorm.cli", "import torch\nfrom batchnorm.study import experiment"),
    ],
)
def test_the_rule_lets_the_rest_pass(module: str, code: str) -> None:
    assert violations(code, module) == []


def test_the_rule_sees_torch_behind_another_module() -> None:
    sources = {
        "batchnorm.report.study.page": "from batchnorm.runs import run",
        "batchnorm.runs.run": "from batchnorm import helper",
        "batchnorm.helper": "import torch",
    }
    assert torch_reachers(sources) == ["batchnorm.report.study.page", "batchnorm.runs.run"]


def circles(graph: dict[str, set[str]]) -> list[str]:
    """Every module that reaches itself through others."""
    return [module for module in graph if module in reaches(graph[module], graph)]


def test_no_module_imports_itself_through_others() -> None:
    assert circles(import_graph({module_name(path): path.read_text(encoding="utf-8") for path in FILES})) == []


def test_a_circle_is_seen() -> None:
    sources = {
        "batchnorm.a": "from batchnorm import b",
        "batchnorm.b": "def f():\n    from batchnorm.c import g",
        "batchnorm.c": "LATER = 'batchnorm.a:h'",
        "batchnorm.d": "import batchnorm.a",
    }
    assert circles(import_graph(sources)) == ["batchnorm.a", "batchnorm.b", "batchnorm.c"]


def test_the_tree_stays_one_that_a_stranger_can_read() -> None:
    """At most 195 modules (175 before `lean` and `memory`), and at most 20 files in a folder, `__init__` included."""
    assert len(FILES) <= 195
    for folder in {path.parent for path in FILES}:
        assert len(list(folder.glob("*.py"))) <= 20, folder
