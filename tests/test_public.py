"""The public surface: exactly these names, each documented, and nothing heavy loaded before it is used."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm as bn

PUBLIC_MODULES = (
    "batchnorm",
    "batchnorm.checks.check",
    "batchnorm.report",
    "batchnorm.functional",
    "batchnorm.kernels",
    "batchnorm.saved_tensors.memory",
    "batchnorm.surgery.fold",
    "batchnorm.surgery.recalibrate",
    "batchnorm.surgery.undo",
    "batchnorm.surgery.compare",
    "batchnorm.variants.domains",
    "batchnorm.variants.ghost",
    "batchnorm.variants.renorm",
    "batchnorm.variants.sync",
    "batchnorm.surgery.keep_domain",
    "batchnorm.surgery.adapt",
    "batchnorm.surgery.average",
    "batchnorm.merging.average",
    "batchnorm.merging.pool_states",
    "batchnorm.merging.repair",
    "batchnorm.surgery.pool_statistics",
    "batchnorm.surgery.sync",
    "batchnorm.surgery.conventions",
    "batchnorm.surgery.convert",
    "batchnorm.surgery.freeze",
    "batchnorm.surgery.param_groups",
    "batchnorm.surgery.to_group_norm",
    "batchnorm.surgery.to_onednn",
    "batchnorm.surgery.to_torch",
    "batchnorm.layers",
)
SURFACE = {module: sorted(importlib.import_module(module).__all__) for module in PUBLIC_MODULES}
"""tests/gold/api.txt pins these names, and their signatures."""
DOCUMENTED = [
    *SURFACE,
    "batchnorm.spec",
    "batchnorm.masks",
    "batchnorm.variants.sync",
    "batchnorm.moments",
    "batchnorm.errors",
    "batchnorm.kernels.aten",
    "batchnorm.kernels.contract",
    "batchnorm.kernels.gpu.plan",
    "batchnorm.kernels.layout",
    "batchnorm.compiled",
    "batchnorm.checks.rules.at_rest",
    "batchnorm.checks.layers",
    "batchnorm.checks.sources",
    "batchnorm.checks.findings",
    "batchnorm.checks.rules.training",
    "batchnorm.quantities",
    "batchnorm.runs.history",
    "batchnorm.runs.run",
    "batchnorm.recording._recorder.attach",
    "batchnorm.recording._recorder.writer",
    "batchnorm.recording._recorder.attach",
    "batchnorm.recording._recorder.probe",
    "batchnorm.recording._recorder.attach",
    "batchnorm.recording.watch",
    "batchnorm.recording._recorder.probe",
    "batchnorm.recording._recorder.observed",
    "batchnorm.recording.steps",
    "batchnorm.recording._recorder.writer",
    "batchnorm.surgery._shared.activations",
    "batchnorm.surgery.conventions",
    "batchnorm.surgery._fusing.rewriting",
    "batchnorm.surgery._fusing.classes",
    "batchnorm.surgery.convert",
    "batchnorm.surgery._fusing.runtime",
    "batchnorm.surgery.freeze",
    "batchnorm.surgery._fusing.planner",
    "batchnorm.surgery._shared.layers",
    "batchnorm.surgery.to_group_norm",
    "batchnorm.surgery._fusing.source",
    "batchnorm.checks.readers",
    "batchnorm.checks.readers.hdf5",
    "batchnorm.checks.readers.onnx",
    "batchnorm.checks.readers.guard",
    "batchnorm.checks.readers.child",
    "batchnorm.checks.readers.directory",
    "batchnorm.checks.readers.pytorch",
    "batchnorm.surgery._folding.primitives",
    "batchnorm.surgery._folding.trials",
    "batchnorm.surgery._shared.calling",
    "batchnorm.surgery.compare",
    "batchnorm.surgery._folding.weights",
    "batchnorm.surgery.fold",
    "batchnorm.restoring",
    "batchnorm.surgery._shared.measuring",
    "batchnorm.surgery._folding.pairs",
    "batchnorm.surgery.recalibrate",
]
HEAVY = ["torch", "llvmlite", "triton", "altair", "vl_convert", "sklearn", "jinja2", "pandas", "torch._dynamo"]
LIGHT = ["batchnorm", "batchnorm.runs.run", "batchnorm.quantities", "batchnorm.moments", "batchnorm.spec"]


def test_every_public_name_can_be_had_and_nothing_else() -> None:
    assert all(getattr(bn, name) is not None for name in SURFACE["batchnorm"])
    assert dir(bn) == sorted([*SURFACE["batchnorm"], "__version__"])
    with pytest.raises(AttributeError, match="no attribute 'BatchNorm4d'"):
        _ = bn.BatchNorm4d
    with pytest.raises(ImportError):
        exec("from batchnorm import BatchNorm4d")


def test_the_stub_declares_the_names_of_the_table() -> None:
    """`__init__.pyi` imports each name, as itself, from the module where `__init__.py` finds it."""
    tree = ast.parse(Path(bn.__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    declared = [
        (alias.name, alias.asname, node.module)
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ]
    expected = {
        name: module if names else module.rpartition(".")[0]
        for module, names in bn._PUBLIC.items()
        for name in names.split() or [module.rpartition(".")[2]]
    }
    assert sorted(declared) == sorted((name, name, module) for name, module in expected.items())


def undocumented(module: str) -> list[str]:
    """The module's own public functions, classes and methods without a docstring, and the module itself."""
    found = importlib.import_module(module)
    missing = [] if found.__doc__ else [module]
    for name, value in vars(found).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module:
            continue
        if inspect.isclass(value) or inspect.isfunction(value):
            missing += [] if value.__doc__ else [f"{module}.{name}"]
    return missing


