"""What the CPU kernel promises beyond the contract: every tiling, all digits, one mask, the same bits on any thread."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_contract import check, make_case, types_of
from torch import Tensor

from batchnorm import spec
from batchnorm.kernels.aten import AtenKernel
from batchnorm.kernels.contract import Epilogue
from batchnorm.kernels.cpu import kernel, plan
from batchnorm.kernels.cpu.kernel import CpuKernel
from batchnorm.kernels.cpu.machine import DEFAULTS, Rate
from batchnorm.running_stats import RunningUpdate
from randomness import SEED

KERNEL = CpuKernel()
LAYOUTS = ["NC", "NCL", "NCHW", "NHWC", "NDHWC", "long slices", "many channels", "one row"]


@pytest.fixture
def _plans() -> Iterator[None]:
    forget()
    yield
    forget()


def forget() -> None:
    """Plan and prepare every call anew."""
    plan.plan.cache_clear()
    kernel._prepared.clear()


# --- tilings ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_plans")
@pytest.mark.parametrize("bypass_caches", [False, True], ids=["", "past the caches"])
@pytest.mark.parametrize("parts", ["one part", "many parts"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_tiling_is_right(
    layout: str, parts: str, bypass_caches: bool, monkeypatch: pytest.MonkeyPatch, poisoned_memory: None
) -> None:
    for name, value in (("_TILE_BYTES", 64), ("_LONG_RUN", 1), ("_SMALL", 0), ("_GROUP_BYTES", 1), ("_WORK_BYTES", 0)):
        monkeypatch.setattr(plan, name, value)
    monkeypatch.setattr(plan, "_PARTS_EACH", 1 if parts == "one part" else 40)
    monkeypatch.setattr(plan, "_PART_ROWS", 1 << 20 if parts == "one part" else 1)
    monkeypatch.setattr(plan.Plan, "streams", lambda self, _: bypass_caches and self.matrix.row_bytes % 64 == 0)
    for dtype in types_of(KERNEL):
        check(KERNEL, make_case(layout, dtype, residual=True, act="relu"))
        check(KERNEL, make_case(layout, dtype, offset=1e2))


@pytest.mark.usefixtures("_plans")
@pytest.mark.parametrize("shape", [(3, 2, 5000), (5, 3000), (2, 5, 1023), (2, 5, 1000), (7, 64, 3)])
def test_slices_of_any_length_are_written_past_the_caches_whole(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slice may begin and end within a cache line."""
    monkeypatch.setattr(kernel, "facts", lambda: replace(DEFAULTS, l2_bytes=0))
    x = torch.randn(shape)
    y = KERNEL.forward(x, 1e-5, Epilogue()).y
    torch.testing.assert_close(y, torch.nn.functional.batch_norm(x, None, None, training=True))


