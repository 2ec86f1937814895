"""The machine code of the CPU loops: from the cache, or compiled now and stored there for every later process.

Numba compiles (in a second or two); what it compiled needs nothing of Numba to run, so that a later process loads it
with llvmlite alone, in some hundredths of a second. A file holds the code of one variant for one kind of processor.

Whoever can write into the folder can run code in this process: it must be this user's, and writable by nobody else.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from batchnorm.kernels.contract import UnavailableError

_COMPILED_FROM = (
    "_codegen/memory.py",
    "_codegen/activations.py",
    "_codegen/loops.py",
    "_codegen/tiles.py",
    "plan.py",
    "compiler.py",
)
_DIGEST = hashlib.sha256().digest_size
# Numba's functions take where to put a result and an exception first; these have neither.
_ENTRY = """
declare i32 @"{0}"(ptr, ptr, i64)
define void @work(i64 %job) {{
  %result = alloca ptr
  %exception = alloca ptr
  %status = call i32 @"{0}"(ptr %result, ptr %exception, i64 %job)
  ret void
}}
"""
_lock = threading.RLock()
_held: list[Any] = []
_engines: list[Any] = []


class Variant(NamedTuple):
    """What is compiled in, so that the loops do not ask; `_codegen.tiles.forward` and `backward` say what each is."""

    backward: bool
    kind: int
    act: str | None
    source: str
    by_columns: bool
    energy: bool = False


def folder() -> Path:
    """Where compiled code is kept: $BATCHNORM_CACHE, or batchnorm in the user's cache folder."""
    chosen = os.environ.get("BATCHNORM_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchnorm"


@cache
def address(variant: Variant) -> int:
    """The address of a variant's machine code, `void work(int64 address of the job)`.

    Raises UnavailableError where it can neither be loaded nor compiled and stored.
    """
    with _lock:
        try:
            path = _private(folder()) / f"{_key(variant)}.o"
            stored = _read(path)
            if stored is None:
                stored = _compile(variant)
                _write(path, stored)
            return _load(stored)
        except UnavailableError:
            raise
        except ImportError as error:
            raise UnavailableError(f"{error.name or error} cannot be imported: pip install numba") from error
        except OSError as error:
            raise UnavailableError(
                f"compiled code cannot be kept in {folder()} ({error.strerror or error}): "
                "set BATCHNORM_CACHE to a folder that can be written to"
            ) from error
        except Exception as error:  # a Numba or LLVM that does not know this processor, or each other
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise UnavailableError(
                f"the CPU kernels cannot be compiled here ({type(error).__name__}: {reason}): try another numba"
            ) from error


def _hold_compilers() -> None:
    """Before fork(): wait until no thread compiles, so that no lock is held for ever in the child."""
    _lock.acquire()
    numba = sys.modules.get("numba.core.compiler_lock")
    if numba is not None:
        numba.global_compiler_lock.acquire()
    _held.append(numba)


def _let_compilers_go() -> None:
    if not _held:  # imported while the fork waited for others: nothing was held before
        return
    numba = _held.pop()
    if numba is not None:
        numba.global_compiler_lock.release()
    _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_hold_compilers, after_in_parent=_let_compilers_go, after_in_child=_let_compilers_go)


def _private(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        found = path.stat()
        if found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise UnavailableError(
                f"{path}, where compiled code is kept, can be written to by others: "
                "set BATCHNORM_CACHE to a folder of your own (chmod 700)"
            )
    return path


@cache
def _sources() -> str:
    here = Path(__file__).parent
    return hashlib.sha256(b"\0".join((here / name).read_bytes() for name in _COMPILED_FROM)).hexdigest()


@cache
def _machine() -> str:
    import llvmlite
    from llvmlite import binding

    features = binding.get_host_cpu_features().flatten()
    return "|".join((llvmlite.__version__, binding.get_process_triple(), binding.get_host_cpu_name(), features))


def _key(variant: Variant) -> str:
    return hashlib.sha256(f"{_sources()}|{_machine()}|{tuple(variant)}".encode()).hexdigest()[:32]


def _read(path: Path) -> bytes | None:
    """What was stored, or None where nothing was, or not all of it."""
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return None
    whole = hashlib.sha256(stored[_DIGEST:]).digest() == stored[:_DIGEST]
    return stored[_DIGEST:] if whole else None


def _write(path: Path, compiled: bytes) -> None:
    """Whole and renamed, so that no process ever reads a part."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        unfinished.write_bytes(hashlib.sha256(compiled).digest() + compiled)
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def _compile(variant: Variant) -> bytes:
    """The name of the compiled function, a zero byte, and an object file that needs nothing of Python to run."""
    import numba
    from numba.core import compiler, registry
    from numba.core.compiler_lock import global_compiler_lock

    if numba.config.DISABLE_JIT:
        raise UnavailableError("NUMBA_DISABLE_JIT is set: unset it")
    from batchnorm.kernels.cpu._codegen import tiles

    backward, kind, act, source, by_columns, energy = variant
    if backward:
        function = tiles.backward(kind, act, source, by_columns, energy)
    else:
        function = tiles.forward(kind, act, source, by_columns)
    flags = compiler.Flags()
    flags.no_cpython_wrapper = flags.no_cfunc_wrapper = True
    flags.error_model = "numpy"
    typing, target = registry.cpu_target.typing_context, registry.cpu_target.target_context
    with global_compiler_lock:
        # Numba would optimize each of the functions that it inlines by itself first, which takes half of the time.
        level = numba.config.OPT
        numba.config.OPT = type(level)(0)
        try:
            compiled = compiler.compile_extra(typing, target, function, (numba.int64,), numba.void, flags, {})
        finally:
            numba.config.OPT = level
    symbol: str = compiled.fndesc.llvm_func_name
    return symbol.encode() + b"\0" + _emit(compiled.library.get_llvm_str())


def _emit(assembly: str) -> bytes:
    """Optimized machine code. Its addresses are short: in Numba's own every constant takes ten bytes to name."""
    from llvmlite import binding

    module, machine = binding.parse_assembly(assembly), _target_machine()
    tuning = binding.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = True
    passes = binding.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(module, passes)
    return bytes(machine.emit_object(module))


def _target_machine() -> Any:
    from llvmlite import binding

    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    name, features = binding.get_host_cpu_name(), binding.get_host_cpu_features().flatten()
    target = binding.Target.from_default_triple()
    return target.create_target_machine(cpu=name, features=features, opt=3, reloc="pic", codemodel="small")


def _load(stored: bytes) -> int:
    from llvmlite import binding

    symbol, code = stored.split(b"\0", 1)
    machine = _target_machine()
    for name in ("memset", "memcpy", "memmove"):  # all that compiled loops call
        if binding.address_of_symbol(name) is None:
            function = getattr(ctypes.CDLL(None), name)
            binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    engine = binding.create_mcjit_compiler(binding.parse_assembly(_ENTRY.format(symbol.decode())), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)  # the code lives as long as its engine
    return int(engine.get_function_address("work"))
