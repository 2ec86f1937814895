"""Machine code of the CPU loops: loaded from the cache, or compiled and stored there for later processes.

Numba compiles in a second or two. Compiled code does not need Numba: a later process loads it with llvmlite alone, in
some hundredths of a second. A file holds the code of one variant for one kind of processor.

Anyone who can write to the folder can run code in this process, so the user must own it and no other user may write.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import os
import sys
import threading
from collections.abc import Callable
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
# Numba's functions take pointers to a result and an exception first; these functions have neither.
_ENTRY = """
declare i32 @"{0}"(ptr, ptr, i64)
define void @work(i64 %job) {{
  %result = alloca ptr
  %exception = alloca ptr
  %status = call i32 @"{0}"(ptr %result, ptr %exception, i64 %job)
  ret void
}}
"""
_WORK = b"work"  # the symbol of code that needs no such entry
_lock = threading.RLock()
_addresses: dict[str, int] = {}
_locked: list[Any] = []
_engines: list[Any] = []


class Variant(NamedTuple):
    """The constants of one compiled function; see `_codegen.tiles.forward` and `backward`."""

    backward: bool
    kind: int
    act: str | None
    source: str
    by_columns: bool
    energy: bool = False


def folder() -> Path:
    """The folder of compiled code: $BATCHNORM_CACHE, or batchnorm in the user's cache folder."""
    chosen = os.environ.get("BATCHNORM_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchnorm"


@cache
def address(variant: Variant) -> int:
    """The address of a variant's machine code, `void work(int64 address of the job)`.

    Raises UnavailableError if the code can be neither loaded nor compiled and stored.
    """
    return _stored_address(lambda: _key(variant), lambda: _compile(variant))


def address_of(name: str, assembly: Callable[[], str]) -> int:
    """The address of the machine code of a function's LLVM assembly, which defines `void @work(i64)`.

    The name belongs to this assembly alone; the code is compiled again when a module in the function's folder changes.
    Raises UnavailableError as `address` does.
    """
    found = _addresses.get(name)
    if found is None:
        key = functools.partial(_assembly_key, name, Path(inspect.getfile(assembly)).parent)
        found = _addresses[name] = _stored_address(key, lambda: _WORK + b"\0" + _emit(assembly()))
    return found


def _stored_address(key: Callable[[], str], compile_code: Callable[[], bytes]) -> int:
    """Load the code that is stored under the key; compile and store it where there is no such file."""
    with _lock:
        try:
            path = _private(folder()) / f"{key()}.o"
            stored = _read(path)
            if stored is None:
                stored = compile_code()
                _write(path, stored)
            return _load(stored)
        except UnavailableError:
            raise
        except ImportError as error:
            raise UnavailableError(f"{error.name or error} cannot be imported: pip install numba") from error
        except OSError as error:
            raise UnavailableError(
                f"compiled code cannot be stored in {folder()} ({error.strerror or error}): "
                "set BATCHNORM_CACHE to a writable folder"
            ) from error
        except Exception as error:  # a Numba or LLVM that does not know this processor, or each other
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise UnavailableError(
                f"the CPU kernels cannot be compiled here ({type(error).__name__}: {reason}): try another numba"
            ) from error


def _lock_compilers() -> None:
    """Before fork(), wait until no thread compiles, so that no lock stays locked in the child."""
    _lock.acquire()
    numba = sys.modules.get("numba.core.compiler_lock")
    if numba is not None:
        numba.global_compiler_lock.acquire()
    _locked.append(numba)


def _unlock_compilers() -> None:
    if not _locked:  # imported while the fork waited for other handlers: nothing was locked
        return
    numba = _locked.pop()
    if numba is not None:
        numba.global_compiler_lock.release()
    _lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_lock_compilers, after_in_parent=_unlock_compilers, after_in_child=_unlock_compilers)


def _private(path: Path) -> Path:
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid"):
        status = path.stat()
        if status.st_uid != os.getuid() or status.st_mode & 0o022:
            raise UnavailableError(
                f"{path}, the folder of compiled code, can be written to by others: "
                "set BATCHNORM_CACHE to a folder of your own (chmod 700)"
            )
    return path


@cache
def sources_hash() -> str:
    """A hash of the modules that the loops are compiled from."""
    here = Path(__file__).parent
    return hashlib.sha256(b"\0".join((here / name).read_bytes() for name in _COMPILED_FROM)).hexdigest()


@cache
def processor() -> str:
    """What machine code depends on: LLVM's version, and the processor's name and instructions."""
    import llvmlite
    from llvmlite import binding

    features = binding.get_host_cpu_features().flatten()
    return "|".join((llvmlite.__version__, binding.get_process_triple(), binding.get_host_cpu_name(), features))


def _key(variant: Variant) -> str:
    return hashlib.sha256(f"{sources_hash()}|{processor()}|{tuple(variant)}".encode()).hexdigest()[:32]


def _assembly_key(name: str, folder: Path) -> str:
    sources = b"\0".join(path.read_bytes() for path in (*sorted(folder.glob("*.py")), Path(__file__)))
    return hashlib.sha256(f"{name}|{processor()}|".encode() + sources).hexdigest()[:32]


def _read(path: Path) -> bytes | None:
    """The stored code; None if the file is missing or damaged."""
    try:
        stored = path.read_bytes()
    except FileNotFoundError:
        return None
    is_complete = hashlib.sha256(stored[_DIGEST:]).digest() == stored[:_DIGEST]
    return stored[_DIGEST:] if is_complete else None


def _write(path: Path, compiled: bytes) -> None:
    write_atomically(path, hashlib.sha256(compiled).digest() + compiled)


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary file, then rename it: readers never see a partial file.

    Not `runs.run.write_atomically`: that module imports pyarrow, and its temporary names are not unique per thread.
    """
    unfinished = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        unfinished.write_bytes(content)
        os.replace(unfinished, path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def _compile(variant: Variant) -> bytes:
    """The name of the compiled function, a zero byte, and an object file that runs without Python."""
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
        # Numba would first optimize every inlined function separately, which takes half of the time.
        level = numba.config.OPT
        numba.config.OPT = type(level)(0)
        try:
            compiled = compiler.compile_extra(typing, target, function, (numba.int64,), numba.void, flags, {})
        finally:
            numba.config.OPT = level
    symbol: str = compiled.fndesc.llvm_func_name
    return symbol.encode() + b"\0" + _emit(compiled.library.get_llvm_str())


def _emit(assembly: str) -> bytes:
    """Optimized machine code with short addresses: in Numba's own code every constant takes ten bytes to address."""
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
    for name in ("memset", "memcpy", "memmove"):  # the only functions that compiled loops call
        if binding.address_of_symbol(name) is None:
            function = getattr(ctypes.CDLL(None), name)
            binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    entry = "" if symbol == _WORK else _ENTRY.format(symbol.decode())
    engine = binding.create_mcjit_compiler(binding.parse_assembly(entry), machine)
    engine.add_object_file(binding.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)  # the code lives as long as its engine
    return int(engine.get_function_address("work"))
