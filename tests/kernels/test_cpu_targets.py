"""Other processors: AVX2 code runs here and is right; code for Arm is compiled and has vector instructions."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from llvmlite import binding

from batchnorm.kernels.cpu._codegen import tiles
from batchnorm.kernels.cpu.plan import Variant

WITH_AVX2 = """
    from llvmlite import binding
    every = binding.get_host_cpu_features()
    for name in list(every):
        every[name] = every[name] and not name.startswith(("avx512", "avx10", "amx"))
    binding.get_host_cpu_features = lambda: every
    binding.get_host_cpu_name = lambda: "haswell"
    from test_contract import check, make_case
    from batchnorm.kernels.cpu import kernel
    ours = kernel.CpuKernel()
    import torch
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for layout in ("NC", "NCHW", "NHWC", "long slices", "many channels"):
            check(ours, make_case(layout, dtype, residual=True, act="relu"))
            check(ours, make_case(layout, dtype, act="gelu"))
    print("right")
"""


@pytest.mark.slow
@pytest.mark.skipif(not binding.get_host_cpu_features().get("avx2"), reason="this processor has no AVX2")
def test_code_for_avx2_is_right(tmp_path: Path) -> None:
    here = Path(__file__).parent
    path = os.pathsep.join(map(str, (here.parent, here)))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WITH_AVX2)],
        env={**os.environ, "BATCHNORM_CACHE": str(tmp_path), "PYTHONPATH": path},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "right", done.stderr


def compiled_for(triple: str, processor: str, assembly: str) -> str:
    """The assembly of a processor, as `compiler._emit` would make it there."""
    binding.initialize_all_targets()
    binding.initialize_all_asmprinters()
    module = binding.parse_assembly(re.sub(r'target triple = ".*"', f'target triple = "{triple}"', assembly))
    machine = binding.Target.from_triple(triple).create_target_machine(
        cpu=processor, opt=3, reloc="pic", codemodel="small"
    )
    passes = binding.create_pass_builder(machine, binding.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    return str(machine.emit_assembly(module))


@pytest.mark.parametrize("by_columns", [False, True])
@pytest.mark.parametrize("backward", [False, True])
def test_code_for_arm_computes_in_vectors(backward: bool, by_columns: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    triple = "aarch64-unknown-linux-gnu"
    monkeypatch.setattr(binding, "get_process_triple", lambda: triple)
    monkeypatch.setattr(binding, "get_host_cpu_features", lambda: {"neon": True})
    code = compiled_for(triple, "neoverse-n1", tiles.assembly(Variant(backward, 0, "relu", "x", by_columns)))
    assert len(re.findall(r"\bfmla\s+v\d+\.4s", code)) >= 8, "multiply and add of four floats"
    assert len(re.findall(r"\bf(?:add|mla)\s+v\d+\.2d", code)) >= 8, "sums in float64"
    assert not re.search(r"\bbl\s+(?!mem)\w", code), "no call of a function that would have to exist"
