"""Ways to damage a file: blindly, and where a format keeps what a reader trusts (lengths, opcodes, headers)."""

from __future__ import annotations

import io
import pickletools
import random
import re
import zipfile

EXTREMES = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]
CODES = [code.code.encode("latin1") for code in pickletools.opcodes]
ATOMS = [b"[", b"{", b"]", b"}", b'"', b",", b":", b"-1", b"1e999", b"NaN", b"null", b"9" * 25, b"\\u0000", b"[" * 50]


def flip(data: bytes, rng: random.Random) -> bytes:
    """Some bytes are others."""
    found = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16])):
        if found:
            found[rng.randrange(len(found))] = rng.randrange(256)
    return bytes(found)


def cut(data: bytes, rng: random.Random) -> bytes:
    """The end is missing, or a piece from the middle."""
    begin = rng.randrange(len(data) + 1)
    return data[:begin] if rng.random() < 0.5 else data[:begin] + data[begin + rng.randrange(1, 64) :]


def extreme(data: bytes, rng: random.Random) -> bytes:
    """A number of one to eight bytes becomes one at a limit."""
    width = rng.choice([1, 2, 4, 8])
    at = rng.randrange(max(1, len(data) - width + 1))
    value = rng.choice(EXTREMES) % 2 ** (8 * width)
    return data[:at] + value.to_bytes(width, rng.choice(["little", "big"])) + data[at + width :]


def repeat(data: bytes, rng: random.Random) -> bytes:
    """A piece stands there several times."""
    begin = rng.randrange(len(data) + 1)
    piece = data[begin : begin + rng.choice([1, 2, 8, 40, 200])]
    return data[:begin] + piece * rng.choice([2, 3, 50, 2000]) + data[begin:]


def splice(data: bytes, other: bytes, rng: random.Random) -> bytes:
    """The beginning of one and the end of another, or a piece of the other inside."""
    at, there = rng.randrange(len(data) + 1), rng.randrange(len(other) + 1)
    if rng.random() < 0.5:
        return data[:at] + other[there:]
    return data[:at] + other[there : there + rng.randrange(1, 128)] + data[at:]


def opcodes(data: bytes, rng: random.Random) -> bytes:
    """Opcodes of a pickle are doubled, dropped, swapped or become others."""
    try:
        places = [place for _, _, place in pickletools.genops(data) if place is not None]
    except Exception:
        return flip(data, rng)
    pieces = [data[begin:end] for begin, end in zip(places, [*places[1:], len(data)], strict=True)]
    for _ in range(rng.choice([1, 1, 2, 5])):
        at = rng.randrange(len(pieces))
        what = rng.randrange(4)
        if what == 0:
            pieces[at] = rng.choice(CODES) + pieces[at][1:]
        elif what == 1:
            pieces[at] = pieces[at] * rng.choice([0, 2, 100]) if len(pieces[at]) < 2**10 else b""
        elif what == 2:
            other = rng.randrange(len(pieces))
            pieces[at], pieces[other] = pieces[other], pieces[at]
        else:
            pieces.insert(
                at,
                rng.choice(
                    [*CODES, b"h\x00", b"j\xff\xff\xff\x7f", b"r\xff\xff\xff\xff", b"]", b"(", b"X\xff\xff\xff\xff"]
                ),
            )
    return b"".join(pieces)


def header(data: bytes, rng: random.Random) -> bytes:
    """The JSON header of a safetensors file is changed, and its length with it."""
    length = int.from_bytes(data[:8], "little")
    text, rest = data[8 : 8 + length], data[8 + length :]
    numbers = list(re.finditer(rb"\d+|\"|\{|\}|\[|\]|,|:", text))
    if numbers:
        found = rng.choice(numbers)
        new = rng.choice([*ATOMS, str(rng.choice(EXTREMES)).encode(), b""])
        text = text[: found.start()] + new + text[found.end() :]
    if rng.random() < 0.3:
        text = rng.choice([flip, cut, repeat])(text, rng)
    return len(text).to_bytes(8, "little") + text + rest


def entries(data: bytes, rng: random.Random) -> bytes:
    """An entry of a zip archive is changed, and the archive written anew around it."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            held = {name: archive.read(name) for name in archive.namelist()}
    except Exception:
        return flip(data, rng)
    if not held:
        return flip(data, rng)
    names = list(held)
    pickles = [name for name in names if name.endswith((".pkl", ".json", ".h5"))]
    name = rng.choice(pickles if pickles and rng.random() < 0.8 else names)
    held[name] = (
        opcodes if name.endswith(".pkl") and rng.random() < 0.7 else rng.choice([flip, cut, extreme, repeat])
    )(held[name], rng)
    if rng.random() < 0.1:
        del held[rng.choice(names)]
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
        for key, value in held.items():
            archive.writestr(key, value)
    return buffer.getvalue()


STRUCTURED = {"zip": entries, "keras": entries, "legacy": opcodes, "safetensors": header}


def mutated(name: str, data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """A seed of a format, damaged once or a few times."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        if not data:
            break
        if name in STRUCTURED and rng.random() < 0.5:
            data = STRUCTURED[name](data, rng)
        elif rng.random() < 0.15:
            data = splice(data, rng.choice(others), rng)
        else:
            data = rng.choice([flip, cut, extreme, repeat])(data, rng)
        data = data[: 2**22]
    return data
