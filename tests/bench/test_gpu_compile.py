"""The GPU kernels compile for every target ahead of time, and keep to their registers."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import batchnorm as bn
from batchnorm import kernels
from batchnorm.bench import gpu_compile
from batchnorm.bench.cases import Case
from batchnorm.kernels.gpu import GpuKernel
from batchnorm.kernels.gpu_plan import OPTIONS

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
CASE = Case((256, 64, 56, 56), "channels_last", "bfloat16", "bn+add+relu")


@pytest.fixture(autouse=True)
def _cache_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


@pytest.mark.parametrize("target", gpu_compile.TARGETS)
def test_a_training_step_compiles_without_spills(target: str) -> None:
    found = list(gpu_compile.facts([CASE], [target]))
    assert [entry["kernel"] for entry in found[:4]] == ["reduce_moments", "apply", "reduce_sums", "apply_gradient"]
    assert {entry["target"] for entry in found} == {target}
    assert [entry for entry in found if entry["spilled"]] == []
    assert all(0 < entry["registers"] <= 256 for entry in found)


def test_slices_of_float32_compile_without_spills() -> None:
    found = list(gpu_compile.facts([Case((256, 64, 56, 56), "contiguous", variant="bn+silu")], ["sm_90"]))
    assert {entry["spilled"] for entry in found} == {0}


def test_a_kernel_that_spills_is_told() -> None:
    launch = gpu_compile.launches(CASE)[0]
    large = replace(launch, constants={**launch.constants, "TILE_VALUES": 512})
    assert gpu_compile.compiled(launch, "sm_90")["spilled"] == 0
    assert gpu_compile.compiled(large, "sm_90")["spilled"] > 0


def test_the_result_is_stored_and_a_spill_is_status_1(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {"kernel": "apply", "case": CASE.name, "target": "sm_90", "registers": 40, "spilled": 0, "shared": 0}
    monkeypatch.setattr(gpu_compile, "facts", lambda cases, targets: iter([entry]))
    out = tmp_path / "facts.json"
    assert gpu_compile.main(["--out", str(out)]) == 0
    told = json.loads(out.read_text())
    assert told["kernels"] == [entry]
    assert told["versions"]["triton"]
    assert "1 kernels compiled, 0 of them spill" in capsys.readouterr().out
    monkeypatch.setattr(gpu_compile, "facts", lambda cases, targets: iter([{**entry, "spilled": 8}]))
    assert gpu_compile.main([]) == 1


def test_what_is_held_in_registers_stays_there() -> None:
    case = Case((64, 512, 7, 7), "contiguous", "bfloat16", "bn+silu")
    found = list(gpu_compile.facts([case], ["sm_90"]))
    assert [entry["kernel"] for entry in found[:2]] == ["resident_forward", "resident_backward"]
    assert {entry["spilled"] for entry in found} == {0}


def test_what_is_compiled_ahead_is_what_a_launch_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own launcher, told that an H100 is there and stopped before the launch, arrives at the same code."""
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
    for launch in gpu_compile.launches(CASE)[:4]:
        gpu_compile.compiled(launch, "sm_90")
        options = {**OPTIONS, "num_warps": launch.warps}
        launched = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.constants, **options)
        assert launched.asm["ptx"] == built[-1].asm["ptx"]
    assert len(built) == 4


@pytest.mark.parametrize("residual", [True, False], ids=["residual", ""])
def test_a_training_step_asks_the_device_for_nothing(residual: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without memory have no value to wait for: asked for one, they raise."""
    recording = gpu_compile.Recording()
    choice = kernels.Choice(GpuKernel(recording), "a test", differentiable=False)
    monkeypatch.setattr(kernels, "choose", lambda x, *how, **rest: choice)
    layer = bn.BatchNorm2d(64, act="relu", device="meta")
    x = torch.empty(256, 64, 56, 56, device="meta").requires_grad_()
    layer(x, x if residual else None).sum().backward()
    names = [launch.kernel.fn.__name__ for launch in recording.launches]
    assert names == ["reduce_moments", "apply", "reduce_sums", "apply_gradient"]
    with pytest.raises(RuntimeError, match="meta"):
        float(x.sum())
