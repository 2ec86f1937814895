"""One suite over every kernel: each verb and the fused pair, against the definition in float64.

The kernels of `offered` are held to all of it. `accuracy` says how close is close enough.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from offered import DEVICE, INTERPRETED, KERNELS, QUIET, some
from torch import Tensor

from accuracy import ACTIVATIONS, Case, assert_accurate, f64, gradients, leaves, pytorchs
from batchnorm import spec
from batchnorm.activations import BY_Y
from batchnorm.autograd import split
from batchnorm.kernels.contract import Epilogue, Kernel
from batchnorm.running_stats import RunningUpdate
from batchnorm.testing import truth, verdicts

LAYOUTS = {
    "NC": lambda make: make(13, 5),
    "NCL": lambda make: make(4, 3, 7),
    "NCHW": lambda make: make(3, 4, 5, 6),
    "NHWC": lambda make: make(3, 4, 5, 6).contiguous(memory_format=torch.channels_last),
    "NCDHW": lambda make: make(2, 3, 2, 4, 3),
    "NDHWC": lambda make: make(2, 3, 2, 4, 3).contiguous(memory_format=torch.channels_last_3d),
    "long slices": lambda make: make(3, 5, 8, 9),
    "one row": lambda make: make(1, 4, 5, 5),
    "one position": lambda make: make(9, 4, 1, 1),
    "one channel": lambda make: make(6, 1, 3, 3),
    "many channels": lambda make: make(4, 67),
    "sliced": lambda make: make(6, 8, 5, 9)[::2, 1:7:2, :, ::3],
    "transposed": lambda make: make(5, 7, 4, 6).transpose(1, 3),
    "rows transposed": lambda make: make(5, 11).t(),
    "expanded": lambda make: make(4, 3, 5, 1).expand(4, 3, 5, 6),
}
pytestmark = QUIET
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# An interpreter is slow: by it, what does not depend on the type is tested with one of them.
MOST_USED = ("NCHW", "NHWC", "sliced") if INTERPRETED else tuple(LAYOUTS)
every_type = pytest.mark.parametrize(
    ("kernel", "dtype"),
    [
        pytest.param(kernel, dtype, id=f"{kernel.name}-{dtype}")
        for kernel in KERNELS
        for dtype in TYPES
        if dtype in kernel.types
    ],
)
LAYOUTS_AND_TYPES = [
    pytest.param(kernel, layout, dtype, id=f"{layout}-{kernel.name}-{dtype}")
    for kernel in KERNELS
    for dtype in TYPES
    for layout in (LAYOUTS if dtype == torch.float32 else MOST_USED)
    if dtype in kernel.types
]


@pytest.fixture(params=KERNELS, ids=lambda kernel: kernel.name)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return request.param


def types_of(kernel: Kernel) -> list[torch.dtype]:
    """The kernel's types, the widest first; by an interpreter that one alone."""
    known = [dtype for dtype in TYPES if dtype in kernel.types]
    return known[:1] if INTERPRETED else known


def make_case(layout: str = "NCHW", dtype: torch.dtype = torch.float32, *, offset: float = 0.0, **how) -> Case:
    """Random tensors of a layout, the channels' means at `offset` deviations."""
    generator = torch.Generator().manual_seed(7)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = LAYOUTS[layout](make)
    c = x.shape[1]
    spread = (torch.rand(c, generator=generator) + 0.5).double().view(1, -1, *[1] * (x.dim() - 2))
    x = _in_the_layout_of(x, (x * spread + offset * spread).to(dtype))
    residual = _in_the_layout_of(x, make(*x.shape).to(dtype)) if how.pop("residual", False) else None
    param = torch.float32 if dtype.itemsize == 2 else dtype
    gamma = make(c).to(DEVICE, param) if how.pop("gamma", True) else None
    beta = make(c).to(DEVICE, param) if how.pop("beta", True) else None
    grad_y = make(*x.shape).to(DEVICE, dtype)
    if not how.get("training", True):
        how |= {
            "running_mean": make(c).to(DEVICE, param) + offset,
            "running_var": make(c).to(DEVICE, param).square() + 0.5,
        }
    return Case(x, grad_y, gamma, beta, residual, **how).away_from_kinks()


