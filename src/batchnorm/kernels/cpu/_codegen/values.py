"""Numbers and vectors in the code, with operators; a plain Python number becomes a constant of the other's type."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import ir

I1, I16, I32, I64 = (ir.IntType(bits) for bits in (1, 16, 32, 64))
F16, F32, F64 = ir.HalfType(), ir.FloatType(), ir.DoubleType()
_WIDTHS = [F16, F32, F64]


def scalar_of(kind: Any) -> Any:
    """The type of a vector's lanes; the type itself of a scalar."""
    return kind.element if isinstance(kind, ir.VectorType) else kind


def with_lanes_of(scalar: Any, kind: Any) -> Any:
    """The type with this scalar that has as many lanes as `kind`."""
    return ir.VectorType(scalar, kind.count) if isinstance(kind, ir.VectorType) else scalar


class Value:
    """A number or a vector in the code, with operators. Comparisons return masks."""

    __slots__ = ("builder", "ir")
    __hash__ = None  # type: ignore[assignment]

    def __init__(self, builder: ir.IRBuilder, value: Any) -> None:
        self.builder, self.ir = builder, value

    @property
    def kind(self) -> Any:
        return self.ir.type

    @property
    def is_integer(self) -> bool:
        return isinstance(scalar_of(self.kind), ir.IntType)

    def of(self, value: Any) -> Value:
        return Value(self.builder, value)

    def constant(self, number: float) -> Value:
        """The number, in the type of this value."""
        kind = self.kind
        return self.of(ir.Constant(kind, [number] * kind.count if isinstance(kind, ir.VectorType) else number))

    def coerce(self, other: Value | float) -> Any:
        return other.ir if isinstance(other, Value) else self.constant(other).ir

    def _binary(self, other: Value | float, integer: str, real: str) -> Value:
        name = integer if self.is_integer else real
        return self.of(getattr(self.builder, name)(self.ir, self.coerce(other)))

    def __add__(self, other: Value | float) -> Value:
        return self._binary(other, "add", "fadd")

    def __radd__(self, other: float) -> Value:
        return self.constant(other) + self

    def __sub__(self, other: Value | float) -> Value:
        return self._binary(other, "sub", "fsub")

    def __rsub__(self, other: float) -> Value:
        return self.constant(other) - self

    def __mul__(self, other: Value | float) -> Value:
        return self._binary(other, "mul", "fmul")

    def __rmul__(self, other: float) -> Value:
        return self.constant(other) * self

    def __truediv__(self, other: Value | float) -> Value:
        return self._binary(other, "", "fdiv")

    def __rtruediv__(self, other: float) -> Value:
        return self.constant(other) / self

    def __floordiv__(self, other: Value | float) -> Value:
        return self._binary(other, "udiv", "")

    def __mod__(self, other: Value | float) -> Value:
        return self._binary(other, "urem", "")

    def __and__(self, other: Value | float) -> Value:
        return self._binary(other, "and_", "")

    def __or__(self, other: Value | float) -> Value:
        return self._binary(other, "or_", "")

    def __lshift__(self, other: Value | float) -> Value:
        return self._binary(other, "shl", "")

    def __rshift__(self, other: Value | float) -> Value:
        return self._binary(other, "lshr", "")

    def __neg__(self) -> Value:
        return self.of(self.builder.fneg(self.ir)) if not self.is_integer else 0 - self

    def _compare(self, how: str, other: Value | float) -> Value:
        compare = self.builder.icmp_signed if self.is_integer else self.builder.fcmp_ordered
        return self.of(compare(how, self.ir, self.coerce(other)))

    def __lt__(self, other: Value | float) -> Value:
        return self._compare("<", other)

    def __le__(self, other: Value | float) -> Value:
        return self._compare("<=", other)

    def __gt__(self, other: Value | float) -> Value:
        return self._compare(">", other)

    def __ge__(self, other: Value | float) -> Value:
        return self._compare(">=", other)

    def equals(self, other: Value | float) -> Value:
        return self._compare("==", other)

    def differs(self, other: Value | float) -> Value:
        return self._compare("!=", other)

    def select(self, then: Value | float, otherwise: Value | float) -> Value:
        """Where this mask is true `then`, elsewhere `otherwise`; one of them may be a plain number."""
        if not isinstance(then, Value):
            assert isinstance(otherwise, Value)
            then = otherwise.constant(then)
        return self.of(self.builder.select(self.ir, then.ir, then.coerce(otherwise)))

    def min(self, other: Value | float) -> Value:
        return (self < other).select(self, other)

    def at_least(self, other: Value | float) -> Value:
        """The larger of both; NaN stays NaN."""
        return (self < other).select(other, self)

    def _call(self, name: str, *others: Value | float) -> Value:
        arguments = [self.ir, *(self.coerce(other) for other in others)]
        function = intrinsic(
            self.builder.module, f"{name}.{mangled(self.kind)}", self.kind, [self.kind] * len(arguments)
        )
        return self.of(self.builder.call(function, arguments))

    def fma(self, factor: Value | float, addend: Value | float) -> Value:
        """self·factor + addend, with one rounding where the processor can: the same code in forward and backward."""
        return self._call("llvm.fmuladd", factor, addend)

    def sqrt(self) -> Value:
        return self._call("llvm.sqrt")

    def abs(self) -> Value:
        return self._call("llvm.fabs")

    def to(self, scalar: Any) -> Value:
        """The value in another floating-point type, lane by lane."""
        kind = with_lanes_of(scalar, self.kind)
        if kind == self.kind:
            return self
        if self.is_integer:
            return self.of(self.builder.sitofp(self.ir, kind))
        is_wider = _WIDTHS.index(scalar) > _WIDTHS.index(scalar_of(self.kind))
        return self.of(self.builder.fpext(self.ir, kind) if is_wider else self.builder.fptrunc(self.ir, kind))

    def bits(self) -> Value:
        """The bits of floats as integers of the same width."""
        return self.of(
            self.builder.bitcast(self.ir, with_lanes_of(I64 if scalar_of(self.kind) == F64 else I32, self.kind))
        )

    def from_bits(self) -> Value:
        """The floats that have these bits."""
        return self.of(
            self.builder.bitcast(self.ir, with_lanes_of(F64 if scalar_of(self.kind) == I64 else F32, self.kind))
        )

    def splat(self, count: int) -> Value:
        """A vector with this number in every lane."""
        vector = ir.VectorType(self.kind, count)
        first = self.builder.insert_element(ir.Constant(vector, ir.Undefined), self.ir, ir.Constant(I32, 0))
        zeros = ir.Constant(ir.VectorType(I32, count), [0] * count)
        return self.of(self.builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), zeros))

    def half(self, which: int) -> Value:
        """The lower (0) or upper (1) half of a vector."""
        count = self.kind.count // 2
        picked = ir.Constant(ir.VectorType(I32, count), [which * count + lane for lane in range(count)])
        return self.of(self.builder.shuffle_vector(self.ir, ir.Constant(self.kind, ir.Undefined), picked))

    def total(self) -> Value:
        """The sum of all lanes, by halves."""
        vector = self
        while vector.kind.count > 1:
            vector = vector.half(0) + vector.half(1)
        return self.of(self.builder.extract_element(vector.ir, ir.Constant(I32, 0)))

    def negated(self) -> Value:
        """The opposite of a mask."""
        return self.of(self.builder.not_(self.ir))


def mangled(kind: Any) -> str:
    """The suffix of an intrinsic's name for this type."""
    names = {F64: "f64", F32: "f32", F16: "f16", I16: "i16"}
    return f"v{kind.count}{names[kind.element]}" if isinstance(kind, ir.VectorType) else names[kind]


def intrinsic(module: ir.Module, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    found = module.globals.get(name)
    return found or ir.Function(module, ir.FunctionType(result, arguments), name)
