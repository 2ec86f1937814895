"""A small language over llvmlite in which the CPU loops are written: loops, variables, arrays of vectors; see `values`.

Vectors are explicit, so no result depends on what LLVM's own vectorizer decides. The type that is computed in is
float32 for 16-bit tensors and for float32, else float64. A vector of computed values fills a cache line of 64 bytes:
one register with AVX-512, two with AVX2, four with NEON.

    code = Code()
    x = code.array("x", FLOAT32)
    with code.loop(0, n, 16) as i:
        x.store(i, x.load(i, lanes=16) * 2.0)
    assembly = code.finish()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import binding, ir

from batchnorm.kernels.cpu._codegen.values import F16, F32, F64, I16, I32, I64, Value, intrinsic, mangled, with_lanes_of
from batchnorm.kernels.cpu.plan import BFLOAT16, FIELD, FLOAT16, FLOAT32, FLOAT64

POINTER = ir.PointerType()
LINE = 64
_STORED = {FLOAT32: F32, BFLOAT16: I16, FLOAT64: F64, FLOAT16: F16}
SIZES = {FLOAT32: 4, BFLOAT16: 2, FLOAT64: 8, FLOAT16: 2}


def computed(kind: int) -> Any:
    """The type that is computed in for tensors of this kind."""
    return F64 if kind == FLOAT64 else F32


def lanes_of(scalar: Any) -> int:
    """How many numbers of this type a vector of computed values has."""
    return 8 if scalar == F64 else 16


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name, as a vector of `count`."""

    def __init__(self, count: int) -> None:
        self.count = count

    def _to_string(self) -> str:
        return f"<{self.count} x bfloat>"


class Variable:
    """A value that changes; LLVM keeps it in a register."""

    def __init__(self, code: Code, first: Value) -> None:
        self.code = code
        with code.builder.goto_entry_block():
            self.slot = code.builder.alloca(first.kind)
        self.set(first)

    def get(self) -> Value:
        return self.code.of(self.code.builder.load(self.slot, typ=self.slot.allocated_type))

    def set(self, value: Value) -> None:
        self.code.builder.store(value.ir, self.slot)