def _in_the_layout_of(like: Tensor, values: Tensor) -> Tensor:
    """The values in memory as `like` has its own, gaps included; left alone where rows of `like` share memory."""
    if 0 in like.stride():
        return values.to(DEVICE)
    size = sum((n - 1) * s for n, s in zip(like.shape, like.stride(), strict=True)) + 1
    out = torch.full((size,), float("nan"), dtype=values.dtype, device=DEVICE).as_strided(like.shape, like.stride())
    return out.copy_(values)


def epilogue_of(case: Case) -> Epilogue:
    return Epilogue(case.gamma, case.beta, case.residual, case.act, case.slope)


def statistics_of(kernel: Kernel, case: Case) -> tuple[Tensor, Tensor]:
    """mean and var in the accumulation type, as a kernel's caller holds them."""
    wide = kernel.accumulation_dtype(case.x.dtype)
    return tuple(torch.from_numpy(np.asarray(v)).to(DEVICE, wide) for v in case.statistics())


def backward_epilogue(case: Case, y: Tensor) -> Epilogue:
    """What backward gets for a forward that gave y: no residual where there is an activation, but y."""
    if case.act is None or case.residual is None:
        return epilogue_of(case)
    return epilogue_of(case)._replace(residual=None, y=y)


def by_verbs(kernel: Kernel, case: Case) -> dict[str, Tensor | None]:
    """All outputs through the four verbs, at the batch's statistics in training and the running ones otherwise."""
    known: dict[str, Tensor | None] = {}
    if case.training:
        moments = kernel.statistics(case.x)
        assert moments.count == spec.count(f64(case.x))
        mean, var = moments.mean, moments.var
        known |= {"mean": mean, "var": var}
    else:
        mean, var = statistics_of(kernel, case)
    rstd = torch.rsqrt(var + case.eps)
    m = case.x.numel() // case.x.shape[1]
    known["y"] = kernel.normalize(case.x, mean, rstd, epilogue_of(case))
    epilogue = backward_epilogue(case, known["y"])
    sums = kernel.reduce_grad(case.grad_y, case.x, mean, rstd, epilogue, energy=True)
    passed = sums if case.training else None
    dx, dresidual = kernel.input_grad(case.grad_y, case.x, mean, rstd, epilogue, passed, m)
    return known | {"dx": dx, "dresidual": dresidual, **sums._asdict()}


def fused(kernel: Kernel, case: Case) -> dict[str, Tensor | None]:
    """All outputs of a training step through the fused pair."""
    forward = kernel.forward(case.x, case.eps, epilogue_of(case))
    y, moments, rstd = forward.y, forward.moments, forward.rstd
    m = case.x.numel() // case.x.shape[1]
    epilogue = backward_epilogue(case, y)
    grads, sums = kernel.backward(case.grad_y, case.x, moments.mean, rstd, epilogue, m, energy=True)
    return {"y": y, "mean": moments.mean, "var": moments.var, **grads._asdict(), **sums._asdict()}


def check(kernel: Kernel, case: Case) -> None:
    assert_right(by_verbs(kernel, case), case, note="(verbs)")
    if case.training:
        assert_right(fused(kernel, case), case, note="(fused)")


def assert_right(found: dict[str, Tensor | None], case: Case, note: str) -> None:
    """Every output against the truth, with PyTorch's error beside it.

    Where backward reads a y of 16 bits, its truth is that of the y that it reads: g = grad_y·act'(z) by it. How far
    that y is from y is a property of the type, which PyTorch's backward reads as well, and no error is excused by it.
    """
    if case.residual is None or case.act not in ("sigmoid", "tanh") or case.x.dtype.itemsize > 2:
        assert_accurate(found, case, note=note)
        return
    forward = {name: found.pop(name) for name in ("y", "mean", "var") if name in found}
    assert_accurate(forward, case, note=note)
    y = forward["y"].double()
    g = case.grad_y.double() * (y * (1 - y) if case.act == "sigmoid" else 1 - y * y)
    for verdict in verdicts(found, {}, truth(replace(case, grad_y=g, act=None))):
        assert verdict.good, f"{verdict} {note}\n{case}"


@pytest.mark.parametrize(("kernel", "layout", "dtype"), LAYOUTS_AND_TYPES)
def test_is_right_in_every_layout_and_type(kernel: Kernel, layout: str, dtype: torch.dtype, poisoned_memory) -> None:
    check(kernel, make_case(layout, dtype, residual=True, act="relu"))
    check(kernel, make_case(layout, dtype, training=False))


