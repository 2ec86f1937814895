"""Which kernel runs a tensor: 'cpu' where the compiled loops are worth it, 'aten' with the reason everywhere else."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import batchnorm as bn
from batchnorm import kernels
from batchnorm.kernels.contract import UnavailableError
from batchnorm.kernels.cpu import compiler, cost, machine
from batchnorm.kernels.gpu import plan

LARGE = (64, 32, 28, 28)
LARGER = (64, 64, 28, 28)


@pytest.mark.parametrize(
    "x",
    [
        torch.empty(LARGE),
        torch.empty(LARGE, dtype=torch.bfloat16),
        torch.empty(LARGE, dtype=torch.float64),
        torch.empty(LARGE, dtype=torch.float16),
        torch.empty(1000, 3, 200),
        torch.empty(64, 128, 28, 28).contiguous(memory_format=torch.channels_last),
        torch.empty(8, 64, 16, 28, 28).contiguous(memory_format=torch.channels_last_3d),
        torch.empty(131072, 64),
        torch.empty(64, 32, 500),
    ],
    ids=lambda x: f"{tuple(x.shape)}-{x.dtype}-{x.stride()}",
)
def test_large_dense_tensors_run_on_the_compiled_loops(x: torch.Tensor) -> None:
    choice = bn.kernels.choose(x)
    assert choice.name == "cpu"
    assert "compiled loops" in choice.why


@pytest.mark.parametrize(
    ("x", "why"),
    [
        (torch.empty(6, 100), "so small that the call would cost more than the loops save"),
        (torch.empty(LARGE, dtype=torch.complex64), "not torch.complex64"),
        (torch.empty(LARGE, device="meta"), "device 'meta'"),
        (torch.empty(64, 64, 28, 28)[:, ::2], "neither contiguous nor channels_last"),
        (torch.empty(900_000), "(N, C, *)"),
        (torch.empty(LARGE).to_sparse(), "dense"),
    ],
    ids=[
        "small",
        "complex",
        "meta",
        "sliced",
        "1d",
        "sparse",
    ],
)
def test_everything_else_runs_on_pytorchs_operators_with_a_reason(x: torch.Tensor, why: str) -> None:
    choice = bn.kernels.choose(x)
    assert choice.name == "aten"
    assert why in choice.why


def test_inference_has_another_estimate_than_training() -> None:
    small, large = torch.empty(8, 32, 14, 14), torch.empty(64, 128, 28, 28)
    assert [bn.kernels.choose(small, training).name for training in (True, False)] == ["cpu", "aten"]
    assert "so small" in bn.kernels.choose(small, training=False).why
    assert bn.kernels.choose(large, training=False).name == "cpu"
    assert bn.kernels.choose(large, training=False, fused=False).name == "aten"
    assert bn.kernels.choose(large, training=True, fused=False).name == "cpu"


def test_a_layer_asks_for_its_own_mode_and_epilogue(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[bool, ...]] = []
    monkeypatch.setattr(kernels, "choose", lambda x, *how: asked.append(how) or kernels._by_aten("a test"))
    x = torch.randn(2, 32, 4, 4)
    bn.BatchNorm2d(32)(x)
    bn.BatchNorm2d(32).eval()(x, residual=x)
    bn.BatchNorm2d(32, act="relu").eval()(x)
    assert asked == [(True, False, False), (False, True, False), (False, True, False)]


def test_the_choice_follows_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower its memory, the more the loops save."""
    x = torch.empty(64, 64, 28, 28)
    for speed, name in ((1e9, "cpu"), (1e15, "aten")):
        rates = (machine.Rate(1 << 20, speed, speed),)
        monkeypatch.setattr(cost, "facts", lambda rates=rates: replace(machine.DEFAULTS, bandwidth=rates))
        cost._gain.cache_clear()
        assert bn.kernels.choose(x, training=False).name == name
    cost._gain.cache_clear()


def test_tapped_calls_run_on_the_loops_at_any_size() -> None:
    small = torch.empty(4, 3, 2)
    assert bn.kernels.choose(small).name == "aten"
    assert bn.kernels.choose(small, tapped=True).name == "cpu"
    assert bn.kernels.choose(small.half(), tapped=True).name == "cpu"


