"""Compile the GPU kernels without a GPU, and print their registers and loads: `python tools/gpu_compile.py`.

The launches of training steps on meta tensors are recorded, and Triton compiles them ahead of time for each target.
Facts of a kernel:

    registers   of a thread (vector registers on AMD's GPUs)
    spilled     bytes of a thread's stack (on AMD's GPUs registers) of values that did not fit into registers
    shared      bytes of shared memory of a program
    load        bytes of the widest load from memory
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import batchnorm
from batchnorm.bench import record
from batchnorm.bench.cases import GPU_VARIANTS, Case
from batchnorm.kernels.contract import Epilogue, UnavailableError
from batchnorm.kernels.gpu.kernel import GpuKernel
from batchnorm.kernels.gpu.launch import Launch, Launcher, cooperative_options
from batchnorm.kernels.gpu.plan import OPTIONS
from batchnorm.running_stats import RunningUpdate

FORMAT = "batchnorm-gpu-compile"
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
PROCESSORS, CACHE = 132, 50 << 20
"""Multiprocessors and L2 bytes of the device that launches are planned for: an H100."""

SHAPES = (
    ((256, 64, 56, 56), "contiguous"),
    ((256, 256, 14, 14), "contiguous"),
    ((256, 512, 7, 7), "contiguous"),
    ((32, 128, 14, 14), "contiguous"),
    ((64, 512, 7, 7), "contiguous"),
    ((256, 64, 56, 56), "channels_last"),
    ((32, 128, 14, 14), "channels_last"),
    ((65536, 256), "rows"),
)
CASES = [
    *(
        Case(shape, layout, dtype, variant)
        for dtype in ("bfloat16", "float32")
        for shape, layout in SHAPES
        for variant in (*GPU_VARIANTS, "bn+silu")
    ),
    *(Case(shape, layout, "float16", "bn+relu") for shape, layout in SHAPES),
]
"""The main configurations: shapes of ResNet-50 at batch 256, some at 32 and 64, and rows."""

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32"}
_NVIDIA = re.compile(r"REG:(\d+) STACK:(\d+)")
_AMD = {"registers": r"\.vgpr_count:\s+(\d+)", "spilled": r"\.vgpr_spill_count:\s+(\d+)"}
_NVIDIA_LOAD = re.compile(r"ld\.global[\w.:]*?(?:\.v(\d))?\.b(\d+)")
_AMD_LOAD = re.compile(r"(?:global|buffer)_load_(?:dword(?:x(\d))?|(\w+))")


class Recording(Launcher):
    """Records launches and runs none of them."""

    def __init__(self, can_cooperate: bool = True) -> None:
        super().__init__()
        self.can_cooperate = can_cooperate
        self.launches: list[Launch] = []

    def processors(self, device: torch.device) -> int:
        return PROCESSORS

    def l2_bytes(self, device: torch.device) -> int:
        return CACHE

    def launch(self, device: torch.device, launch: Launch) -> None:
        self.launches.append(launch)


def launches(case: Case) -> list[Launch]:
    """The launches of a training step: of the fused pair, of the pair without cooperative launches, of the verbs."""
    formats = {"channels_last": torch.channels_last, "channels_last_3d": torch.channels_last_3d}
    memory_format = formats.get(case.layout, torch.contiguous_format)
    x = torch.empty(case.shape, dtype=getattr(torch, case.dtype), device="meta", memory_format=memory_format)
    gamma, beta, mean, rstd, *running = (torch.empty(case.shape[1], device="meta") for _ in range(6))
    epilogue = Epilogue(gamma, beta, x if case.residual else None, case.act)
    backward_epilogue = Epilogue(gamma, beta, None, case.act, y=x) if case.residual else epilogue
    arguments = x, x, mean, rstd, backward_epilogue
    cooperative, separate = Recording(), Recording(can_cooperate=False)
    for recording in (cooperative, separate):
        kernel = GpuKernel(recording)
        kernel.forward(x, 1e-5, epilogue, RunningUpdate(running[0], running[1], 0.1))
        kernel.backward(*arguments, case.values, energy=True)
    kernel.statistics(x)
    kernel.normalize(x, mean, rstd, epilogue)
    sums = kernel.reduce_grad(*arguments, energy=False)
    kernel.input_grad(*arguments, sums, case.values)
    return cooperative.launches + separate.launches


def compiled(launch: Launch, target: str) -> dict[str, int]:
    """The facts of one launch's kernel on a target. Raises UnavailableError without Triton."""
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise UnavailableError(f"Triton cannot be imported ({error}): install it with pip install triton") from error
    signature, constants, attributes = _specialized(launch)
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {**OPTIONS, "num_warps": launch.warps, **cooperative_options(launch.registers, target.startswith("gfx"))}
    built = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    nvidia = "cubin" in built.asm
    facts = _of_cubin(built.asm["cubin"]) if nvidia else _of_assembly(built.asm["amdgcn"])
    load = _nvidia_load(built.asm["ptx"]) if nvidia else _amd_load(built.asm["amdgcn"])
    return {**facts, "shared": built.metadata.shared, "load": load}