@pytest.mark.parametrize(
    ("kernel", "act", "residual", "training"),
    some(
        pytest.param(kernel, act, residual, training, id=f"{kernel.name}-{act}-{residual=}-{training=}")
        for kernel in KERNELS
        for act in ACTIVATIONS
        for residual in (True, False)
        for training in (True, False)
        if act in kernel.activations and not (residual and act not in (None, *BY_Y))
    ),
)
def test_is_right_with_every_activation(kernel: Kernel, act: str | None, residual: bool, training: bool) -> None:
    for dtype in types_of(kernel):
        check(kernel, make_case("NCHW", dtype, act=act, residual=residual, training=training, slope=0.2))


@pytest.mark.parametrize(
    ("act", "layout"),
    some(product(sorted(BY_Y), ("NCHW", "NHWC", "long slices", "NC"))),
)
def test_the_derivative_follows_from_y_in_every_type_and_layout(kernel: Kernel, layout: str, act: str) -> None:
    for dtype in types_of(kernel):
        check(kernel, make_case(layout, dtype, residual=True, act=act))
        check(kernel, make_case(layout, dtype, residual=True, act=act, training=False))


def test_a_residual_goes_with_what_saves_y_or_nothing() -> None:
    residual = torch.zeros(2, 3)
    for act in ACTIVATIONS:
        for dtype in (torch.float32, torch.bfloat16):
            fused, rest = split(Epilogue(residual=residual, act=act), dtype)
            assert fused.residual is None or fused.act in (None, *BY_Y)
            assert (fused.residual is None) is not (rest.residual is None)
            assert {fused.act, rest.act} - {None} == {act} - {None}


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize(("gamma", "beta"), [(True, False), (False, True), (False, False)])
def test_is_right_without_gamma_or_beta(kernel: Kernel, gamma: bool, beta: bool, training: bool) -> None:
    for dtype in types_of(kernel):
        check(kernel, make_case("NHWC", dtype, gamma=gamma, beta=beta, act="silu", training=training))
        check(kernel, make_case("NHWC", dtype, gamma=gamma, beta=beta, act="tanh", residual=True, training=training))


@pytest.mark.parametrize(
    ("layout", "offset"), some(product(("NC", "NCHW", "NHWC", "NDHWC", "sliced"), (1.0, -1e2, 1e4)), rest=2)
)
def test_keeps_its_digits_where_the_mean_is_many_deviations(kernel: Kernel, layout: str, offset: float) -> None:
    for dtype in types_of(kernel):
        check(kernel, make_case(layout, dtype, offset=offset, act="relu", residual=True))


@pytest.mark.parametrize("eps", [1e-12, 1e-5, 0.5, 10.0])
def test_adds_eps_to_the_variance(kernel: Kernel, eps: float) -> None:
    for dtype in types_of(kernel):
        check(kernel, make_case("NCL", dtype, eps=eps, act="tanh"))


def test_constant_channels_give_beta_and_finite_gradients(kernel: Kernel) -> None:
    case = make_case("NCHW")
    case.x[:, 1] = 3.0
    check(kernel, case)
    assert torch.equal(fused(kernel, case)["y"][:, 1], case.beta[1].expand(3, 5, 6))


@pytest.mark.parametrize(("kernel", "layout", "dtype"), some(LAYOUTS_AND_TYPES))
def test_y_and_dx_lie_in_memory_as_pytorchs(kernel: Kernel, layout: str, dtype: torch.dtype) -> None:
    case = make_case(layout, dtype)
    ours, theirs = fused(kernel, case), pytorchs(case)
    for name in ("y", "dx"):
        assert ours[name].dtype == dtype
        assert _strides(ours[name]) == _strides(theirs[name]), name


def _strides(tensor: Tensor) -> list[int]:
    """Of the dimensions longer than 1: those of length 1 have none to speak of."""
    return [stride for stride, length in zip(tensor.stride(), tensor.shape, strict=True) if length > 1]