def test_float16_needs_a_processor_that_converts_it(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.empty(LARGE, dtype=torch.float16)
    monkeypatch.setattr(compiler, "converts_float16", lambda: False)
    assert bn.kernels.choose(x).name == "aten"
    assert "does not convert float16" in bn.kernels.choose(x).why
    assert bn.kernels.choose(x.float()).name == "cpu"


def test_a_kernel_that_cannot_run_here_is_disabled_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "disabled", {})
    x = torch.randn(LARGE)
    assert kernels.choose(x).name == "cpu"
    with pytest.warns(RuntimeWarning, match="slower but right: no paper today: buy some"):
        kernels.disable(kernels._CPU, UnavailableError("no paper today: buy some"))
    kernels.disable(kernels._CPU, UnavailableError("no ink either"))  # a second warning would be an error
    choice = kernels.choose(x)
    assert choice.name == "aten"
    assert "no paper today" in choice.why


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor that says it is on a GPU, and is nowhere."""
    with FakeTensorMode():
        return torch.empty(shape, dtype=dtype, device="cuda")


def enable_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "ENABLED", True)
    monkeypatch.setattr(plan, "_HAS_TRITON", True)


@pytest.mark.slow
def test_the_gpu_kernels_are_used_where_they_are_asked_for() -> None:
    choice = bn.kernels.choose(on_gpu(*LARGER))
    assert choice.name == "aten"
    assert "BATCHNORM_GPU_KERNELS=1" in choice.why
    assert not kernels.compiled(on_gpu(*LARGER))
    ask = "import torch; from batchnorm.kernels.gpu import plan; print(plan.ENABLED)"
    for value, said in (("1", "True"), ("0", "False"), ("", "False")):
        environment = {**os.environ, "BATCHNORM_GPU_KERNELS": value}
        done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == said


def test_a_tensor_on_a_gpu_runs_on_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    enable_gpu_kernels(monkeypatch)
    monkeypatch.setattr(kernels, "disabled", {"cpu": "no paper today"})
    for x in (on_gpu(*LARGER), on_gpu(*LARGER).to(memory_format=torch.channels_last), on_gpu(2**16, 64).bfloat16()):
        assert bn.kernels.choose(x).name == "gpu"
        assert kernels.compiled(x)
        assert "Triton" in bn.kernels.choose(x).why
    for x, why in (
        (on_gpu(*LARGE), "less than 8 MiB"),
        (on_gpu(*LARGER, dtype=torch.float64), "not torch.float64"),
        (on_gpu(64, 28, 64, 28).transpose(1, 2), "neither contiguous nor channels_last"),
        (on_gpu(9_000_000), "(N, C, *)"),
    ):
        assert bn.kernels.choose(x).name == "aten"
        assert why in bn.kernels.choose(x).why
    assert bn.kernels.choose(on_gpu(*LARGER), training=False, fused=False).name == "aten"
    assert bn.kernels.choose(on_gpu(*LARGE), tapped=True).name == "gpu"


def test_a_compiled_graph_can_ask_without_a_break(monkeypatch: pytest.MonkeyPatch) -> None:
    enable_gpu_kernels(monkeypatch)

    def plus_one_where_covered(x: torch.Tensor) -> torch.Tensor:
        return x + (1 if plan.why_unsupported(x, True, True) is None else 0)

    compiled = torch.compile(plus_one_where_covered, fullgraph=True, backend="eager")
    for x in (torch.zeros(LARGER), torch.zeros(LARGER).contiguous(memory_format=torch.channels_last)):
        assert (compiled(x) == 1).all()
    assert (compiled(torch.zeros(LARGE)) == 0).all()
    assert (compiled(torch.zeros(LARGER).transpose(2, 3)) == 0).all()


def test_without_triton_a_tensor_on_a_gpu_runs_on_pytorchs_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    enable_gpu_kernels(monkeypatch)
    monkeypatch.setattr(plan, "_HAS_TRITON", False)
    choice = bn.kernels.choose(on_gpu(*LARGER))
    assert choice.name == "aten"
    assert "pip install triton" in choice.why


def test_a_gpu_kernel_that_is_disabled_leaves_the_cpu_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    enable_gpu_kernels(monkeypatch)
    monkeypatch.setattr(kernels, "disabled", {})
    with pytest.warns(RuntimeWarning, match="no such target"):
        kernels.disable(kernels._GPU, UnavailableError("no such target"))
    assert bn.kernels.choose(on_gpu(*LARGER)).name == "aten"
    assert not kernels.compiled(on_gpu(*LARGER))
    assert "no such target" in bn.kernels.choose(on_gpu(*LARGER)).why
    assert bn.kernels.choose(torch.empty(LARGE)).name == "cpu"


def test_without_a_shared_team_the_loops_decline(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one thread of several they would be slower than PyTorch's operators, and `why` would not say so."""
    x = torch.empty(64, 16, 64, 64)
    assert bn.kernels.choose(x).name == "cpu"
    monkeypatch.setattr("batchnorm.kernels.cpu.threads.parallel_function", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert bn.kernels.choose(x).name == "aten"
    assert "GOMP_parallel" in bn.kernels.choose(x).why
    recorded = bn.kernels.choose(x, tapped=True)
    assert recorded.name == "cpu", "PyTorch's operators would need a dozen calls"
    assert "on one thread, since PyTorch's OpenMP runtime has no GOMP_parallel" in recorded.why
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert bn.kernels.choose(x).name == "cpu", "one thread is all there is"


@pytest.mark.parametrize("name", kernels._MOVED)
def test_a_moved_module_still_has_its_old_name(name: str) -> None:
    with pytest.warns(DeprecationWarning, match=rf"batchnorm.kernels.{name} is batchnorm.kernels..* since 0.2"):
        module = getattr(kernels, name)
    assert module is importlib.import_module(f"batchnorm.kernels.{kernels._MOVED[name]}")
    with pytest.raises(AttributeError, match="has no attribute 'cpu_work'"):
        kernels.cpu_work  # noqa: B018
