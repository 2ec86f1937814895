"""functional.batch_norm: PyTorch's signature and results, and the kernel's own backward behind the same doors."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F  # noqa: N812 - PyTorch's name for it

import batchnorm as bn
from batchnorm import functional, kernels
from batchnorm.activations import ACTIVATIONS
from batchnorm.kernels.contract import Call, Epilogue, Tap

# Forward-mode differentiation compiles PyTorch's own decompositions with torch.jit.script, which PyTorch deprecates.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.*is deprecated:DeprecationWarning"),
    pytest.mark.usefixtures("kernel_route"),
]

BOTH = pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])


def transform(x: Tensor, mean: Tensor | None, var: Tensor | None, *rest: Any) -> Tensor:
    """One call as the layers make it: training, momentum, eps, epilogue and tap follow."""
    return functional.transform(Call(x, (mean, var), *rest))


def example(*shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, gamma, beta and running statistics."""
    c = shape[1]
    x, gamma, beta = (torch.randn(s, dtype=dtype) for s in (shape, (c,), (c,)))
    return x, gamma, beta, torch.randn(c, dtype=dtype), torch.rand(c, dtype=dtype) + 0.5


def test_the_signature_is_torchs_and_three_keywords() -> None:
    ours = inspect.signature(bn.functional.batch_norm).parameters
    theirs = inspect.signature(F.batch_norm).parameters
    assert list(ours)[: len(theirs)] == list(theirs)
    assert all(ours[name].default == theirs[name].default and ours[name].kind == theirs[name].kind for name in theirs)
    extra = {name: p for name, p in ours.items() if name not in theirs}
    assert {name: p.default for name, p in extra.items()} == {"residual": None, "act": None, "negative_slope": 0.01}
    assert all(p.kind is p.KEYWORD_ONLY for p in extra.values())


def assert_as_close_as(kernel_route: str, ours: object, theirs: object) -> None:
    """To the bit where PyTorch's operators run; to some last digits of float64 where our own loops do."""
    exact = {"rtol": 0.0, "atol": 0.0} if kernel_route == "kernel by size" else {"rtol": 1e-13, "atol": 1e-14}
    torch.testing.assert_close(ours, theirs, equal_nan=True, **exact)


@BOTH
def test_every_argument_by_position_means_what_it_means_in_torch(training: bool, kernel_route: str) -> None:
    x, gamma, beta, *stats = example(4, 3, 5)
    results = [
        (f(x, mean, var, gamma, beta, training, 0.3, 0.01), mean, var)
        for f, (mean, var) in ((f, [s.clone() for s in stats]) for f in (bn.functional.batch_norm, F.batch_norm))
    ]
    assert_as_close_as(kernel_route, *results)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4), (4, 3, 0, 2), (4, 0), (4, 0, 2)])
