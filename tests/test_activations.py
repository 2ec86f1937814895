"""Every consumer of the table of activations covers it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm import functional, kernels, spec
from batchnorm.activations import ACTIVATIONS, BY_Y, Act, check_act
from batchnorm.kernels import aten
from batchnorm.recording._recorder import probe
from batchnorm.surgery._shared import activations as fusable

SOURCE = Path(bn.__file__).parent


def test_the_literal_type_is_the_table() -> None:
    assert get_args(Act) == tuple(ACTIVATIONS)
    assert functional.Act is Act


def test_spec_defines_each() -> None:
    assert spec.ACTIVATIONS is ACTIVATIONS


def test_each_has_formulas_for_the_cpu_kernels() -> None:
    pytest.importorskip("llvmlite")
    from batchnorm.kernels.cpu._codegen import activations as codegen

    assert set(codegen.VALUES) == set(codegen.GRADIENTS) == {None, *ACTIVATIONS} == kernels._CPU.activations
    assert set(codegen.GRADIENTS_BY_Y) == BY_Y


def test_each_has_formulas_for_the_gpu_kernels() -> None:
    """Read from the source, since Triton may not be there."""
    code = (SOURCE / "kernels/gpu/_triton/activations.py").read_text(encoding="utf-8")
    functions = {part.partition("(")[0]: set(re.findall(r'ACT == "(\w*)"', part)) for part in code.split("\ndef ")}
    assert functions["value"] == functions["gradient"] == {"", *ACTIVATIONS}
    assert functions["gradient_by_y"] == BY_Y
    assert kernels._GPU.activations == {None, *ACTIVATIONS}


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_pytorchs_names_are_those_of_the_activation(act: str) -> None:
    row = ACTIVATIONS[act]
    z = torch.linspace(-4, 7, 45, dtype=torch.float64)
    expected = torch.from_numpy(spec.activation(z.numpy(), act, 0.01))
    torch.testing.assert_close(getattr(nn, row.module)()(z), expected)
    torch.testing.assert_close(aten.activate(z, act, 0.01), expected)
    for path in row.functions:
        torch.testing.assert_close(aten._in_torch(path)(z.clone()), expected)
    g = torch.randn_like(z)
    derivative = torch.from_numpy(spec.derivative(z.numpy(), act, 0.01))
    torch.testing.assert_close(aten.gradient(g, z, act, 0.01), g * derivative)
    if act in BY_Y:
        torch.testing.assert_close(aten.gradient_by_y(g, expected, act), g * derivative)


def test_surgery_and_the_recorder_know_each() -> None:
    assert set(fusable._CLASSES) == {None, *ACTIVATIONS}
    assert {act for act, _ in fusable._FUNCTIONS.values()} == set(ACTIVATIONS) == set(probe._ACTIVATIONS.values())


@pytest.mark.parametrize("documented", [bn.BatchNorm1d, bn.BatchNorm3d, functional.batch_norm])
def test_the_documentation_lists_each(documented: object) -> None:
    (text,) = re.findall(r" act: [^.]*None, ([^.]*)\.\n", str(documented.__doc__))
    assert re.findall(r'"(\w+)"', text) == list(ACTIVATIONS)


def test_what_is_no_activation_is_refused() -> None:
    for act in (None, *ACTIVATIONS):
        check_act(act)
    with pytest.raises(ValueError, match="unknown act 'swish': use None or one of 'elu'"):
        check_act("swish")
    with pytest.raises(TypeError, match="got ReLU: pass the activation by its name"):
        check_act(nn.ReLU())
