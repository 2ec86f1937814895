"""Loops that only move memory, in LLVM's assembly: what the machine is measured with, and the floor of the bench.

Each thread takes one piece after the other and processes it `repeats` times. Pieces are whole lines of 64 bytes, and
the target begins with a line, because non-temporal stores need aligned addresses.
"""

from __future__ import annotations

import ctypes

import torch

from batchnorm.kernels.cpu import compiler, threads

COPY, COPY_PAST_CACHES, READ = range(3)
"""What the loops do: copy with ordinary stores, copy with non-temporal stores, add up what they read."""

LINE = 64  # bytes
_LINES = 4  # in one iteration
_PIECES_EACH = 4
_SMALL_PIECE = 16 << 10  # bytes; a smaller one takes less time than the start of a thread


class Job(ctypes.Structure):
    """The argument of the loops, eight bytes each; sizes in bytes. `total` is the sum of all values that were read."""

    _fields_ = [
        (name, ctypes.c_int64) for name in ("ticket", "size", "piece", "source", "target", "repeats", "does", "total")
    ]


def copy(source: int, target: int, size: int, nontemporal: bool) -> None:
    """Copy `size` bytes between addresses on all of PyTorch's threads, past the caches if `nontemporal`.

    Raises UnavailableError where the loops cannot be compiled, and ValueError for a negative size.
    """
    if size < 0:
        raise ValueError(f"size must be 0 or more, got {size}")
    before = min(-target % LINE, size)
    lines = (size - before) // LINE * LINE
    after = size - before - lines
    ctypes.memmove(target, source, before)
    pieces = _PIECES_EACH * torch.get_num_threads()
    piece = max(_SMALL_PIECE, whole_lines(-(-lines // pieces)))
    run(COPY_PAST_CACHES if nontemporal else COPY, source + before, target + before, lines, piece)
    ctypes.memmove(target + before + lines, source + before + lines, after)


def run(does: int, source: int, target: int, size: int, piece: int, repeats: int = 1) -> int:
    """Run a loop over whole lines in pieces of `piece` bytes, each `repeats` times; return the sum of what was read."""
    if size == 0:
        return 0
    work = compiler.address_of("copying", assembly)
    job = Job(size=size, piece=piece, source=source, target=target, repeats=repeats, does=does)
    threads.run(work, ctypes.addressof(job), min(torch.get_num_threads(), -(-size // piece)))
    return int(job.total)


def whole_lines(size: int) -> int:
    """The size, rounded up to lines."""
    return -(-size // LINE) * LINE


_WORK = """
define void @work(i64 %address) {
  %job = inttoptr i64 %address to ptr
  LOADED
  %total.at = getelementptr i64, ptr %job, i64 7
  br label %next
next:
  %ticket = atomicrmw add ptr %job, i64 1 monotonic
  %first = mul i64 %ticket, %piece
  %found = icmp slt i64 %first, %size
  br i1 %found, label %start, label %done
start:
  %rest = sub i64 %size, %first
  %bytes = call i64 @llvm.smin.i64(i64 %rest, i64 %piece)
  %source.first = add i64 %source, %first
  %target.first = add i64 %target, %first
  %from = inttoptr i64 %source.first to ptr
  %to = inttoptr i64 %target.first to ptr
  br label %repeat
repeat:
  %round = phi i64 [0, %start], [%round.next, %repeated]
  switch i64 %does, label %read [i64 0, label %copy i64 1, label %copy_past_caches]
copy:
  call void @copy(ptr %from, ptr %to, i64 %bytes)
  br label %repeated
copy_past_caches:
  call void @copy_past_caches(ptr %from, ptr %to, i64 %bytes)
  br label %repeated
read:
  %sum = call i64 @read(ptr %from, i64 %bytes)
  %before = atomicrmw add ptr %total.at, i64 %sum monotonic
  br label %repeated
repeated:
  %round.next = add i64 %round, 1
  %again = icmp slt i64 %round.next, %repeats
  br i1 %again, label %repeat, label %next
done:
  fence seq_cst ; non-temporal stores are in memory before another thread goes on
  ret void
}
declare i64 @llvm.smin.i64(i64, i64)
declare i64 @llvm.vector.reduce.add.v8i64(<8 x i64>)
!0 = !{i32 1}
"""
_LOADED = ("size", "piece", "source", "target", "repeats", "does")

# Blocks of lines, then single lines; a block's loads come before its stores, so that stores fill whole lines in a row.
_LOOP = """
define internal HEAD noinline {
  %blocks = and i64 %bytes, -BLOCK
  br label %block.next
block.next:
  %at = phi i64 [0, %0], [%block.end, %block]
  SUMS
  %more = icmp slt i64 %at, %blocks
  br i1 %more, label %block, label %line.next
block:
  BLOCK_BODY
  %block.end = add i64 %at, BLOCK
  br label %block.next
line.next:
  %line = phi i64 [%blocks, %block.next], [%line.end, %single]
  SUM
  %left = icmp slt i64 %line, %bytes
  br i1 %left, label %single, label %done
single:
  SINGLE_BODY
  %line.end = add i64 %line, LINE
  br label %line.next
done:
  RESULT
}
"""


def assembly() -> str:
    """The loops as LLVM assembly; `@work` takes the address of a `Job`."""
    loaded = "\n".join(
        f"  %{name}.at = getelementptr i64, ptr %job, i64 {place}\n  %{name} = load i64, ptr %{name}.at"
        for place, name in enumerate(_LOADED, start=1)
    )
    loops = (_copying("copy", ""), _copying("copy_past_caches", ", !nontemporal !0"), _reading())
    return "".join((_WORK.replace("  LOADED", loaded), *loops))


def _copying(name: str, hint: str) -> str:
    def body(lines: int, start: str) -> str:
        loads = [_load(line, start) for line in range(lines)]
        stores = [
            f"  %to.{start}.{line} = getelementptr i8, ptr %to, i64 %offset.{start}.{line}\n"
            f"  store <8 x i64> %value.{start}.{line}, ptr %to.{start}.{line}, align {LINE}{hint}"
            for line in range(lines)
        ]
        return "\n".join((*loads, *stores))

    head = f"void @{name}(ptr %from, ptr %to, i64 %bytes)"
    return _loop(head, BLOCK_BODY=body(_LINES, "at"), SINGLE_BODY=body(1, "line"), RESULT="  ret void")


def _reading() -> str:
    lines = range(_LINES)
    sums = [f"  %sum.{n} = phi <8 x i64> [zeroinitializer, %0], [%sum.{n}.next, %block]" for n in lines]
    block = [f"{_load(n, 'at')}\n  %sum.{n}.next = add <8 x i64> %sum.{n}, %value.at.{n}" for n in lines]
    single = f"{_load(0, 'line')}\n  %sum.next = add <8 x i64> %sum, %value.line.0"
    names = ["%sum", *(f"%added.{n}" for n in lines[1:-1]), "%added"]
    added = [f"  {names[n]} = add <8 x i64> {names[n - 1]}, %sum.{n}" for n in lines[1:]]
    sum_ = "  %sum = phi <8 x i64> [%sum.0, %block.next], [%sum.next, %single]"
    added += ["  %total = call i64 @llvm.vector.reduce.add.v8i64(<8 x i64> %added)", "  ret i64 %total"]
    parts = {"SUMS": sums, "BLOCK_BODY": block, "SUM": [sum_], "SINGLE_BODY": [single], "RESULT": added}
    return _loop("i64 @read(ptr %from, i64 %bytes)", **{name: "\n".join(part) for name, part in parts.items()})


def _load(line: int, start: str) -> str:
    here = f"{start}.{line}"
    return (
        f"  %offset.{here} = add i64 %{start}, {line * LINE}\n"
        f"  %from.{here} = getelementptr i8, ptr %from, i64 %offset.{here}\n"
        f"  %value.{here} = load <8 x i64>, ptr %from.{here}, align 1"
    )


def _loop(head: str, **parts: str) -> str:
    """The function with this head: `_LOOP` with the words in capitals replaced."""
    code = _LOOP.replace("HEAD", head)
    for name in ("SUMS", "BLOCK_BODY", "SUM", "SINGLE_BODY", "RESULT"):
        code = code.replace(f"  {name}\n", f"{parts[name]}\n" if name in parts else "")
    return code.replace("BLOCK", str(_LINES * LINE)).replace("LINE", str(LINE))