class Array:
    """A tensor in memory: loads widen to the computed type, stores round to the kind of the tensor."""

    def __init__(self, code: Code, base: Value, kind: int) -> None:
        self.code, self.base, self.stored, self.size = code, base, _STORED[kind], SIZES[kind]
        self.is_bfloat16, self.computed = kind == BFLOAT16, computed(kind)

    def pointer(self, index: Value) -> Any:
        return self.code.builder.gep(self.base.ir, [index.ir], inbounds=True, source_etype=self.stored)

    def address(self, index: Value) -> Value:
        """The address of an element."""
        return self.code.of(self.code.builder.ptrtoint(self.pointer(index), I64))

    def advance(self, index: Value) -> Array:
        """The array that begins at an element."""
        other = object.__new__(Array)
        other.__dict__.update(self.__dict__, base=self.code.of(self.pointer(index)))
        return other

    def load(self, index: Value, lanes: int = 1, mask: Value | None = None) -> Value:
        """The number at `index`, or the vector that begins there; 0 in lanes that the mask excludes."""
        builder, pointer = self.code.builder, self.pointer(index)
        kind = self.stored if lanes == 1 else ir.VectorType(self.stored, lanes)
        if mask is None:
            loaded = self.code.of(builder.load(pointer, align=self.size, typ=kind))
        else:
            zero = ir.Constant(kind, [0] * lanes)
            loaded = self.code.of(self._masked("load", kind, [pointer, self._align(), mask.ir, zero], kind))
        if self.is_bfloat16:
            return (self.code.of(builder.zext(loaded.ir, with_lanes_of(I32, kind))) << 16).from_bits()
        return loaded.to(self.computed)

    def store(self, index: Value, value: Value, mask: Value | None = None, *, past_caches: bool = False) -> None:
        """Store a number or a vector. Past the caches, the address must be a multiple of the vector's size."""
        builder, pointer = self.code.builder, self.pointer(index)
        rounded = self._rounded(value)
        if mask is not None:
            self._masked("store", rounded.kind, [rounded.ir, pointer, self._align(), mask.ir], ir.VoidType())
            return
        lanes = rounded.kind.count if isinstance(rounded.kind, ir.VectorType) else 1
        stored = builder.store(rounded.ir, pointer, align=self.size * (lanes if past_caches else 1))
        if past_caches:
            stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(I32, 1)]))

    def count_up(self, index: Value) -> Value:
        """Increment the integer of 64 bits at `index`, and return its old value: no two threads get the same."""
        return self.code.of(self.code.builder.atomic_rmw("add", self.pointer(index), ir.Constant(I64, 1), "acq_rel"))

    def load_mask(self, index: Value, lanes: int) -> Value:
        """The mask of a vector at `index`, a bit for each element, from an array of bytes."""
        whole = ir.IntType(lanes)
        bits = self.code.builder.load(self._byte(index), align=1, typ=whole)
        return self.code.of(self.code.builder.bitcast(bits, ir.VectorType(ir.IntType(1), lanes)))

    def store_mask(self, index: Value, mask: Value) -> None:
        """Store the mask of a vector that begins at `index`, which must be a multiple of its lanes."""
        bits = self.code.builder.bitcast(mask.ir, ir.IntType(mask.kind.count))
        self.code.builder.store(bits, self._byte(index), align=1)

    def _byte(self, index: Value) -> Any:
        return self.code.builder.gep(self.base.ir, [(index >> 3).ir], inbounds=True, source_etype=ir.IntType(8))

    def prefetch(self, index: Value) -> None:
        """Begin to load the cache line of an element into the L2."""
        builder, integers = self.code.builder, [ir.Constant(I32, number) for number in (0, 2, 1)]
        function = intrinsic(builder.module, "llvm.prefetch.p0", ir.VoidType(), [POINTER, I32, I32, I32])
        builder.call(function, [self.pointer(index), *integers])

    def _align(self) -> Any:
        return ir.Constant(I32, self.size)

    def _masked(self, verb: str, kind: Any, arguments: list[Any], result: Any) -> Any:
        name = f"llvm.masked.{verb}.{mangled(kind)}.p0"
        builder = self.code.builder
        function = intrinsic(builder.module, name, result, [argument.type for argument in arguments])
        return builder.call(function, arguments)

    def _rounded(self, value: Value) -> Value:
        value = value.to(self.computed)
        if not self.is_bfloat16:
            return value.to(self.stored)
        # To nearest, ties to even; NaN stays NaN.
        if isinstance(value.kind, ir.VectorType) and binding.get_host_cpu_features().get("avx512bf16"):
            count = value.kind.count
            narrow = value.builder.fptrunc(value.ir, _BFloat(count))
            return value.of(value.builder.bitcast(narrow, ir.VectorType(I16, count)))
        bits = value.bits()
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        is_nan = value.of(value.builder.fcmp_unordered("uno", value.ir, value.ir))
        kept = is_nan.select(0x7FC0, rounded)
        return value.of(value.builder.trunc(kept.ir, with_lanes_of(I16, value.kind)))


