"""What the GPU kernel promises besides the contract: run by `test_gpu`, or on a GPU with BATCHNORM_KERNELS=gpu."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from offered import DEVICE, INTERPRETED, ON_GPU, QUIET
from test_contract import backward_epilogue, by_verbs, check, epilogue_of, fused, make_case
from together import together

import batchnorm as bn
from accuracy import assert_accurate
from batchnorm import kernels
from batchnorm.kernels.aten import activate
from batchnorm.kernels.contract import Epilogue, UnavailableError
from batchnorm.kernels.gpu import launch as gpu_launch
from batchnorm.kernels.gpu import plan as gpu_plan
from batchnorm.kernels.gpu.kernel import GpuKernel
from batchnorm.kernels.gpu.launch import Launcher
from batchnorm.kernels.gpu.plan import Tiling
from batchnorm.running_stats import RunningUpdate

if not ON_GPU:
    pytest.skip("run by test_gpu, in a process of its own", allow_module_level=True)

pytestmark = QUIET
KERNEL = GpuKernel()


@pytest.fixture
def usual_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles that an interpreter is quick with."""
    gpu_plan.plan_passes.cache_clear()
    monkeypatch.setattr(gpu_plan, "TILE_SIZE", 1 << 14)
    yield
    gpu_plan.plan_passes.cache_clear()


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tiling]]:
    """Name and tiling of every launch."""
    launches, launch = [], gpu_launch.GpuCall._launch

    def record(
        call: gpu_launch.GpuCall, kernel: object, programs: int, tiling: Tiling, *how: object, **rest: object
    ) -> None:
        launches.append((f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}", tiling))
        launch(call, kernel, programs, tiling, *how, **rest)

    monkeypatch.setattr(gpu_launch.GpuCall, "_launch", record)
    return launches


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels are held in registers, by a device of so few multiprocessors that few channels keep it busy."""
    monkeypatch.setattr(gpu_plan, "VALUES_PER_THREAD", 32)
    monkeypatch.setattr(Launcher, "processors", lambda self, device: 2)
    gpu_plan.plan_resident.cache_clear()
    yield
    gpu_plan.plan_resident.cache_clear()


@pytest.fixture
def shared_channels(held: None, poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Registers hold less, and several programs share a channel."""
    monkeypatch.setattr(gpu_plan, "VALUES_PER_THREAD", 1)
    monkeypatch.setattr(gpu_plan, "WARP_SIZE", 8)
    monkeypatch.setattr(Launcher, "processors", lambda self, device: 16)
    with together(monkeypatch) if INTERPRETED else nullcontext([1]) as waits:
        yield
        assert waits, "no program has waited for another"


@pytest.mark.parametrize("layout", ["NC", "NCHW", "NHWC", "long slices", "one channel", "many channels", "sliced"])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_channels_in_registers_keep_the_contract(
    layout: str, offset: float, held: None, launched: list[tuple[str, Tiling]]
) -> None:
    case = make_case(layout, residual=True, act="tanh", offset=offset)
    assert_accurate(fused(KERNEL, case), case)
    assert [name for name, _ in launched] == ["fused.resident_forward", "fused.resident_backward"]


def test_channels_in_registers_keep_the_contract_in_other_ways(held: None, launched: list[tuple[str, Tiling]]) -> None:
    for how in ({"dtype": torch.bfloat16}, {"act": "relu", "gamma": False}, {"residual": True, "beta": False}):
        case = make_case("NHWC", **how)
        assert_accurate(fused(KERNEL, case), case)
    case = make_case("NCHW", residual=True, act="relu")
    forward = KERNEL.forward(case.x, case.eps, epilogue_of(case))
    y, moments, rstd = forward.y, forward.moments, forward.rstd
    epilogue = Epilogue(case.gamma, case.beta, None, case.act, y=y)
    grads, sums = KERNEL.backward(case.grad_y, case.x, moments.mean, rstd, epilogue, 90, energy=False)
    assert sums.energy is None
    assert_accurate({**grads._asdict(), **sums._asdict()}, case)
    assert {name for name, _ in launched} == {"fused.resident_forward", "fused.resident_backward"}


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "long slices", "sliced"])
def test_programs_that_share_a_channel_wait_for_each_other(
    layout: str, shared_channels: None, launched: list[tuple[str, Tiling]]
) -> None:
    for how in ({"residual": True, "act": "tanh"}, {"act": "relu", "offset": 1e4}):
        case = make_case(layout, **how)
        assert_accurate(fused(KERNEL, case), case)
    resident = [tiling for name, tiling in launched if name.startswith("fused.resident")]
    assert any(tiling.parts > 1 for tiling in resident)


