"""The core alone: torch, numpy and llvmlite. Layers, kernels and surgery run; what is missing is named with its extra.

In the suite the libraries of the extras are blocked; .ci/run runs this file where they are not installed.
"""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from batchnorm.importing import EXTRAS

BLOCKED = "import sys; sys.modules.update(dict.fromkeys({names}));"
USE = """
import torch
from torch import nn
import batchnorm as bn

def network(act=None):
    first = nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4, act=act)
    return nn.Sequential(*first, nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

x, model = torch.randn(8, 3, 8, 8), network("relu")
optimizer = torch.optim.SGD(model.parameters(), 0.1)
model(x).square().mean().backward()
optimizer.step()
print(bn.convert(network()), bn.recalibrate(model, [x]), bn.fold(network().eval(), example=x), bn.freeze(model))
print(bn.undo(network(), [x]), bn.to_group_norm(network(), 2), bn.sync(network()), bn.compare(network(), x))
print(bn.check(model), bn.kernels.choose(x).why)
"""
OTHERS = {
    "import batchnorm as bn; bn.watch": "pyarrow",
    "import batchnorm as bn; bn.Run": "pyarrow",
    "import batchnorm as bn; bn.report.render('a')": "pyarrow",
    "import batchnorm.__main__ as m; m.main()": "typer",
}


def run(program: str) -> subprocess.CompletedProcess[str]:
    blocked = BLOCKED.format(names=sorted(set(EXTRAS) - {"google"}))
    command = [sys.executable, "-W", "error", "-c", blocked + "\n" + program]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_layers_kernels_and_surgery() -> None:
    done = run(USE)
    assert done.returncode == 0, done.stderr
    assert "1 of 1 batch norm layer folded" in done.stdout or "folded" in done.stdout


@pytest.mark.parametrize("program", OTHERS)
def test_the_extra_is_named(program: str) -> None:
    done = run(program)
    assert done.returncode
    assert f"this needs {OTHERS[program]}: pip install 'batchnorm[tools]'" in done.stderr.splitlines()[-1]
    if "main" in program:
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_a_file_that_needs_no_extra(tmp_path: Path) -> None:
    save = f"import torch; torch.save(torch.nn.BatchNorm1d(3).state_dict(), {str(tmp_path / 'a.pt')!r}); "
    done = run(save + f"import batchnorm as bn; print(bn.check({str(tmp_path / 'a.pt')!r}))")
    assert done.returncode == 0, done.stderr
    assert "1 batch norm layer" in done.stdout


def test_the_core_has_three_dependencies() -> None:
    core = [Requirement(line) for line in requires("batchnorm") or [] if "extra ==" not in line]
    assert sorted(one.name for one in core) == ["llvmlite", "numpy", "torch"]
    (llvmlite,) = (one for one in core if one.name == "llvmlite")
    assert any(bound.operator == "<" for bound in llvmlite.specifier)