@every_type
def test_statistics_and_sums_are_of_the_accumulation_type(kernel: Kernel, dtype: torch.dtype) -> None:
    case = make_case("NCHW", dtype, residual=True)
    known = by_verbs(kernel, case)
    wide = kernel.accumulation_dtype(dtype)
    assert wide in (torch.float32, torch.float64)
    assert wide.itemsize >= dtype.itemsize
    assert {known[name].dtype for name in ("mean", "var", "dgamma", "dbeta", "energy")} == {wide}
    assert {known[name].dtype for name in ("y", "dx", "dresidual")} == {dtype}


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0])
def test_a_forward_moves_the_running_statistics(kernel: Kernel, momentum: float) -> None:
    for layout in MOST_USED:
        case = make_case(layout, types_of(kernel)[0], act="relu")
        x, c = case.x, case.x.shape[1]
        running = torch.full((2, c), 2e3, dtype=case.gamma.dtype, device=DEVICE)
        versions = [average._version for average in running]
        moved = kernel.forward(x, case.eps, epilogue_of(case), RunningUpdate(*running, momentum))
        assert all(average._version > before for average, before in zip(running, versions, strict=True))
        axes = tuple(d for d in range(x.dim()) if d != 1)
        wide = f64(x)
        batch = np.stack([wide.mean(axes), wide.var(axes, ddof=1)])
        expected = (1 - momentum) * 2e3 + momentum * batch
        np.testing.assert_allclose(f64(running), expected, rtol=2e-6 if momentum == 1 else 1e-6)
        assert momentum > 0 or (running == 2e3).all()
        torch.testing.assert_close(moved.y, kernel.forward(x, case.eps, epilogue_of(case)).y)


def test_energy_is_summed_only_where_asked_for(kernel: Kernel) -> None:
    case = make_case("NCHW")
    mean, var = statistics_of(kernel, case)
    rstd = torch.rsqrt(var + case.eps)
    arguments = case.grad_y, case.x, mean, rstd, epilogue_of(case)
    assert kernel.reduce_grad(*arguments, energy=False).energy is None
    assert kernel.backward(*arguments, 90, energy=False)[1].energy is None
    assert kernel.reduce_grad(*arguments, energy=True).energy.shape == (4,)


def test_without_a_residual_there_is_no_gradient_for_one(kernel: Kernel) -> None:
    assert fused(kernel, make_case("NCHW"))["dresidual"] is None


def test_inputs_are_left_as_they_were(kernel: Kernel) -> None:
    case = make_case("NHWC", residual=True, act="relu")
    tensors = (case.x, case.grad_y, case.gamma, case.beta, case.residual)
    before = [tensor.clone() for tensor in tensors]
    fused(kernel, case)
    by_verbs(kernel, case)
    assert all(torch.equal(was, now) for was, now in zip(before, tensors, strict=True))


def test_the_fused_pair_says_what_the_verbs_say(kernel: Kernel) -> None:
    for layout in MOST_USED:
        case = make_case(layout, types_of(kernel)[0], residual=True, act="sigmoid")
        whole, parts = fused(kernel, case), by_verbs(kernel, case)
        assert whole.keys() == parts.keys()
        close = 1e-12 if torch.float64 in kernel.types else 1e-5
        for name in whole:
            torch.testing.assert_close(whole[name], parts[name], rtol=close, atol=close)


def test_nan_and_infinity_reach_their_own_channel_only(kernel: Kernel) -> None:
    case = make_case("NCHW")
    case.x[0, 1, 0, 0], case.x[0, 2, 0, 0] = float("nan"), float("inf")
    y = fused(kernel, case)["y"]
    assert y[:, 1].isnan().all()
    assert y[:, 2].isnan().all()
    assert y[:, [0, 3]].isfinite().all()


def test_the_yardstick_can_fail(kernel: Kernel) -> None:
    case = make_case("NCHW", offset=1e2)
    for name, output in fused(kernel, case).items():
        if output is None:
            continue
        wrong = output.clone()
        wrong.view(-1)[0] += 0.01 * output.abs().max()
        with pytest.raises(AssertionError, match=name):
            assert_accurate({name: wrong}, case)


def test_pytorchs_own_outputs_pass_the_yardstick() -> None:
    case = make_case("NCHW", residual=True, act="relu")
    x, gamma, beta, residual = leaves(case)
    z = torch.nn.functional.batch_norm(x, None, None, gamma, beta, True, 0.1, case.eps) + residual
    assert_accurate(gradients(torch.relu(z), case, x, gamma, beta, residual), case)
