"""Memory access of the compiled CPU loops: typed addresses, widening loads, rounding stores, one shared counter.

Plain addresses instead of NumPy arrays compile quickly and give LLVM few pointers to prove distinct, so that it
vectorizes. bfloat16 is uint16 in memory and float32 in computations.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

FLOAT32, BFLOAT16, FLOAT64 = range(3)
_ELEMENT = (types.float32, types.uint16, types.float64)
COMPILED = {"forceinline": True, "error_model": "numpy", "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
inlined = njit(**COMPILED)
"""Decorator of functions that are inlined into compiled callers and never called from Python."""

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)


def _computed(element: Any) -> Any:
    return types.float32 if element == types.uint16 else element


@intrinsic(prefer_literal=True)
def array(_typing: Any, job: Any, field: Any, kind: Any) -> Any:
    """The array whose address is in a field of the job; `kind`, a constant, is the type of its elements."""
    signature = types.CPointer(_ELEMENT[kind.literal_value])(job, field, kind)

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        address = builder.load(_field(builder, args, _I64))
        return builder.inttoptr(address, context.get_value_type(signature.return_type))

    return signature, generate


def _field_reader(numba_type: Any, llvm_type: Any) -> Any:
    @intrinsic
    def read(_typing: Any, job: Any, field: Any) -> Any:
        return numba_type(job, field), lambda _context, builder, _sig, args: builder.load(
            _field(builder, args, llvm_type)
        )

    return read


def _field(builder: Any, args: Any, kind: Any) -> Any:
    return builder.gep(builder.inttoptr(args[0], kind.as_pointer()), [args[1]], inbounds=True)


integer, number = _field_reader(types.int64, _I64), _field_reader(types.float64, ir.DoubleType())
"""The integer, or the float64, in a field of the job: read(job, field)."""


@intrinsic
def load(_typing: Any, base: Any, index: Any) -> Any:
    """base[index], in the type that is computed in."""
    element = base.dtype

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        value = builder.load(builder.gep(args[0], [args[1]], inbounds=True))
        if element != types.uint16:
            return value
        return builder.bitcast(builder.shl(builder.zext(value, _I32), ir.Constant(_I32, 16)), ir.FloatType())

    return _computed(element)(base, index), generate


@intrinsic
def store(_typing: Any, base: Any, index: Any, value: Any) -> Any:
    """base[index] = value; bfloat16 is rounded to nearest, ties to even, and NaN stays NaN."""
    element = base.dtype

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        number = context.cast(builder, args[2], signature.args[2], _computed(element))
        if element == types.uint16:
            number = _rounded_to_bfloat16(builder, number)
        builder.store(number, builder.gep(args[0], [args[1]], inbounds=True))
        return context.get_dummy_value()

    return types.void(base, index, value), generate


class _BFloat(ir.Type):
    """LLVM's bfloat, which llvmlite does not name, or a vector of `count` of them."""

    def __init__(self, count: int) -> None:
        self.count = count

    def _to_string(self) -> str:
        return f"<{self.count} x bfloat>" if self.count else "bfloat"


def _rounded_to_bfloat16(builder: Any, number: Any) -> Any:
    """The bfloat16 bits of a float, or of each in a vector."""
    count = number.type.count if isinstance(number.type, ir.VectorType) else 0

    def of(kind: Any) -> Any:
        return ir.VectorType(kind, count) if count else kind

    def constant(value: int) -> Any:
        return ir.Constant(of(_I32), [value] * count if count else value)

    if binding.get_host_cpu_features().get("avx512bf16"):
        return builder.bitcast(builder.fptrunc(number, _BFloat(count)), of(_I16))
    bits = builder.bitcast(number, of(_I32))
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.lshr(builder.add(builder.add(bits, constant(0x7FFF)), odd), constant(16))
    unordered = builder.fcmp_unordered("uno", number, number)
    return builder.trunc(builder.select(unordered, constant(0x7FC0), rounded), of(_I16))


@intrinsic
def draw(_typing: Any, job: Any, field: Any) -> Any:
    """Increment the counter in a field of the job and return its old value: no two threads get the same."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.atomic_rmw("add", _field(builder, args, _I64), ir.Constant(_I64, 1), "acq_rel")

    return types.int64(job, field), generate


@intrinsic
def accumulate(_typing: Any, total: Any, value: Any) -> Any:
    """total + value; LLVM may reorder the sum, which vectorizing needs. NaN stays NaN."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.fadd(*args, flags=("reassoc", "contract", "nsz"))

    return total(total, value), generate