@pytest.mark.usefixtures("_plans")
@pytest.mark.parametrize("act", [None, "relu", "silu"])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "rows", "short slices", "few channels"])
def test_no_bit_depends_on_the_facts_of_the_machine(
    layout: str, act: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tiles and streaming follow from what is measured; the order of every sum does not."""
    shapes = {"rows": (3000, 70), "short slices": (300, 40, 3, 3), "few channels": (40, 3, 64, 64)}
    shape = shapes.get(layout, (24, 40, 28, 28))
    for dtype in types_of(KERNEL):
        found = []
        for size in (0, 1 << 14, 1 << 20, 1 << 30):
            rates = tuple(Rate(one.total, size + 1.0, size + 2.0) for one in DEFAULTS.bandwidth)
            others = {"cached_bytes": size, "bandwidth": rates, "region_seconds": size * 1e-9}
            found_facts = replace(DEFAULTS, l2_bytes=size, **others)
            monkeypatch.setattr(kernel, "facts", lambda facts=found_facts: facts)
            forget()
            found.append(step(shape, layout == "channels_last", act, dtype))
        assert all(same(one, found[0]) for one in found[1:]), dtype


# --- digits -----------------------------------------------------------------------------------------------------------


def worst(got: Tensor, want: np.ndarray) -> float:
    return float(np.abs(got.double().numpy() - want).max())


@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e4], ids=["mean 0", "mean 100 std", "mean 10,000 std"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NC"])
def test_no_error_above_pytorchs_at_a_million_values_a_channel(layout: str, ratio: float) -> None:
    """error <= PyTorch's error + 4 last digits of the largest true value, for y, dx, dgamma, dbeta, mean and var.

    mean and var may have an error of their own instead, half a last digit of float32: the kernel's are float64.
    """
    shape = (1_000_000, 4) if layout == "NC" else (16, 4, 250, 250)
    x = torch.randn(shape) + ratio
    if layout == "NHWC":
        x = x.contiguous(memory_format=torch.channels_last)
    grad_y, gamma, beta = torch.randn_like(x), torch.rand(4) + 0.5, torch.randn(4)
    forward = KERNEL.forward(x, 1e-5, Epilogue(gamma, beta))
    y, moments, rstd = forward.y, forward.moments, forward.rstd
    grads, sums = KERNEL.backward(grad_y, x, moments.mean, rstd, Epilogue(gamma, beta), x.numel() // 4, energy=False)
    leaves = [tensor.clone(memory_format=torch.preserve_format).requires_grad_() for tensor in (x, gamma, beta)]
    theirs_y = torch.nn.functional.batch_norm(leaves[0], None, None, *leaves[1:], training=True)
    theirs = torch.autograd.grad(theirs_y, leaves, grad_y)

    truth = spec.forward(x.double().numpy(), gamma.numpy(), beta.numpy())
    true = spec.backward(grad_y.double().numpy(), x.double().numpy(), gamma.numpy(), beta.numpy())
    outputs = {
        "y": (y, theirs_y.detach(), truth),
        "dx": (grads.dx, theirs[0], true.dx),
        "dgamma": (sums.dgamma.float(), theirs[1], true.dgamma),
        "dbeta": (sums.dbeta.float(), theirs[2], true.dbeta),
    }
    for name, (ours, other, want) in outputs.items():
        allowed = worst(other, want) + 4 * np.finfo(np.float32).eps * np.abs(want).max()
        assert worst(ours, want) <= allowed, (name, worst(ours, want), worst(other, want))
    for name, ours, want in zip(("mean", "var"), (moments.mean, moments.var), spec.statistics(x.numpy()), strict=True):
        assert worst(ours, want) <= 0.5 * np.finfo(np.float32).eps * np.abs(want).max(), name


def test_an_outlier_in_the_first_place_costs_no_digits() -> None:
    for shape in ((50_000, 4), (50, 4, 1000)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
        x[0, :] = 3e4
        _, var = spec.statistics(x.numpy())
        assert np.allclose(KERNEL.statistics(x).var.numpy(), var, rtol=1e-9)


def test_channels_last_is_no_less_exact_than_contiguous() -> None:
    """PyTorch's channels_last sums in float32 and loses 5e-4 here."""
    x = torch.randn(64, 8, 112, 112)
    truth = spec.forward(x.numpy())
    for memory_format in (torch.contiguous_format, torch.channels_last):
        y = KERNEL.forward(x.contiguous(memory_format=memory_format), 1e-5, Epilogue()).y
        assert worst(y, truth) < 2e-6


# --- one mask ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NC"])
def test_what_is_passed_forward_is_passed_backward(layout: str, dtype: torch.dtype) -> None:
    """Over values that crowd about the kink; with constant statistics dx is gamma·rstd·grad_y where y > 0, else 0."""
    shape = (4096, 64) if layout == "NC" else (16, 64, 16, 16)
    spread = 5e-2 if dtype == torch.bfloat16 else 1e-3  # some last digits of x
    x = (torch.randn(shape) * spread + 0.7).to(dtype)
    if layout == "NHWC":
        x = x.contiguous(memory_format=torch.channels_last)
    mean, rstd = torch.full((64,), 0.6, dtype=torch.float64), torch.full((64,), 1.7, dtype=torch.float64)
    beta = torch.full((64,), -0.17, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for residual in (None, torch.randn(shape).mul_(spread).to(dtype)):
        epilogue = Epilogue(None, beta, residual, "relu")
        y = KERNEL.normalize(x, mean, rstd, epilogue)
        assert 0.2 < (y > 0).double().mean() < 0.8
        backward = epilogue if residual is None else Epilogue(None, beta, None, "relu", y=y)
        dx, _ = KERNEL.input_grad(torch.ones_like(x), x, mean, rstd, backward, None, 1)
        assert torch.equal(dx != 0, y > 0)


# --- threads and processes --------------------------------------------------------------------------------------------


def step(
    shape: tuple[int, ...] = (16, 32, 14, 14), channels_last: bool = False, act: str | None = "relu",
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:  # fmt: skip
    """All results of one training step on fixed numbers."""
    generator = torch.Generator().manual_seed(11)
    x, grad_y = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    if channels_last:
        x, grad_y = (tensor.contiguous(memory_format=torch.channels_last) for tensor in (x, grad_y))
    forward = KERNEL.forward(x, 1e-5, Epilogue(act=act))
    y, moments, rstd = forward.y, forward.moments, forward.rstd
    grads, sums = KERNEL.backward(grad_y, x, moments.mean, rstd, Epilogue(act=act), x.numel() // shape[1], energy=True)
    return [y, moments.mean, moments.var, rstd, grads.dx, sums.dgamma, sums.dbeta, sums.energy]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def forward_and_backward(x: Tensor, residual: Tensor, grad_y: Tensor, act: str, use: bool) -> list[Tensor]:
    """y, dx, dresidual, dgamma and dbeta; without the bits that forward stores unless `use`."""
    channels = x.shape[1]
    gamma, beta = torch.linspace(0.5, 1.5, channels, dtype=x.dtype), torch.linspace(-1, 1, channels, dtype=x.dtype)
    forward = KERNEL.forward(x, 1e-5, Epilogue(gamma, beta, residual, act))
    epilogue = Epilogue(gamma, beta, None, act, 0.01, forward.y, forward.signs if use else None)
    m = x.numel() // channels
    (dx, dresidual), sums = KERNEL.backward_of(grad_y, x, forward.statistics, epilogue, m, energy=False)
    assert dresidual is not None
    return [forward.y, dx, dresidual, sums.dgamma, sums.dbeta]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        ((6, 32, 20, 20), False),
        ((6, 48, 20, 21), True),
        ((700, 96), False),
        ((3, 16, 4, 8, 8), True),
        ((2, 3, 16), False),
    ],
)
def test_backward_by_the_stored_signs_of_y_has_the_bits_of_backward_by_y(
    shape: tuple[int, ...], channels_last: bool, dtype: torch.dtype
) -> None:
    draw = torch.Generator().manual_seed(SEED)
    x, residual, grad_y = torch.randn(3, *shape, generator=draw, dtype=dtype)
    x.view(-1)[7] = float("nan") if dtype == torch.float32 else 0.0
    if channels_last:
        last = torch.channels_last if len(shape) == 4 else torch.channels_last_3d
        x, residual, grad_y = (t.contiguous(memory_format=last) for t in (x, residual, grad_y))
    signs = KERNEL.forward(x, 1e-5, Epilogue(None, None, residual, "relu")).signs
    assert signs is not None
    for mine, its in zip(
        *(forward_and_backward(x, residual, grad_y, "relu", use) for use in (True, False)), strict=True
    ):
        assert torch.equal(mine.nan_to_num(7.0), its.nan_to_num(7.0)), SEED


def test_signs_are_stored_only_where_vectors_are_whole_and_nothing_is_rounded() -> None:
    for x, act, residual in (
        (torch.randn(6, 32, 5, 5), "relu", True),  # slices of 25 values
        (torch.randn(700, 30), "relu", True),
        (torch.randn(700, 96).bfloat16(), "relu", True),
        (torch.randn(700, 96), "tanh", True),
        (torch.randn(700, 96), "relu", False),
    ):
        forward = KERNEL.forward(x, 1e-5, Epilogue(residual=x if residual else None, act=act))
        assert forward.signs is None


@pytest.mark.parametrize("act", ["silu", "gelu", "elu"])
def test_rows_that_keep_g_in_dx_have_the_bits_of_those_that_do_not(act: str, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(SEED)
    x, grad_y = torch.randn(2, 900, 96, generator=draw)
    known = kernel.facts()
    found = []
    for most in (0, 1 << 30):
        monkeypatch.setattr(kernel, "_prepared", {})
        monkeypatch.setattr(kernel, "facts", lambda most=most: replace(known, cached_bytes=most))
        forward = KERNEL.forward(x, 1e-5, Epilogue(act=act))
        grads, sums = KERNEL.backward_of(grad_y, x, forward.statistics, Epilogue(act=act), 900, energy=False)
        found.append((grads.dx, sums.dgamma, sums.dbeta))
        (prepared,) = [one for key, one in kernel._prepared.items() if key[6]]
        assert bool(prepared.job.kept) is (most > 0)
    for mine, its in zip(*found, strict=True):
        assert torch.equal(mine, its), SEED


@pytest.mark.usefixtures("_plans")
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("columns", [(900, 160), (301, 7, 32), (64, 272)], ids=str)
def test_no_bit_depends_on_the_groups_of_channels(
    columns: tuple[int, ...], act: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = torch.Generator().manual_seed(SEED)
    x, residual, grad_y = torch.randn(3, *columns, generator=draw)
    if len(columns) == 3:
        x, residual, grad_y = (
            t.transpose(1, 2).unsqueeze(3).contiguous(memory_format=torch.channels_last) for t in (x, residual, grad_y)
        )
    monkeypatch.setattr(plan, "_SMALL", 0)
    found = []
    for piece, work in ((1 << 20, 0), (1, 0), (2, 0), (3, 1 << 16)):
        forget()
        monkeypatch.setattr(plan, "_PIECE_LINES", piece)
        monkeypatch.setattr(plan, "_WORK_BYTES", work)
        if act == "relu":
            found.append(forward_and_backward(x, residual, grad_y, act, True))
        else:
            forward = KERNEL.forward(x, 1e-5, Epilogue(act=act))
            m = x.numel() // x.shape[1]
            grads, sums = KERNEL.backward_of(grad_y, x, forward.statistics, Epilogue(act=act), m, energy=False)
            found.append([forward.y, grads.dx, sums.dgamma, sums.dbeta])
    for other in found[1:]:
        for mine, its in zip(other, found[0], strict=True):
            assert torch.equal(mine, its), SEED


@pytest.fixture
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_same_call_gives_the_same_bits(threads: int, channels_last: bool) -> None:
    torch.set_num_threads(threads)
    first = step((64, 32, 28, 28), channels_last)
    for _ in range(20):
        assert same(step((64, 32, 28, 28), channels_last), first)


@pytest.mark.usefixtures("_threads")
def test_follows_torchs_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    from batchnorm.kernels.cpu import threads as team

    asked = []
    parallel = team.parallel_function()

    def ask(work: int, job: int, threads: int, flags: int) -> None:
        asked.append(threads)
        parallel(work, job, threads, flags)

    monkeypatch.setattr(team, "parallel_function", lambda: ask)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        step()
    assert {*asked} == {2, 3}, "one thread works alone"


def test_many_python_threads_at_once_get_the_same_bits() -> None:
    want, wrong = step(), []

    def work() -> None:
        wrong.extend(number for number in range(30) if not same(step(), want))

    workers = [threading.Thread(target=work) for _ in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers)
    assert wrong == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_gets_the_same_bits() -> None:
    """With PyTorch's number of threads as it was: its own operators would wait forever for threads left behind."""
    x, epilogue = torch.randn(64, 32, 28, 28), Epilogue(act="relu")
    forward = KERNEL.forward(x, 1e-5, epilogue)  # the team of threads exists before the fork, not after it
    y, moments, rstd = forward.y, forward.moments, forward.rstd
    dx = KERNEL.backward(y, x, moments.mean, rstd, epilogue, 64 * 28 * 28, energy=False)[0].dx

    def work() -> None:
        ours = KERNEL.forward(x, 1e-5, epilogue).y
        gradient = KERNEL.backward(y, x, moments.mean, rstd, epilogue, 64 * 28 * 28, energy=False)[0].dx
        same = np.array_equal(ours.numpy(), y.numpy()) and np.array_equal(gradient.numpy(), dx.numpy())
        os._exit(0 if same else 1)

    context = multiprocessing.get_context("fork")
    children = [context.Process(target=work, daemon=True) for _ in range(3)]
    for child in children:
        child.start()
    for child in children:
        child.join(20)
        child.kill()
    assert [child.exitcode for child in children] == [0, 0, 0]


class Normalized(torch.utils.data.Dataset):
    """A data set that normalizes in the worker that loads it."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> Tensor:
        return step()[0]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_works_in_dataloader_workers() -> None:
    want = step()[0]
    loader = torch.utils.data.DataLoader(Normalized(), batch_size=None, num_workers=2, timeout=60)
    assert all(torch.equal(loaded, want) for loaded in loader)


def test_works_in_a_process_pool() -> None:
    want = step()
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        found = pool.apply_async(step).get(120)
    assert same(found, want)


def test_without_the_teams_runtime_one_thread_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    from batchnorm.kernels.cpu import threads as team

    want = step((64, 32, 28, 28))
    monkeypatch.setattr(team, "parallel_function", lambda: None)
    assert same(step((64, 32, 28, 28)), want)


def test_agrees_with_pytorchs_operators_on_nan_and_infinity() -> None:
    x = torch.randn(64, 8, 9, 9)
    x[3, 2, 0, 0], x[5, 4, 1, 1] = float("nan"), float("inf")
    ours, theirs = (kernel.forward(x, 1e-5, Epilogue(act="relu")).y for kernel in (KERNEL, AtenKernel()))
    assert torch.equal(ours.isnan(), theirs.isnan())
    torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.7, 1.0])
@pytest.mark.parametrize("shape", [(64, 5, 40), (4, 300, 3)])
def test_running_statistics_move_in_the_job_as_outside_of_it(
    shape: tuple[int, ...], momentum: float, dtype: torch.dtype
) -> None:
    x = torch.randn(shape).to(dtype)
    for kind, step in ((torch.float32, 1), (torch.float64, 1), (torch.float32, 2), (torch.bfloat16, 1)):
        ours, theirs = ([torch.randn(shape[1] * step).to(kind)[::step], torch.rand(shape[1]).to(kind)] for _ in "ab")
        for one, other in zip(ours, theirs, strict=True):
            other.data = one.clone()
        versions = [one._version for one in ours]
        moments = KERNEL.forward(x, 1e-5, Epilogue(), RunningUpdate(*ours, momentum)).moments
        RunningUpdate(*theirs, momentum).move(moments)
        torch.testing.assert_close(ours, theirs)
        assert all(one._version > version for one, version in zip(ours, versions, strict=True))
