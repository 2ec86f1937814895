"""The operators that a compiled training step calls are registered as PyTorch wants them, and are the transform."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch import Tensor

import batchnorm as bn
from batchnorm import compiled, kernels
from batchnorm.activations import ACTIVATIONS
from batchnorm.autograd import split
from batchnorm.kernels.aten import ATEN, activate, add_and_activate, composite
from batchnorm.kernels.contract import Call, Epilogue
from batchnorm.kernels.cpu.kernel import CpuKernel

KERNELS = [ATEN, CpuKernel()]


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.name, autouse=True)
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = kernels.Choice(request.param, "a test", differentiable=False)
    monkeypatch.setattr(kernels, "choose", lambda x, *how, **rest: choice)


def inputs(channels_last: bool = False, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """x, gamma, beta and a residual, all to be differentiated."""
    generator = torch.Generator().manual_seed(5)
    x, residual = torch.randn(2, 4, 3, 6, 5, generator=generator).to(dtype)
    if channels_last:
        x, residual = (t.contiguous(memory_format=torch.channels_last) for t in (x, residual))
    gamma, beta = torch.randn(2, 3, generator=generator)
    return [t.requires_grad_() for t in (x, gamma, beta, residual)]


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("act", "with_residual"), [("", False), ("", True), ("relu", True), ("tanh", True)])
def test_forward_is_registered_as_pytorch_wants_it(act: str, with_residual: bool, channels_last: bool) -> None:
    x, gamma, beta, residual = inputs(channels_last)
    given = x, gamma, beta, residual if with_residual else None, 1e-5, act, 0.01
    torch.library.opcheck(torch.ops.batchnorm.forward.default, given)


def test_backward_is_registered_as_pytorch_wants_it() -> None:
    x, gamma, beta, residual = (t.detach() for t in inputs())
    statistics = torch.tensor([[0.0], [1.0], [1.0]], dtype=torch.float64).repeat(1, 3)  # mean, m2 and rstd
    for y, act in ((None, "silu"), (residual, "tanh")):
        given = torch.randn_like(x), x, gamma, beta, y, statistics, act, 0.01
        torch.library.opcheck(torch.ops.batchnorm.backward.default, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
def test_the_operators_are_the_transform(act: str | None, with_residual: bool, dtype: torch.dtype) -> None:
    given = inputs(dtype=dtype)
    wanted = given if with_residual else given[:3]
    x, gamma, beta, residual = given
    epilogue = Epilogue(gamma, beta, residual if with_residual else None, act, 0.2)
    fused, rest = split(epilogue, dtype)
    z, moments = compiled.normalized(x, 1e-5, fused)
    y = add_and_activate(z, rest)
    theirs = composite(Call(x, (None, None), True, 0.0, 1e-5, epilogue))
    grad_y = torch.randn(y.shape).to(dtype)
    close = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 3e-2, "atol": 6e-2}
    torch.testing.assert_close(y, theirs, **close)
    ours, others = torch.autograd.grad(y, wanted, grad_y), torch.autograd.grad(theirs, wanted, grad_y)
    for mine, its in zip(ours, others, strict=True):
        torch.testing.assert_close(mine, its, **close)
    assert moments.count == 120
    torch.testing.assert_close(
        moments.unbiased_var.float(), x.float().transpose(0, 1).flatten(1).var(1), rtol=1e-4, atol=1e-5
    )
    assert not moments.mean.requires_grad


def test_without_gamma_and_beta_they_get_no_gradient() -> None:
    x, *_ = inputs()
    y, _ = compiled.normalized(x, 1e-5, Epilogue())
    (dx,) = torch.autograd.grad(y, x, y.detach())
    assert float(dx.abs().max()) < 1e-4  # dx is orthogonal to xhat


@pytest.mark.slow
@pytest.mark.parametrize("act", ["relu", "silu", "tanh"])
@pytest.mark.parametrize("watched", [False, True])
def test_a_compiled_step_by_the_operators_is_the_eager_one(
    act: str, watched: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "compiled", lambda x: True)
    layer = bn.BatchNorm2d(3, act=act)
    stock = torch.nn.BatchNorm2d(3)
    x, _, _, residual = inputs()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with bn.watch(torch.nn.Sequential(layer), tmp_path / "run") if watched else nullcontext():
        y = compiled(x, residual)
    z = activate(stock(x) + residual, act, 0.01)
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(y.square().sum(), (x, residual, *layer.parameters()))
    theirs = torch.autograd.grad(z.square().sum(), (x, residual, *stock.parameters()))
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(stock.named_buffers()))


def test_only_what_holds_no_python_may_be_in_a_cuda_graph() -> None:
    unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)
    for name in ("forward", "backward"):
        assert unsafe not in getattr(torch.ops.batchnorm, name).default.tags
        assert unsafe is None or unsafe in getattr(torch.ops.batchnorm, f"tapped_{name}").default.tags