@intrinsic
def accumulate_product(_typing: Any, total: Any, a: Any, b: Any) -> Any:
    """total + a·b in the same way, with one rounding where the processor can."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        product = builder.fmul(args[1], args[2], flags=("contract",))
        return builder.fadd(args[0], product, flags=("reassoc", "contract", "nsz"))

    return total(total, a, b), generate


@intrinsic
def fma(_typing: Any, a: Any, b: Any, c: Any) -> Any:
    """a·b + c, with one rounding where the processor can: the same code in forward and backward."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        kind = args[0].type
        name = "llvm.fmuladd." + ("f32" if kind == ir.FloatType() else "f64")
        function = cgutils.get_or_insert_function(builder.module, ir.FunctionType(kind, [kind] * 3), name)
        return builder.call(function, args)

    return a(a, b, c) if a == b == c else None, generate


_REINTERPRETED = {
    types.float32: (types.int32, _I32),
    types.float64: (types.int64, _I64),
    types.int32: (types.float32, ir.FloatType()),
    types.int64: (types.float64, ir.DoubleType()),
}


@intrinsic
def reinterpret(_typing: Any, number: Any) -> Any:
    """The bits of a float as an integer of its width, or the float that has the bits of an integer."""
    result, llvm_type = _REINTERPRETED[number]
    return result(number), lambda _context, builder, _sig, args: builder.bitcast(args[0], llvm_type)


@intrinsic
def like(_typing: Any, model: Any, number: Any) -> Any:
    """The number in the type of `model`: Numba would compute a float32 and a plain float in float64."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.cast(builder, args[1], signature.args[1], model)

    return model(model, number), generate


@intrinsic
def advance(_typing: Any, base: Any, index: Any) -> Any:
    """The array that begins at base[index]."""
    return base(base, index), lambda _context, builder, _sig, args: builder.gep(args[0], [args[1]], inbounds=True)


@intrinsic(prefer_literal=True)
def scratch(_typing: Any, kind: Any, size: Any) -> Any:
    """A local array of `size` elements of `kind`, both constants, aligned to a cache line."""
    element, length = _ELEMENT[kind.literal_value], size.literal_value

    def generate(context: Any, builder: Any, _signature: Any, _args: Any) -> Any:
        with builder.goto_entry_block():
            room = builder.alloca(ir.ArrayType(context.get_value_type(element), length))
            room.align = 64
        return builder.bitcast(room, context.get_value_type(types.CPointer(element)))

    return types.CPointer(element)(kind, size), generate


@intrinsic
def address(_typing: Any, base: Any, index: Any) -> Any:
    """The address of base[index]."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.ptrtoint(builder.gep(args[0], [args[1]], inbounds=True), _I64)

    return types.int64(base, index), generate


@intrinsic
def line_length(_typing: Any, base: Any) -> Any:
    """How many elements fill a cache line of 64 bytes."""
    count = 512 // base.dtype.bitwidth
    return types.int64(base), lambda _context, _builder, _sig, _args: ir.Constant(_I64, count)


@intrinsic(prefer_literal=True)
def store_line(_typing: Any, target: Any, offset: Any, source: Any, index: Any, bypass_caches: Any) -> Any:
    """Store the cache line of 64 bytes that begins at target[offset] from source[index …], rounded as `store` does."""
    element = target.dtype
    count = 64 // (element.bitwidth // 8)

    def generate(context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        computed = ir.VectorType(context.get_value_type(source.dtype), count)
        vector = ir.VectorType(context.get_value_type(element), count)
        from_ = builder.bitcast(builder.gep(args[2], [args[3]], inbounds=True), computed.as_pointer())
        to = builder.bitcast(builder.gep(args[0], [args[1]], inbounds=True), vector.as_pointer())
        value = builder.load(from_, align=source.dtype.bitwidth // 8)
        if element == types.uint16:
            value = _rounded_to_bfloat16(builder, value)
        stored = builder.store(value, to, align=64)
        if bypass_caches.literal_value:
            stored.set_metadata("nontemporal", builder.module.add_metadata([ir.Constant(_I32, 1)]))
        return context.get_dummy_value()

    return types.void(target, offset, source, index, bypass_caches), generate
