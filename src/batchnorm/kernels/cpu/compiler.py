"""Machine code of the CPU loops: loaded from the cache, or compiled and stored there for later processes.

LLVM compiles a variant in some tenths of a second, and a later process loads it in some hundredths. A file holds the
code of one variant for one kind of processor.

Anyone who can write to the folder can run code in this process, so the user must own it and no other user may write.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import threading
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from batchnorm.kernels.contract import UnavailableError

_DIGEST = hashlib.sha256().digest_size
_lock = threading.RLock()
_addresses: dict[str, int] = {}
_locked: list[Any] = []
_engines: list[Any] = []


def folder() -> Path:
    """The folder of compiled code: $BATCHNORM_CACHE, or batchnorm in the user's cache folder."""
    chosen = os.environ.get("BATCHNORM_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchnorm"


def address_of(name: str, assembly: Callable[[], str]) -> int:
    """The address of the machine code of LLVM assembly that defines `void @work(i64 address of a job)`.

    The name belongs to this assembly alone; the code is compiled again when a module that generates code changes.
    Raises UnavailableError if the code can be neither loaded nor compiled and stored.
    """
    found = _addresses.get(name)
    if found is None:
        found = _addresses[name] = _stored_address(name, assembly)
    return found


def _stored_address(name: str, assembly: Callable[[], str]) -> int:
    """Load the stored code; compile and store it where there is no such file."""
    with _lock:
        try:
            path = _private(folder()) / f"{_key(name)}.o"
            stored = _read(path)
            if stored is None:
                stored = _emit(assembly())
                _write(path, stored)
            return _load(stored)
        except UnavailableError:
            raise
        except ImportError as error:
            raise UnavailableError(f"{error.name or error} cannot be imported: pip install llvmlite") from error
        except OSError as error:
            raise UnavailableError(
                f"compiled code cannot be stored in {folder()} ({error.strerror or error}): "
                "set BATCHNORM_CACHE to a writable folder"
            ) from error
        except Exception as error:  # an LLVM that does not know this processor
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise UnavailableError(
                f"the CPU kernels cannot be compiled here ({type(error).__name__}: {reason}): try another llvmlite"
            ) from error


def _lock_compilers() -> None:
    """Before fork(), wait until no thread compiles, so that no lock stays locked in the child.

    Numba, where the program uses it, holds its lock while it is in LLVM.
    """
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
def processor() -> str:
    """What machine code depends on: LLVM's version, and the processor's name and instructions."""
    import llvmlite
    from llvmlite import binding

    features = binding.get_host_cpu_features().flatten()
    return "|".join((llvmlite.__version__, binding.get_process_triple(), binding.get_host_cpu_name(), features))


@cache
def converts_float16() -> bool:
    """Whether the processor converts float16; elsewhere LLVM would call functions that do not exist here."""
    from llvmlite import binding

    is_x86 = binding.get_process_triple().startswith(("x86_64", "i686"))
    return not is_x86 or bool(binding.get_host_cpu_features().get("f16c"))


def _key(name: str) -> str:
    """The name of the file: a hash of the code's name, the processor, and the modules that the code comes from."""
    return hashlib.sha256(f"{name}|{processor()}|{sources_hash()}".encode()).hexdigest()[:32]


@cache
def sources_hash() -> str:
    """A hash of the modules that generate the code."""
    here = Path(__file__)
    others = (here.with_name(name) for name in ("plan.py", "copying.py"))
    modules = (*sorted((here.parent / "_codegen").glob("*.py")), here, *others)
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in modules)).hexdigest()


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


def _emit(assembly: str) -> bytes:
    """An object file of optimized machine code, with short addresses."""
    from llvmlite import binding

    module, machine = binding.parse_assembly(assembly), _target_machine()
    module.verify()
    tuning = binding.create_pipeline_tuning_options(speed_level=3)
    tuning.loop_vectorization = tuning.slp_vectorization = False
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

    machine = _target_machine()
    for name in ("memset", "memcpy", "memmove"):  # the only functions that compiled loops call
        if binding.address_of_symbol(name) is None:
            function = getattr(ctypes.CDLL(None), name)
            binding.add_symbol(name, ctypes.cast(function, ctypes.c_void_p).value)
    # llvmlite's memory manager places code and constants side by side. LLVM's may place them so far apart that short
    # addresses do not reach, and then ends the process.
    engine = binding.create_mcjit_compiler(binding.parse_assembly(""), machine, use_lmm=True)
    engine.add_object_file(binding.ObjectFileRef.from_data(stored))
    engine.finalize_object()
    _engines.append(engine)  # the code lives as long as its engine
    return int(engine.get_function_address("work"))
