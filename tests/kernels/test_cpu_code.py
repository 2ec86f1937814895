"""Machine code in the cache: compiled once, loaded without Numba, never trusted when others could have written it."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from batchnorm.kernels.contract import UnavailableError
from batchnorm.kernels.cpu import compiler
from batchnorm.kernels.cpu._codegen import tiles
from batchnorm.kernels.cpu.plan import Variant
from randomness import SEED

FORWARD = "forward", lambda: tiles.assembly(Variant(False, 0, "relu", "x", False))


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("BATCHNORM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def python(code: str, folder: Path | str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own whose compiled code lies in the folder."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "BATCHNORM_CACHE": str(folder), **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


STEP = """
    import sys, warnings
    {before}
    import torch, batchnorm as bn
    x = torch.randn(64, 16, 28, 28, generator=torch.Generator().manual_seed(1))
    layer = bn.BatchNorm2d(16, act="relu")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            y = layer(x.requires_grad_())
            y.sum().backward()
    right = torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True))
    assert torch.allclose(y, right, atol=1e-5)
    compiled = "batchnorm.kernels.cpu._codegen.tiles" in sys.modules
    print(bn.kernels.choose(x).name, compiled, *(str(w.message) for w in caught), sep="|")
"""


FAILING = """
    import importlib
    def fail(*_, **__): raise ZeroDivisionError("no luck\\nand more")
    setattr(importlib.import_module("{}"), "{}", fail)
"""

FORKING = """
    import os, threading, time
    import torch, batchnorm as bn
    from batchnorm.kernels.cpu import compiler
    x = torch.randn(16, 32, 64, 64)
    compiling, compile_one = threading.Event(), compiler._emit
    def noted(assembly):
        compiling.set()
        return compile_one(assembly)
    compiler._emit = noted
    thread = threading.Thread(target=lambda: bn.BatchNorm2d(32, act="silu")(x))
    thread.start()
    compiling.wait()
    time.sleep({delay})
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        y = bn.BatchNorm2d(32, act="relu")(x)
        right = torch.relu(torch.nn.functional.batch_norm(x, None, None, training=True))
        os._exit(0 if torch.allclose(y, right, atol=1e-5) else 3)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    thread.join()
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork() on this system")
@pytest.mark.parametrize("delay", [0.0, 0.3])
def test_a_child_forked_while_another_thread_compiles_goes_on(delay: float, tmp_path: Path) -> None:
    """A lock that the other thread holds would never be released in the child."""
    done = python(FORKING.format(delay=delay), tmp_path)
    assert done.stdout.strip() == "0", done.stderr


def test_a_fork_that_began_before_these_handlers_were_there_ends() -> None:
    """Another package's handler may wait until this module is imported: then only those after the fork are run."""
    compiler._unlock_compilers()


@pytest.mark.slow
def test_the_first_process_compiles_and_the_second_only_loads(tmp_path: Path) -> None:
    for is_compiled in ("True", "False"):
        done = python(STEP.format(before=""), tmp_path)
        assert done.stdout.strip() == f"cpu|{is_compiled}", done.stderr
    assert len(list(tmp_path.glob("*.o"))) == 3, "forward, backward, and what the machine is measured with"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "folder", "before", "said"),
    [
        ("a folder that cannot be made", "/dev/null/cache", "", "set BATCHNORM_CACHE to a writable folder"),
        ("no llvmlite", "", "sys.modules['llvmlite'] = None", "pip install llvmlite"),
        (
            "a generator that fails",
            "",
            FAILING.format("batchnorm.kernels.cpu._codegen.tiles", "assembly"),
            "ZeroDivisionError: no luck",
        ),
        ("an LLVM that fails", "", FAILING.format("llvmlite.binding", "parse_assembly"), "cannot be compiled here"),
        ("no processor known", "", FAILING.format("llvmlite.binding", "get_host_cpu_name"), "try another llvmlite"),
    ],
)
def test_without_compiled_code_pytorchs_operators_run_and_one_warning_says_why(
    what: str, folder: str, before: str, said: str, tmp_path: Path
) -> None:
    done = python(STEP.format(before=before), folder or tmp_path)
    name, _, *warned = done.stdout.strip().split("|")
    assert name == "aten", done.stderr
    assert len(warned) == 1
    assert said in warned[0]


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files on this system")
def test_a_folder_that_others_can_write_to_is_not_trusted(cache_folder: Path) -> None:
    cache_folder.mkdir()
    cache_folder.chmod(0o777)
    with pytest.raises(UnavailableError, match="can be written to by others: set BATCHNORM_CACHE"):
        compiler._stored_address(*FORWARD)
    assert list(cache_folder.iterdir()) == []


def test_a_new_folder_is_the_users_alone(cache_folder: Path) -> None:
    compiler._private(cache_folder)
    if hasattr(os, "getuid"):
        assert cache_folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.slow
@pytest.mark.parametrize(
    "spoil", [lambda code: b"", lambda code: code[:-100], lambda code: code[:50] + b"x" + code[51:]]
)
def test_a_spoiled_file_is_compiled_again(spoil: object, cache_folder: Path) -> None:
    assert compiler._stored_address(*FORWARD)
    (stored,) = cache_folder.iterdir()
    whole = stored.read_bytes()
    stored.write_bytes(spoil(whole))
    assert compiler._stored_address(*FORWARD)
    assert stored.read_bytes() != spoil(whole)
    assert compiler._read(stored) is not None