@pytest.mark.parametrize("module", DOCUMENTED)
def test_every_public_name_is_documented(module: str) -> None:
    assert undocumented(module) == []


def test_the_documentation_check_can_fail(tmp_path, monkeypatch) -> None:
    (tmp_path / "undocumented_module.py").write_text("def f():\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert undocumented("undocumented_module") == ["undocumented_module", "undocumented_module.f"]


def loaded_by(statement: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after the statement."""
    code = f"{statement}\nimport sys\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(answer.stdout.split())


@pytest.mark.parametrize("module", LIGHT)
def test_importing_it_loads_nothing_heavy(module: str) -> None:
    assert loaded_by(f"import {module}") == set()


def test_a_run_can_be_had_without_torch() -> None:
    assert loaded_by("import batchnorm as bn; bn.Run; bn.Moments; dir(bn); bn.__all__") == set()


def test_the_layers_load_torch_and_no_other() -> None:
    assert loaded_by("import batchnorm as bn; bn.BatchNorm1d(3)") - {"llvmlite"} == {"torch"}


def test_the_check_for_heavy_packages_can_fail() -> None:
    assert loaded_by("import jinja2, sklearn") >= {"jinja2", "sklearn"}


@pytest.mark.parametrize("name", [n for n in bn.__all__ if n.endswith(("1d", "2d", "3d"))])
def test_the_help_of_every_layer_stands_alone(name: str) -> None:
    text = inspect.getdoc(getattr(bn, name)) or ""
    assert len(text.splitlines()) > 8, "not one line that points to another class"
    assert "Args:" in text
    if "BatchNorm" in name and not name.startswith(("Ghost", "Domain")):
        shapes = {"1": "(N, C) or (N, C, L)", "2": "(N, C, H, W)", "3": "(N, C, D, H, W)"}
        assert shapes[name[-2]] in text
        assert f"torch.nn.BatchNorm{name[-2]}d raises" in text
    assert {"1": "(N, C) or (N, C, L)", "2": "(N, C, H, W)", "3": "(N, C, D, H, W)"}[name[-2]] in text
    assert ("(N, C, L)" in text) is (name[-2] == "1")
    if "BatchNorm" in name and not name.startswith(("Ghost", "Domain")):
        assert ("num_features: C, the number of channels." in text) is not name.startswith("Lazy")
