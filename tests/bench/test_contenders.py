"""All contenders do the same call, and what is dropped is dropped."""

import ctypes
from types import SimpleNamespace

import pytest
import torch

from batchnorm.bench import contenders
from batchnorm.bench.cases import Case

needs_jax = pytest.mark.skipif(not contenders.has_jax(), reason="JAX is not installed")
CASES = [
    Case((4, 6, 5, 3), layout, "float32", variant, mode)
    for layout in ("contiguous", "channels_last")
    for variant in ("bn", "bn+relu", "bn+add+relu", "bn+silu")
    for mode in ("train", "eval")
] + [Case((40, 6), "rows"), Case((3, 6, 2, 3, 4), "channels_last_3d", "bfloat16")]


def assert_alike(found, expected, case):
    for name, value in found.items():
        tolerance = 2e-2 if value.dtype == torch.bfloat16 else 1e-5
        torch.testing.assert_close(value, expected[name], rtol=tolerance, atol=tolerance, msg=f"{name} {case.name}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_layers_give_the_same(case):
    call = case.make(0)
    expected = contenders.eager(call).outputs()
    names = {"y", "running_mean", "running_var"} | ({"dx", "dgamma", "dbeta"} if case.train else set())
    assert set(expected) == names | ({"dresidual"} if case.train and case.residual else set())
    assert_alike(contenders.eager(call, inplace=True).outputs(), expected, case)
    assert_alike(contenders.ours(call).outputs(), expected, case)
    assert torch.equal(expected["running_mean"], call.running_mean) is not case.train


@pytest.mark.slow
@needs_jax
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_jax_gives_the_same(case):
    call = case.make(0)
    jax = contenders.Jax(call, case.layout.startswith("channels_last"))
    assert_alike(jax.outputs(), contenders.eager(call).outputs(), case)


def test_the_floor_is_a_copy_with_the_tensors_strides():
    call = Case((4, 6, 5, 3), "channels_last").make(0)
    copy = contenders.floor(call).forward()
    assert torch.equal(copy, call.x)
    assert copy.stride() == call.x.stride()
    assert copy.data_ptr() != call.x.data_ptr()


@pytest.mark.parametrize("cold", [True, False])
def test_the_floor_writes_past_the_caches_if_x_is_cold(cold, monkeypatch):
    passed = []

    def copy(source, target, size, nontemporal):
        passed.append((size, nontemporal))
        ctypes.memmove(target, source, size)

    monkeypatch.setattr(contenders, "copying", SimpleNamespace(copy=copy))
    call = Case((4, 6, 5, 3), "channels_last", "bfloat16").make(0)
    assert torch.equal(contenders.floor(call, cold=cold).forward(), call.x)
    assert passed == [(2 * 4 * 6 * 5 * 3, cold)]


def test_a_call_without_an_activation_is_the_bare_layer():
    call = Case((4, 6, 5, 3), "contiguous", "float32", "bn").make(0)
    eager = contenders.eager(call)
    with torch.enable_grad():
        y = eager.forward()
    assert type(y.grad_fn).__name__ == "NativeBatchNormBackward0"


def test_why_torch_compile_cannot_is_one_line(monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("\nNo working C++ compiler found in CXX\nand a long explanation")

    monkeypatch.setattr(torch, "compile", fail)
    why = contenders.why_not_compile()
    assert "No working C++ compiler found" in why
    assert "\n" not in why
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    assert contenders.why_not_compile() is None