def facts(cases: Sequence[Case], targets: Sequence[str]) -> Iterator[dict[str, Any]]:
    """One entry for each distinct kernel and target, with the name of the first case that launches it."""
    seen = set()
    for case in cases:
        for launch in launches(case):
            signature, constants, attributes = _specialized(launch)
            name = launch.kernel.fn.__name__
            key = name, str(signature), str(constants), str(attributes), launch.warps, launch.registers
            if key in seen:
                continue
            seen.add(key)
            for target in targets:
                yield {
                    "kernel": name,
                    "case": case.name,
                    "target": target,
                    "warps": launch.warps,
                    **compiled(launch, target),
                }


def _specialized(launch: Launch) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes as Triton's own launcher would find them."""
    signature: dict[str, str] = {}
    constants = dict(launch.constants)
    attributes: dict[tuple[int], Any] = {}
    for index, (parameter, value) in enumerate(zip(launch.kernel.params, launch.arguments, strict=False)):
        name = parameter.name
        fixed = parameter.do_not_specialize
        if value is None or (type(value) is int and value == 1 and not fixed):
            constants[name] = value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            attributes[index,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if value < 2**31 else "i64"
            if value % 16 == 0 and not fixed:
                attributes[index,] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(constants, "constexpr")
    return {name: signature[name] for name in launch.kernel.arg_names}, constants, attributes


def _of_cubin(cubin: bytes) -> dict[str, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    match = _NVIDIA.search(usage)
    if match is None:
        raise UnavailableError(f"cuobjdump printed no register count: {usage.strip()!r}")
    return {"registers": int(match[1]), "spilled": int(match[2])}


def _of_assembly(assembly: str) -> dict[str, int]:
    return {name: int(re.findall(pattern, assembly)[-1]) for name, pattern in _AMD.items()}


def _nvidia_load(ptx: str) -> int:
    """Bytes of the widest load: words × bits."""
    return max((int(words or 1) * int(bits) // 8 for words, bits in _NVIDIA_LOAD.findall(ptx)), default=0)


def _amd_load(assembly: str) -> int:
    """Bytes of the widest load: words of 4 bytes, or 2 for a part of a word."""
    return max((2 if part else 4 * int(words or 1) for words, part in _AMD_LOAD.findall(assembly)), default=0)


def main(arguments: Sequence[str] | None = None) -> int:
    """Print every entry, store them with --out; exit status 1 if any kernel spills."""
    parser = argparse.ArgumentParser(prog="python tools/gpu_compile.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--target", choices=TARGETS, action="append", help="by default all")
    parser.add_argument("--out", type=Path, help="the file for the result; by default it is only printed")
    options = parser.parse_args(arguments)
    if options.out is not None:
        record.check_vacant(options.out, force=False)
    entries = []
    for entry in facts(CASES, options.target or list(TARGETS)):
        entries.append(entry)
        numbers = " ".join(f"{entry[name]:4d} {name}" for name in ("registers", "spilled", "shared", "load"))
        sys.stdout.write(f"{entry['target']:7} {entry['kernel']:17} {numbers}  {entry['case']}\n")
    spilling = sum(entry["spilled"] > 0 for entry in entries)
    sys.stdout.write(f"{len(entries)} kernels compiled, {spilling} of them spill\n")
    if options.out is not None:
        result = {
            "format": FORMAT,
            "schema": 1,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": "python tools/gpu_compile.py",
            "versions": {"batchnorm": batchnorm.__version__, **{name: version(name) for name in ("triton", "torch")}},
            "git": record.git(),
            "options": OPTIONS,
            "processors": PROCESSORS,
            "L2": CACHE,
            "kernels": entries,
        }
        record.store(result, options.out)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