@pytest.fixture
def in_rounds(poisoned_memory: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The L2 holds some channels of a tensor, and a device of 4 multiprocessors takes them in turn."""
    monkeypatch.setattr(gpu_plan, "VALUES_PER_THREAD", 0)
    monkeypatch.setattr(gpu_plan, "L2_DIVISOR", 1)
    monkeypatch.setattr(gpu_plan, "TILE_SIZE", 32)
    monkeypatch.setattr(gpu_plan, "COOPERATIVE_PROGRAMS_PER_SM", 1)
    monkeypatch.setattr(Launcher, "processors", lambda self, device: 4)
    monkeypatch.setattr(Launcher, "l2_bytes", lambda self, device: 2304)
    for planned in (gpu_plan.plan_passes, gpu_plan.plan_resident, gpu_plan.plan_rounds):
        planned.cache_clear()
    with together(monkeypatch) if INTERPRETED else nullcontext([1]) as waits:
        yield
        assert waits, "no program has waited for another"
    for planned in (gpu_plan.plan_passes, gpu_plan.plan_resident, gpu_plan.plan_rounds):
        planned.cache_clear()


@pytest.mark.parametrize(
    ("layout", "cache_bytes"),
    [("NCHW", 2304), ("NHWC", 4608), ("long slices", 5376), ("many channels", 2048), ("sliced", 2048), ("NC", 2048)],
)
def test_groups_of_programs_take_the_channels_in_turn(
    layout: str, cache_bytes: int, in_rounds: None, launched: list[tuple[str, Tiling]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Launcher, "l2_bytes", lambda self, device: cache_bytes)
    for how in ({"residual": True, "act": "tanh"}, {"act": "relu", "offset": 1e4}):
        case = make_case(layout, **how)
        assert_accurate(fused(KERNEL, case), case)
    monkeypatch.setattr(Launcher, "l2_bytes", lambda self, device: 2048)
    fused(KERNEL, make_case("NCHW"))  # where some wait and go on
    assert {name for name, _ in launched} == {"fused.rounds_forward", "fused.rounds_backward"}
    assert any(tiling.blocks > tiling.groups > 0 for _, tiling in launched)


def test_groups_of_programs_sum_the_energy_where_it_is_wanted(in_rounds: None) -> None:
    case = make_case("NCHW", residual=True, act="relu")
    forward = KERNEL.forward(case.x, case.eps, epilogue_of(case))
    y, moments, rstd = forward.y, forward.moments, forward.rstd
    epilogue = Epilogue(case.gamma, case.beta, None, case.act, y=y)
    for energy in (False, True):
        grads, sums = KERNEL.backward(case.grad_y, case.x, moments.mean, rstd, epilogue, 90, energy=energy)
        assert (sums.energy is not None) is energy
        assert_accurate({**grads._asdict(), **sums._asdict()}, case)


def test_a_channel_that_the_cache_does_not_hold_is_read_again(
    in_rounds: None, launched: list[tuple[str, Tiling]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused(KERNEL, make_case("NCHW"))
    launched.clear()
    gpu_plan.plan_rounds.cache_clear()
    monkeypatch.setattr(Launcher, "l2_bytes", lambda self, device: 4 * 90 - 1)
    case = make_case("NCHW", act="relu")
    assert_accurate(fused(KERNEL, case), case)
    assert [name for name, _ in launched][:2] == ["reductions.reduce_moments", "passes.apply"]


@pytest.mark.parametrize("way", ["shared_channels", "in_rounds"])
def test_programs_that_share_a_channel_move_its_running_statistics_once(
    way: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    request.getfixturevalue(way)
    monkeypatch.setattr(Launcher, "l2_bytes", lambda self, device: 768)  # two channels at a time
    case = make_case("NCHW")
    running = torch.zeros(2, 4, device=DEVICE)
    moments = KERNEL.forward(case.x, case.eps, epilogue_of(case), RunningUpdate(*running, 0.5)).moments
    torch.testing.assert_close(running, 0.5 * torch.stack((moments.mean, moments.unbiased_var)))


def test_where_programs_cannot_run_together_the_tensor_is_read_again(
    shared_channels: None, launched: list[tuple[str, Tiling]], monkeypatch: pytest.MonkeyPatch
) -> None:
    fused(KERNEL, make_case("NCHW"))  # which can
    launched.clear()
    launch = Launcher.launch

    def refusing(self: Launcher, *how: object) -> None:
        if how[-1].registers is not None:
            raise UnavailableError("too many programs")
        launch(self, *how)

    monkeypatch.setattr(Launcher, "launch", refusing)
    kernel, case = GpuKernel(), make_case("NCHW", residual=True, act="tanh")
    assert_accurate(fused(kernel, case), case)
    names = [name for name, _ in launched]
    assert names[:3] == ["fused.resident_forward", "reductions.reduce_moments", "passes.apply"]
    assert names[3:] == ["reductions.reduce_sums", "passes.apply_gradient"]
    assert not kernel.launcher.can_cooperate
    assert KERNEL.launcher.can_cooperate


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "long slices"])
def test_many_parts_are_merged_by_a_launch_of_their_own(
    layout: str, launched: list[tuple[str, Tiling]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_plan, "MAX_INLINE_MERGE", 0)
    gpu_plan.plan_passes.cache_clear()
    case = make_case(layout, residual=True, act="tanh")
    running, others = torch.zeros(2, 2, case.x.shape[1], device=DEVICE)
    forward = KERNEL.forward(case.x, case.eps, epilogue_of(case), RunningUpdate(*running, 0.1))
    y, moments, rstd = forward.y, forward.moments, forward.rstd
    RunningUpdate(*others, 0.1).move(moments)
    torch.testing.assert_close(running, others)
    m = case.x.numel() // case.x.shape[1]
    epilogue = backward_epilogue(case, y)
    grads, sums = KERNEL.backward(case.grad_y, case.x, moments.mean, rstd, epilogue, m, energy=True)
    assert_accurate({"y": y, "mean": moments.mean, **grads._asdict(), **sums._asdict()}, case)
    forward = ["reductions.reduce_moments", "reductions.merge_moments", "passes.apply"]
    assert [name for name, _ in launched] == [
        *forward,
        "reductions.reduce_sums",
        "reductions.merge_sums",
        "passes.apply_gradient",
    ]
    gpu_plan.plan_passes.cache_clear()


@pytest.mark.parametrize("layout", ["NCHW", "NHWC", "NC"])
def test_small_tensors_have_several_parts_here(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tilings, plan = [], gpu_plan.plan_passes
    monkeypatch.setattr(gpu_plan, "plan_passes", lambda *sizes: tilings.append(plan(*sizes)) or tilings[-1])
    fused(KERNEL, make_case(layout))
    assert all(tiling.merges_inline for tiling in tilings)
    if DEVICE.type == "cpu":
        assert (
            any(tiling.parts > 1 and tiling.part_positions > tiling.tile_values for tiling in tilings) or layout == "NC"
        )


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_every_run_gives_the_same_bits(layout: str) -> None:
    case = make_case(layout, residual=True, act="tanh")
    first, second = fused(KERNEL, case), fused(KERNEL, case)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("shape", [(1000, 2, 1000), (1_000_000, 2)], ids=["slices", "rows"])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_million_values_keep_their_digits(shape: tuple[int, ...], offset: float, usual_tiles: None) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + offset).float()
    moments = KERNEL.statistics(x.to(DEVICE))
    wide = x.double().numpy()
    axes = tuple(axis for axis in range(x.dim()) if axis != 1)
    mean, var = wide.mean(axes), wide.var(axes)
    np.testing.assert_allclose(moments.mean.double().cpu().numpy(), mean, rtol=6e-8, atol=1e-6)
    np.testing.assert_allclose(moments.var.double().cpu().numpy(), var, rtol=2e-6)


@pytest.mark.parametrize("shape", [(50, 2, 100), (5000, 2)], ids=["slices", "rows"])
def test_an_outlier_in_the_first_place_costs_no_digits(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    x[(0, slice(None), *[0] * (x.dim() - 2))] = 1e3
    axes = tuple(axis for axis in range(x.dim()) if axis != 1)
    moments = KERNEL.statistics(x.to(DEVICE))
    np.testing.assert_allclose(moments.var.double().cpu().numpy(), x.double().numpy().var(axes), rtol=2e-6)


@pytest.mark.parametrize("way", ["two passes", "held"])
def test_where_there_is_no_value_nothing_overflows(way: str, request: pytest.FixtureRequest) -> None:
    if way == "held":
        request.getfixturevalue(way)
    case = make_case("NCHW", act="silu")  # slices of 30 in a pitch of 32
    case.x[:, 1] = 3e37
    outputs = fused(KERNEL, case)
    assert all(value is None or value.isfinite().all() for value in outputs.values())


@pytest.mark.parametrize("way", ["two passes", "held", "shared_channels", "in_rounds"])
def test_a_mean_of_a_million_deviations_costs_the_variance_no_digits(way: str, request: pytest.FixtureRequest) -> None:
    if way != "two passes":
        request.getfixturevalue(way)
    for layout in ("NCHW", "NHWC"):
        case = make_case(layout, offset=1e6)
        moments = KERNEL.forward(case.x, case.eps, Epilogue()).moments
        wide = case.x.double().cpu().numpy()
        np.testing.assert_allclose(moments.var.double().cpu().numpy(), wide.var((0, 2, 3)), rtol=1e-5)
        np.testing.assert_allclose(moments.mean.double().cpu().numpy(), wide.mean((0, 2, 3)), rtol=1e-7)
    if way in ("shared_channels", "in_rounds"):
        fused(KERNEL, make_case("NCHW"))


@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
def test_positions_of_64_bits_are_the_same_positions(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tiling, "int64", True)
    gpu_plan.plan_passes.cache_clear()
    check(KERNEL, make_case(layout, residual=True, act="relu"))
    gpu_plan.plan_passes.cache_clear()


def test_the_count_may_be_a_tensor_of_the_device() -> None:
    case = make_case("NHWC", act="relu")
    known = by_verbs(KERNEL, case)
    rstd = torch.rsqrt(known["var"] + case.eps)
    arguments = case.grad_y, case.x, known["mean"], rstd, epilogue_of(case)
    sums = KERNEL.reduce_grad(*arguments, energy=False)
    m = torch.tensor(90.0, dtype=torch.float64, device=DEVICE)
    torch.testing.assert_close(KERNEL.input_grad(*arguments, sums, m).dx, known["dx"], rtol=1e-6, atol=1e-7)


def test_parameters_may_be_of_the_tensors_own_narrow_type() -> None:
    case = make_case("NCHW", torch.float16)
    narrow = replace(case, gamma=case.gamma.half(), beta=case.beta.half())
    wide = replace(case, gamma=narrow.gamma.float(), beta=narrow.beta.float())
    assert torch.equal(fused(KERNEL, narrow)["y"], fused(KERNEL, wide)["y"])


def test_a_residual_without_an_activation_gets_the_gradient_itself() -> None:
    case = make_case("NCHW", residual=True)
    epilogue = Epilogue(case.gamma, case.beta, case.residual)
    mean = torch.zeros(4, device=DEVICE)
    grads = KERNEL.input_grad(case.grad_y, case.x, mean, mean + 1, epilogue, None, 90)
    assert torch.equal(grads.dresidual, case.grad_y)


@pytest.mark.parametrize("act", [None, "gelu"])
def test_a_layer_trains_by_it(act: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    choice = kernels.Choice(KERNEL, "a test", differentiable=False)
    monkeypatch.setattr(kernels, "choose", lambda x, *how, **rest: choice)
    case = make_case("NHWC", act=act, residual=True)
    layer = bn.BatchNorm2d(4, act=act).to(DEVICE)
    stock = torch.nn.BatchNorm2d(4).to(DEVICE)
    x, residual = case.x.clone().requires_grad_(), case.residual.clone().requires_grad_()
    y, other = layer(x, residual), activate(stock(x) + residual, act, 0.01)
    wanted = (x, residual)
    ours = torch.autograd.grad(y, (*wanted, layer.weight, layer.bias), case.grad_y)
    theirs = torch.autograd.grad(other, (*wanted, stock.weight, stock.bias), case.grad_y)
    for mine, its in zip((y, *ours, *layer.buffers()), (other, *theirs, *stock.buffers()), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-5)
    layer.eval(), stock.eval()
    torch.testing.assert_close(layer(x, residual), activate(stock(x) + residual, act, 0.01), rtol=1e-4, atol=1e-5)


def test_a_compiled_step_calls_it_without_a_break(
    launched: list[tuple[str, Tiling]], monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = kernels.Choice(KERNEL, "a test", differentiable=False)
    monkeypatch.setattr(kernels, "choose", lambda x, *how, **rest: choice)
    monkeypatch.setattr(kernels, "compiled", lambda x: True)
    case = make_case("NHWC", act="silu", residual=True)
    layer, stock = bn.BatchNorm2d(4, act="silu").to(DEVICE), torch.nn.BatchNorm2d(4).to(DEVICE)
    x = case.x.clone().requires_grad_()
    y = torch.compile(layer, fullgraph=True, backend="aot_eager")(x, case.residual)
    z = activate(stock(x) + case.residual, "silu", 0.01)
    torch.testing.assert_close(y, z, rtol=1e-4, atol=1e-5)
    ours, theirs = (torch.autograd.grad(out, x, case.grad_y)[0] for out in (y, z))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(layer.named_buffers()), dict(stock.named_buffers()))
    assert [name.partition(".")[0] for name, _ in launched] == ["reductions", "passes", "reductions", "passes"]


if DEVICE.type == "cuda":

    def test_a_training_step_can_be_captured_in_a_graph() -> None:
        layer = bn.BatchNorm2d(64, act="relu", device=DEVICE)
        x = torch.randn(64, 64, 56, 56, device=DEVICE).requires_grad_()
        assert kernels.choose(x).name == "gpu"

        def step() -> torch.Tensor:
            return torch.autograd.grad(layer(x).sum(), x)[0]

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            expected = step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = step()
        graph.replay()
        assert torch.equal(captured, expected)

    def test_nothing_waits_for_the_device() -> None:
        layer = bn.BatchNorm2d(64, act="silu", device=DEVICE)
        x = torch.randn(64, 64, 56, 56, device=DEVICE).requires_grad_()
        layer(x).sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(x).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
