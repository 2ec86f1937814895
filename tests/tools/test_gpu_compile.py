"""The GPU kernels compile for every target ahead of time, and keep to their registers."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import batchnorm as bn
import gpu_compile
from batchnorm import kernels
from batchnorm.bench.cases import Case
from batchnorm.kernels.gpu.kernel import GpuKernel
from batchnorm.kernels.gpu.launch import cooperative_options
from batchnorm.kernels.gpu.plan import COOPERATIVE_PROGRAMS_PER_SM, OPTIONS

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
CASE = Case((256, 64, 56, 56), "channels_last", "bfloat16", "bn+add+relu")
SLICES = Case((256, 64, 56, 56), "contiguous", "float32", "bn+silu")


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


@pytest.mark.slow
@pytest.mark.parametrize("target", gpu_compile.TARGETS)
def test_a_training_step_compiles_without_spills(target: str) -> None:
    found = list(gpu_compile.facts([CASE, SLICES], [target]))
    passes = ["reduce_moments", "merge_moments", "apply", "reduce_sums", "merge_sums", "apply_gradient"]
    assert [entry["kernel"] for entry in found[:6]] == passes
    assert {"rounds_forward", "rounds_backward"} < {entry["kernel"] for entry in found}
    assert {entry["target"] for entry in found} == {target}
    assert [entry for entry in found if entry["spilled"]] == []
    assert all(0 < entry["registers"] <= 256 for entry in found)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "layout", "dtype", "load"),
    [
        ((256, 64, 56, 56), "contiguous", "float32", 16),  # slices longer than a tile
        ((256, 256, 14, 14), "contiguous", "bfloat16", 8),  # 196 is four times an odd number
        ((256, 512, 7, 7), "contiguous", "float16", 2),
        ((32, 24, 56, 56), "channels_last", "bfloat16", 16),
    ],
)
@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_a_load_takes_as_much_as_lies_side_by_side(
    target: str, shape: tuple[int, ...], layout: str, dtype: str, load: int
) -> None:
    launched = gpu_compile.launches(Case(shape, layout, dtype, "bn+silu"))
    names = [launch.kernel.fn.__name__ for launch in launched]
    assert len(set(names)) == 8
    for launch in [launch for launch, name in zip(launched, names, strict=True) if not name.startswith("merge")]:
        found = gpu_compile.compiled(launch, target)
        assert found["spilled"] == 0
        assert found["load"] == load or found["load"] == 4 > load  # of a vector, where it is more than of the tensor


def test_a_kernel_that_spills_is_found() -> None:
    launch = gpu_compile.launches(CASE)[0]
    large = launch._replace(constants={**launch.constants, "TILE_VALUES": 512})
    assert gpu_compile.compiled(launch, "sm_90")["spilled"] == 0
    assert gpu_compile.compiled(large, "sm_90")["spilled"] > 0


def test_the_result_is_stored_and_a_spill_is_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"kernel": "apply", "case": CASE.name, "target": "sm_90", "registers": 40, "spilled": 0, "shared": 0}
    entry["load"] = 16
    monkeypatch.setattr(gpu_compile, "facts", lambda cases, targets: iter([entry]))
    out = tmp_path / "facts.json"
    assert gpu_compile.main(["--out", str(out)]) == 0
    stored = json.loads(out.read_text())
    assert stored["kernels"] == [entry]
    assert stored["versions"]["triton"]
    assert "1 kernels compiled, 0 of them spill" in capsys.readouterr().out
    monkeypatch.setattr(gpu_compile, "facts", lambda cases, targets: iter([{**entry, "spilled": 8}]))
    assert gpu_compile.main([]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "together"),
    [
        (Case((64, 512, 7, 7), "contiguous", "bfloat16", "bn+silu"), False),
        (Case((32, 128, 14, 14), "channels_last", "bfloat16", "bn+silu"), True),
    ],
    ids=["whole channels", "shared channels"],
)
def test_tensors_in_registers_do_not_spill(case: Case, together: bool) -> None:
    launched = gpu_compile.launches(case)[:2]
    assert [launch.registers is not None for launch in launched] == [together] * 2
    found = list(gpu_compile.facts([case], ["sm_90"]))
    assert [entry["kernel"] for entry in found[:2]] == ["resident_forward", "resident_backward"]
    assert {entry["spilled"] for entry in found} == {0}
    if together:
        assert all(entry["registers"] <= 128 for entry in found[:2])


@pytest.mark.slow
@pytest.mark.parametrize("case", [SLICES, Case((256, 256, 14, 14), "channels_last", "bfloat16", "bn+silu")])
def test_programs_that_wait_for_each_other_leave_each_other_room(case: Case) -> None:
    launched = [launch for launch in gpu_compile.launches(case) if launch.registers]
    assert [launch.kernel.fn.__name__ for launch in launched] == ["rounds_forward", "rounds_backward"]
    for launch in launched:
        found = gpu_compile.compiled(launch, "sm_90")
        assert found["spilled"] == 0
        assert found["registers"] * 32 * launch.warps * COOPERATIVE_PROGRAMS_PER_SM <= 65536


@pytest.mark.slow
def test_what_is_compiled_ahead_is_what_a_launch_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own launcher, stored that an H100 is there and stopped before the launch, arrives at the same code."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    found = SimpleNamespace(
        get_current_target=lambda: GPUTarget(*gpu_compile.TARGETS["sm_90"]),
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
    )
    built = []
    compile_ahead = triton.compile
    monkeypatch.setattr(triton, "compile", lambda *how, **rest: built.append(compile_ahead(*how, **rest)) or built[-1])
    monkeypatch.setattr(driver, "_active", found)  # set_active's undoing asks for a driver that is there
    launched = gpu_compile.launches(CASE)[:3] + [la for la in gpu_compile.launches(SLICES) if la.registers][:1]
    for launch in launched:
        gpu_compile.compiled(launch, "sm_90")
        options = {**OPTIONS, "num_warps": launch.warps, **cooperative_options(launch.registers, hip=False)}
        launched = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.constants, **options)
        assert launched.asm["ptx"] == built[-1].asm["ptx"]
    assert len(built) == 4


PASSES = ["reduce_moments", "apply", "reduce_sums", "apply_gradient"]


@pytest.mark.parametrize(
    ("can_cooperate", "launched"), [(True, ["rounds_forward", "rounds_backward"]), (False, PASSES)]
)
@pytest.mark.parametrize("residual", [True, False], ids=["residual", ""])
def test_a_training_step_asks_the_device_for_nothing(
    residual: bool, can_cooperate: bool, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors without memory have no value to wait for: asked for one, they raise."""
    recording = gpu_compile.Recording(can_cooperate)
    choice = kernels.Choice(GpuKernel(recording), "a test", differentiable=False)
    monkeypatch.setattr(kernels, "choose", lambda x, *how, **rest: choice)
    layer = bn.BatchNorm2d(64, act="relu", device="meta")
    x = torch.empty(256, 64, 28, 28, device="meta").requires_grad_()
    layer(x, x if residual else None).sum().backward()
    names = [launch.kernel.fn.__name__ for launch in recording.launches]
    assert names == launched
    with pytest.raises(RuntimeError, match="meta"):
        float(x.sum())