@BOTH
def test_empty_batches_and_zero_channels_do_what_torchs_do(shape: tuple[int, ...], training: bool) -> None:
    x, gamma, beta, *stats = example(*shape)
    known = []
    for function in (bn.functional.batch_norm, F.batch_norm):
        mean, var = (s.clone() for s in stats)
        leaf = x.clone().requires_grad_()
        try:
            y = function(leaf, mean, var, gamma, beta, training)
            known.append([y, mean, var, *torch.autograd.grad(y.sum(), leaf)])
        except Exception as error:
            known.append(type(error))
    if isinstance(known[1], type):
        assert known[0] is known[1]
    else:
        assert all(torch.equal(a, b) for a, b in zip(*known, strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@BOTH
def test_nan_and_infinity_propagate_as_torchs(value: float, training: bool, kernel_route: str) -> None:
    x, gamma, beta, *stats = example(4, 3, 5)
    x[1, 2, 3] = value
    known = [f(x, *(s.clone() for s in stats), gamma, beta, training) for f in (bn.functional.batch_norm, F.batch_norm)]
    assert_as_close_as(kernel_route, *known)
    tapped = transform(x, *(s.clone() for s in stats), training, 0.1, 1e-5, Epilogue(gamma, beta), Tap())
    assert torch.equal(tapped.isfinite(), known[1].isfinite())


@pytest.mark.parametrize("act", [None, "relu", "silu", "tanh", "sigmoid"])
@BOTH
def test_the_kernels_backward_can_be_differentiated(training: bool, act: str | None) -> None:
    x, gamma, beta, *stats = example(4, 2, 3)
    residual = torch.randn_like(x)

    def tapped(x: Tensor, gamma: Tensor, beta: Tensor, residual: Tensor) -> Tensor:
        epilogue = Epilogue(gamma, beta, residual, act)
        return transform(x, *(s.clone() for s in stats), training, 0.1, 1e-3, epilogue, Tap())

    inputs = tuple(t.requires_grad_() for t in (x, gamma, beta, residual))
    assert "_Transform" in (type(tapped(*inputs).grad_fn).__name__ if act != "silu" else "_Transform")
    assert gradcheck(tapped, inputs)
    assert gradgradcheck(tapped, inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@BOTH
def test_double_backward_through_the_kernel_is_torchs_in_mixed_types(dtype: torch.dtype, training: bool) -> None:
    x, gamma, beta, *stats = example(8, 3, 4, dtype=torch.float32)
    grads = []
    for tap in (None, Tap()):
        leaf = x.to(dtype).requires_grad_()
        y = transform(leaf, *(s.clone() for s in stats), training, 0.1, 1e-5, Epilogue(gamma, beta, act="silu"), tap)
        (first,) = torch.autograd.grad(y.float().square().sum(), leaf, create_graph=True)
        grads += torch.autograd.grad(first.float().square().sum(), leaf)
    assert grads[0].dtype == grads[1].dtype == dtype
    last_digit = torch.finfo(dtype).eps * grads[0].abs().max()
    assert (grads[0] - grads[1]).abs().max() <= 16 * last_digit


def test_a_tap_is_filled_by_a_backward_that_is_differentiated_again() -> None:
    x, gamma, beta, *_ = example(8, 3, 4)
    taps = []
    for create_graph in (False, True):
        taps.append(Tap())
        y = transform(x.requires_grad_(), None, None, True, 0.1, 1e-5, Epilogue(gamma, beta, act="silu"), taps[-1])
        torch.autograd.grad(y.square().sum(), x, create_graph=create_graph)
    (plain,), (differentiable,) = (tap.passes[0].grads for tap in taps)
    for one, other in zip(plain, differentiable, strict=True):
        torch.testing.assert_close(one, other)
        assert not other.requires_grad


def test_every_forward_adds_a_pass_and_every_backward_finds_it() -> None:
    x, gamma, beta, *_ = example(8, 3, 4)
    tap = Tap()
    epilogue = Epilogue(gamma.requires_grad_(), beta)
    first, second = (transform(k * x, None, None, True, 0.1, 1e-5, epilogue, tap) for k in (1, 3))
    second.square().sum().backward(retain_graph=True)
    assert [len(passed.grads) for passed in tap.passes] == [0, 1]
    second.sum().backward()
    first.sum().backward()
    assert [len(passed.grads) for passed in tap.passes] == [1, 2]
    torch.testing.assert_close(tap.passes[1].mean, 3 * tap.passes[0].mean)
    with torch.no_grad():
        transform(x, None, None, True, 0.1, 1e-5, epilogue, tap)
    assert len(tap.passes) == 3
    transform(x[:0], None, None, True, 0.1, 1e-5, epilogue, tap)
    transform(x, torch.zeros(3, dtype=x.dtype), torch.ones(3, dtype=x.dtype), False, 0.1, 1e-5, epilogue, tap)
    assert len(tap.passes) == 3, "neither an empty batch nor inference has statistics of its own"


def test_an_unread_tap_stays_small() -> None:
    x, *_ = example(8, 3)
    tap = Tap()
    for _ in range(Tap.MOST + 5):
        transform(x, None, None, True, 0.1, 1e-5, Epilogue(), tap)
    assert len(tap.passes) == Tap.MOST


def test_a_tap_keeps_no_activation_alive() -> None:
    x, gamma, beta, *_ = example(8, 3, 4)
    tap = Tap()
    y = transform(x.requires_grad_() * 1, None, None, True, 0.1, 1e-5, Epilogue(gamma, beta), tap)
    y.sum().backward()
    kept = [passed.mean for passed in tap.passes] + [sums.dgamma for passed in tap.passes for sums in passed.grads]
    assert all(vector.untyped_storage().nbytes() <= 5 * 8 * 3 for vector in kept)


def test_only_gradients_that_are_wanted_are_computed() -> None:
    x, gamma, beta, *_ = example(8, 3, 4)
    y = transform(x, None, None, True, 0.1, 1e-5, Epilogue(gamma, beta.requires_grad_()), Tap())
    y.sum().backward()
    assert beta.grad is not None
    assert (x.grad, gamma.grad) == (None, None)
    with torch.no_grad():
        assert not transform(x, None, None, True, 0.1, 1e-5, Epilogue(gamma, beta), Tap()).requires_grad


@pytest.mark.parametrize("tap", [None, Tap()], ids=["", "tapped"])
def test_forward_mode_vmap_and_grad_work_with_and_without_a_tap(tap: Tap | None) -> None:
    x, gamma, beta, mean, var = example(8, 3, 4)
    tangent = torch.randn_like(x)

    def ours(x: Tensor) -> Tensor:
        return transform(x, mean, var, False, 0.1, 1e-5, Epilogue(gamma, beta, act="tanh"), tap)

    def theirs(x: Tensor) -> Tensor:
        return torch.tanh(F.batch_norm(x, mean, var, gamma, beta))

    known = []
    for function in (ours, theirs):
        with forward_ad.dual_level():
            known.append(list(forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent)))))
        known[-1] += torch.func.jvp(function, (x,), (tangent,))
        known[-1].append(torch.func.vmap(function)(torch.stack([x, 2 * x])))
        known[-1].append(torch.func.grad(lambda x, function=function: function(x).sum())(x))
    for a, b in zip(*known, strict=True):
        torch.testing.assert_close(a, b)