ASSEMBLY = """
define void @work(i64 %job) {
  %at = inttoptr i64 %job to ptr
  %old = load i64, ptr %at
  %new = add i64 %old, ADDED
  store i64 %new, ptr %at
  ret void
}
"""


def adding_41() -> str:
    return ASSEMBLY.replace("ADDED", "41")


def result_of(address: int) -> int:
    """What the code makes of 1."""
    job = ctypes.c_int64(1)
    ctypes.CFUNCTYPE(None, ctypes.c_int64)(address)(ctypes.addressof(job))
    return job.value


def test_assembly_is_compiled_once_and_then_loaded(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "_addresses", {})
    address = compiler.address_of("adding", adding_41)
    assert result_of(address) == 42
    (stored,) = cache_folder.iterdir()
    monkeypatch.setattr(compiler, "_emit", lambda assembly: pytest.fail("it is compiled again"))
    assert compiler.address_of("adding", adding_41) == address, "in this process"
    monkeypatch.setattr(compiler, "_addresses", {})
    assert result_of(compiler.address_of("adding", adding_41)) == 42, "from the file"
    assert list(cache_folder.iterdir()) == [stored]


SCATTERED = """
    import mmap, random
    from batchnorm.kernels.cpu import compiler
    from batchnorm.kernels.cpu._codegen import tiles
    from batchnorm.kernels.cpu.plan import Variant
    code = compiler._emit(tiles.assembly(Variant(False, 0, "relu", "x", False)))
    draw, blocks = random.Random({seed}), []
    for number in range(200):
        blocks.append(mmap.mmap(-1, draw.choice([1 << 12, 1 << 13, 1 << 16])))
        if number % 10 == 0:
            blocks.append(mmap.mmap(-1, 1 << 30))
        if number % 3 == 0 and len(blocks) > 20:
            blocks.pop(draw.randrange(len(blocks) - 5)).close()
        assert compiler._load(code)
    print("loaded")
"""


def test_code_is_loaded_where_free_memory_is_scattered(tmp_path: Path) -> None:
    """LLVM would place code and its constants in two holes, gigabytes apart, and abort."""
    done = python(SCATTERED.format(seed=SEED), tmp_path)
    assert done.stdout.strip() == "loaded", done.stderr


def test_wrong_assembly_is_reported_and_not_stored(cache_folder: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot be compiled here"):
        compiler.address_of("wrong", lambda: "define nothing")
    assert "wrong" not in compiler._addresses
    assert list(cache_folder.iterdir()) == []


def test_a_full_disk_leaves_no_file_and_is_reported(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UnavailableError, match="No space left on device"):
        compiler._stored_address(*FORWARD)
    assert list(cache_folder.iterdir()) == []


@pytest.mark.slow
def test_processes_that_compile_at_once_do_not_disturb_each_other(tmp_path: Path) -> None:
    code = textwrap.dedent(STEP.format(before=""))
    environment = {**os.environ, "BATCHNORM_CACHE": str(tmp_path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    found = {child.communicate(timeout=120)[0].strip() for child in running}
    assert "cpu|True" in found
    assert found <= {"cpu|True", "cpu|False"}, "False where one came so late that it found what another had stored"
    assert {path.suffix for path in tmp_path.iterdir()} == {".o", ".json"}, "code, and the facts of the machine"


def test_the_folder_is_the_users_cache_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BATCHNORM_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert compiler.folder() == Path("/somewhere/batchnorm")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert compiler.folder() == Path.home() / ".cache" / "batchnorm"


def test_code_is_stored_per_name_sources_and_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = {compiler._key("one"), compiler._key("other")}
    monkeypatch.setattr(compiler, "processor", lambda: "another machine")
    keys.add(compiler._key("one"))
    monkeypatch.setattr(compiler, "sources_hash", lambda: "other sources")
    keys.add(compiler._key("one"))
    assert len(keys) == 4


ROUNDING = """
    import torch
    from llvmlite import binding
    known = binding.get_host_cpu_features()
    known["avx512bf16"] = bool(known.get("avx512bf16")) and {hardware}
    binding.get_host_cpu_features = lambda: known
    from batchnorm.kernels.contract import Epilogue
    from batchnorm.kernels.cpu.kernel import CpuKernel
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16)
    x = torch.cat((every, every))[: 2 * 65519].view(2, 1, 65519)  # an odd length: lines, and single values at both ends
    zero, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    gamma = torch.tensor([0.7])
    y = CpuKernel().normalize(x, zero, one, Epilogue(gamma=gamma))
    right = (x.float() * gamma).to(torch.bfloat16)
    tiny = right.float().abs() < torch.finfo(torch.float32).tiny  # the instruction takes these for 0
    assert torch.equal(y.isnan(), right.isnan())
    assert torch.equal(y[~right.isnan() & ~tiny], right[~right.isnan() & ~tiny])
    assert bool((y[tiny].float().abs() < torch.finfo(torch.float32).tiny).all())
"""


@pytest.mark.slow
@pytest.mark.parametrize("hardware", [True, False], ids=["by its instruction, if there", "by integers"])
def test_bfloat16_is_rounded_to_nearest_even_on_every_processor(hardware: bool, tmp_path: Path) -> None:
    done = python(ROUNDING.format(hardware=hardware), tmp_path)
    assert done.returncode == 0, done.stderr
