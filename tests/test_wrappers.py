"""A model inside of torch.compile's and the parallel wrappers, also while the compiler is being imported."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.restoring import compiled_class, unwrapped


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PyTorch's own
def test_unwraps_what_is_wrapped_twice() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    assert unwrapped(model) is model
    assert unwrapped(nn.DataParallel(torch.compile(model))) is model
    assert compiled_class() is torch._dynamo.eval_frame.OptimizedModule


def test_a_compiler_that_another_thread_imports_is_none_yet(monkeypatch: pytest.MonkeyPatch) -> None:
    """sys.modules has the module before it has the class: every tool raised AttributeError then."""
    monkeypatch.setitem(sys.modules, "torch._dynamo.eval_frame", ModuleType("torch._dynamo.eval_frame"))
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    assert unwrapped(model) is model
    assert len(bn.recalibrate(model, [torch.randn(8, 3)]).layers) == 1
    with bn.adapt(model.eval()):
        model(torch.randn(8, 3))