def test_momentum_as_a_tensor_moves_the_statistics_as_the_number_does() -> None:
    x, gamma, beta, *stats = example(8, 3, 4)
    moved = []
    for momentum in (0.25, torch.tensor(0.25)):
        mean, var = (s.clone() for s in stats)
        bn.functional.batch_norm(x, mean, var, gamma, beta, True, momentum)
        moved.append((mean, var))
    torch.testing.assert_close(moved[0], moved[1])


def test_tensor_subclasses_override_it() -> None:
    calls = []

    class Asked(Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            calls.append((func, kwargs))
            return "answered"

    x = torch.randn(4, 3).as_subclass(Asked)
    assert bn.functional.batch_norm(x, None, None, training=True, act="relu") == "answered"
    assert calls[0][0] is bn.functional.batch_norm
    assert calls[0][1]["act"] == "relu"
    assert bn.functional.batch_norm(torch.randn(4, 3), None, None, training=True, residual=x) == "answered"


def test_residual_and_activation_are_what_follows_in_torch(kernel_route: str) -> None:
    x, gamma, beta, *_ = example(6, 3, 2)
    residual = torch.randn_like(x)
    ours = bn.functional.batch_norm(
        x, None, None, gamma, beta, True, residual=residual, act="leaky_relu", negative_slope=0.3
    )
    theirs = F.leaky_relu(F.batch_norm(x, None, None, gamma, beta, True) + residual, 0.3)
    assert_as_close_as(kernel_route, ours, theirs)


@pytest.mark.parametrize("residual_type", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("act", [None, *ACTIVATIONS])
def test_without_gradients_nothing_but_the_output_changes(act: str | None, residual_type: torch.dtype | None) -> None:
    x, gamma, beta, mean, var = example(4, 3, 5, 5, dtype=torch.float32)
    residual = None if residual_type is None else torch.randn(x.shape, dtype=residual_type)
    given = [one.clone() for one in (x, gamma, beta, mean, var, *([] if residual is None else [residual]))]
    settings = {"residual": residual, "act": act, "negative_slope": 0.2}
    with torch.no_grad():
        y = bn.functional.batch_norm(x, mean, var, gamma, beta, **settings)
    expected = bn.functional.batch_norm(x, mean, var, gamma.requires_grad_(), beta, **settings).detach()
    assert torch.equal(y, expected)
    for one, before in zip((x, gamma, beta, mean, var, residual), given, strict=False):
        assert torch.equal(one, before)


def test_a_wider_residual_promotes_the_output() -> None:
    x = torch.randn(6, 3, dtype=torch.bfloat16)
    residual = torch.randn(6, 3, requires_grad=True)
    for tap in (None, Tap()):
        y = transform(x, None, None, True, 0.1, 1e-5, Epilogue(residual=residual, act="relu"), tap)
        assert y.dtype == torch.float32
        (gradient,) = torch.autograd.grad(y.sum(), residual)
        assert gradient.dtype == torch.float32


@pytest.mark.parametrize("tap", [None, Tap()], ids=["", "tapped"])
def test_the_same_call_gives_the_same_bits(tap: Tap | None) -> None:
    x, gamma, beta, *_ = example(64, 8, 7, 7, dtype=torch.float32)
    runs = []
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        y = transform(leaf, None, None, True, 0.1, 1e-5, Epilogue(gamma, beta, act="relu"), tap)
        runs.append((y, *torch.autograd.grad(y.square().sum(), leaf)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_no_warning_is_given() -> None:
    x, gamma, beta, *stats = example(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        bn.functional.batch_norm(x, *stats, gamma, beta, training=True, act="gelu", residual=x)


ACTS = (None, "relu", "relu6", "leaky_relu", "elu", "gelu", "silu", "hardswish", "sigmoid", "tanh")
FUNCTIONS = {None: lambda z: z * 1, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
FUNCTIONS |= {act: getattr(F, act) for act in ACTS if act not in FUNCTIONS}


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tap", [None, Tap()], ids=["", "tapped"])
@pytest.mark.parametrize("act", ACTS)
def test_what_may_change_after_torchs_forward_may_change_after_ours(
    act: str | None, tap: Tap | None, dtype: torch.dtype, training: bool
) -> None:
    x, gamma, beta, *stats = example(6, 4, 40, dtype=torch.float32)
    added, grad_y = torch.randn(2, 6, 4, 40).to(dtype)

    def changed(forward: Callable[[Tensor, Tensor, list[Tensor]], Tensor], what: str) -> Tensor | None:
        leaf, residual = x.to(dtype).requires_grad_(), added.clone()
        y = forward(leaf, residual, [s.clone() for s in stats])
        if what:
            (residual if what == "residual" else y).detach().add_(1)
        try:
            return torch.autograd.grad(y, leaf, grad_y)[0]
        except RuntimeError as error:
            assert "modified by an inplace operation" in str(error)  # noqa: PT017 - PyTorch may raise it, too
            return None

    def theirs(x: Tensor, residual: Tensor, stats: list[Tensor]) -> Tensor:
        return FUNCTIONS[act](F.batch_norm(x, *stats, gamma, beta, training) + residual)

    def ours(x: Tensor, residual: Tensor, stats: list[Tensor]) -> Tensor:
        return transform(x, *stats, training, 0.1, 1e-5, Epilogue(gamma, beta, residual, act), tap)

    unchanged = changed(ours, "")
    for what in ("residual", "y"):
        found = changed(ours, what)
        assert (found is None) == (changed(theirs, what) is None), what
        assert found is None or torch.equal(found, unchanged), what


@pytest.mark.parametrize("act", ["relu", "sigmoid", "tanh", "elu", "silu"])
def test_bfloat16_behind_an_addition_is_no_worse_than_torchs(act: str, kernel_route: str) -> None:
    """Pooled over channels, the error of each output is at most twice PyTorch's: y alone is rounded in both."""
    x, gamma, beta, *_ = example(16, 32, 8, 8)
    residual, grad_y = torch.randn(2, 16, 32, 8, 8, dtype=torch.float64)
    rounded = [t.bfloat16() for t in (x, residual, grad_y)]

    def outputs(forward: Callable[..., Tensor], x: Tensor, residual: Tensor, grad_y: Tensor) -> list[Tensor]:
        inputs = [t.clone().requires_grad_() for t in (x, residual, gamma.to(x.dtype), beta.to(x.dtype))]
        if x.dtype == torch.bfloat16:
            inputs[2:] = [t.float().requires_grad_() for t in (gamma, beta)]
        y = forward(*inputs)
        return [t.double() for t in (y.detach(), *torch.autograd.grad(y, inputs, grad_y))]

    def theirs(x: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return FUNCTIONS[act](F.batch_norm(x, None, None, gamma, beta, True) + residual)

    def ours(x: Tensor, residual: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return bn.functional.batch_norm(x, None, None, gamma, beta, True, residual=residual, act=act)

    true = outputs(theirs, *(t.double() for t in rounded))
    errors = [
        [(a - b).square().mean().sqrt() for a, b in zip(outputs(f, *rounded), true, strict=True)]
        for f in (ours, theirs)
    ]
    for name, mine, its in zip(("y", "dx", "dresidual", "dgamma", "dbeta"), *errors, strict=True):
        assert mine <= 2 * its, (name, mine, its)


def activation_bytes(forward: Callable[[], Tensor]) -> int:
    """Bytes of the distinct storages that forward keeps for backward; vectors of one number per channel left out."""
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dim() > 1:
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = forward()
    del y
    return sum(found.values())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("act", ACTS)
def test_keeps_no_more_for_backward_than_torch(act: str | None, residual: bool, layout: torch.memory_format) -> None:
    x, added = (torch.randn(4, 8, 6, 6).contiguous(memory_format=layout).requires_grad_() for _ in range(2))
    weight, bias = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)

    def theirs() -> Tensor:
        z = F.batch_norm(x, None, None, weight, bias, True)
        return FUNCTIONS[act](z + added if residual else z)

    def ours() -> Tensor:
        return bn.functional.batch_norm(
            x, None, None, weight, bias, True, residual=added if residual else None, act=act
        )

    kept, stock = activation_bytes(ours), activation_bytes(theirs)
    assert kept <= stock
    if act in ("silu", "hardswish") and not residual and kernels.choose(x).name == "cpu":
        assert kept == stock // 2, "the activation's input is computed again, not kept"