class Code:
    """A function `void work(i64 address of the job)` in the making."""

    def __init__(self) -> None:
        self.module = ir.Module("batchnorm")
        self.module.triple = binding.get_process_triple()
        self.function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), [I64]), "work")
        self.builder = ir.IRBuilder(self.function.append_basic_block("entry"))
        self.job = self.builder.inttoptr(self.function.args[0], POINTER)

    def of(self, value: Any) -> Value:
        return Value(self.builder, value)

    def integer(self, number: int) -> Value:
        return self.of(ir.Constant(I64, number))

    def number(self, scalar: Any, value: float, lanes: int = 1) -> Value:
        kind = scalar if lanes == 1 else ir.VectorType(scalar, lanes)
        return self.of(ir.Constant(kind, [value] * lanes if lanes > 1 else value))

    def variable(self, first: Value) -> Variable:
        return Variable(self, first)

    def _at(self, name: str, index: Value | None = None) -> Any:
        """The address of a field of the job, or of the one `index` places after it."""
        position = self.integer(getattr(FIELD, name))
        position = position if index is None else index + position
        return self.builder.gep(self.job, [position.ir], inbounds=True, source_etype=I64)

    def field(self, name: str, index: Value | None = None) -> Value:
        """An integer of the job: a field, or the one `index` places after it."""
        return self.of(self.builder.load(self._at(name, index), typ=I64))

    def real(self, name: str) -> Value:
        """A float64 of the job."""
        return self.of(self.builder.load(self._at(name), typ=F64))

    def array(self, name: str, kind: int) -> Array:
        """The array whose address is in a field of the job."""
        return Array(self, self.of(self.builder.inttoptr(self.field(name).ir, POINTER)), kind)

    def count_up(self, name: str, index: Value) -> Value:
        """Increment the counter `index` places after a field, and return its old value: no two threads get the same."""
        return self.of(self.builder.atomic_rmw("add", self._at(name, index), ir.Constant(I64, 1), "acq_rel"))

    def counter(self, name: str, index: Value) -> Value:
        """The value of a counter that other threads increment."""
        return self.of(self.builder.load_atomic(self._at(name, index), "acquire", 8, typ=I64))

    def first_lanes(self, count: Value, lanes: int) -> Value:
        """The mask of the first `count` lanes; of none if it is negative."""
        wide = ir.VectorType(I64, lanes)
        numbers = ir.Constant(wide, list(range(lanes)))
        return self.of(self.builder.icmp_signed("<", numbers, count.splat(lanes).ir))

    @contextmanager
    def loop(self, first: Value | int, end: Value, step: int | Value = 1) -> Iterator[Value]:
        """for i in range(first, end, step)."""
        builder = self.builder
        index = self.variable(first if isinstance(first, Value) else self.integer(first))
        head, body, done = (builder.append_basic_block(name) for name in ("head", "body", "done"))
        builder.branch(head)
        builder.position_at_end(head)
        builder.cbranch((index.get() < end).ir, body, done)
        builder.position_at_end(body)
        value = index.get()
        yield value
        index.set(value + step)
        builder.branch(head)
        builder.position_at_end(done)

    def vectors(
        self, first: Value, end: Value, lanes: int, body: Callable[[Value, int, Value | None], None], unroll: int = 1
    ) -> None:
        """Call body(index, nth, mask) for each vector from `first` to `end`, the last one masked.

        The loop is unrolled: vector `nth` of a group of `unroll`. Vectors after the last whole group are nth = 0.
        """
        whole = end - first
        for group in sorted({unroll, 1}, reverse=True):
            stop = first + whole // (group * lanes) * (group * lanes)
            with self.loop(first, stop, group * lanes) as index:
                for nth in range(group):
                    body(index + nth * lanes, nth, None)
            first, whole = stop, end - stop
        with self.when(first < end):
            body(first, 0, self.first_lanes(whole, lanes))

    @contextmanager
    def forever(self) -> Iterator[Any]:
        """while True, until `leave(condition)`, which is yielded, jumps out."""
        builder = self.builder
        body, done = (builder.append_basic_block(name) for name in ("again", "left"))

        def leave(condition: Value) -> None:
            on = builder.append_basic_block("on")
            builder.cbranch(condition.ir, done, on)
            builder.position_at_end(on)

        builder.branch(body)
        builder.position_at_end(body)
        yield leave
        builder.branch(body)
        builder.position_at_end(done)

    @contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        with self.builder.if_then(condition.ir):
            yield

    @contextmanager
    def when_else(self, condition: Value) -> Iterator[Any]:
        with self.builder.if_else(condition.ir) as branches:
            yield branches

    def pause(self) -> None:
        """Let the processor wait a moment, in a loop that waits for another thread."""
        triple = self.module.triple
        if triple.startswith(("x86_64", "i686")):
            self.builder.call(intrinsic(self.module, "llvm.x86.sse2.pause", ir.VoidType(), []), [])
        elif triple.startswith(("aarch64", "arm64")):
            self.builder.call(intrinsic(self.module, "llvm.aarch64.hint", ir.VoidType(), [I32]), [ir.Constant(I32, 1)])

    def call(self, address: Value) -> None:
        """Call the function `void f(void)` at an address."""
        kind = ir.FunctionType(ir.VoidType(), [])
        pointer = self.builder.inttoptr(address.ir, kind.as_pointer())
        self.builder.call(pointer, [])

    def call_number(self, address: Value) -> Value:
        """The result of the function `int f(void)` at an address; 0 if the address is 0."""
        kind = ir.FunctionType(I32, [])
        result = self.variable(self.integer(0))
        with self.when(address.differs(0)):
            pointer = self.builder.inttoptr(address.ir, kind.as_pointer())
            result.set(self.of(self.builder.zext(self.builder.call(pointer, []), I64)))
        return result.get()

    def finish(self) -> str:
        """The assembly of the module."""
        self.builder.ret_void()
        return str(self.module)
