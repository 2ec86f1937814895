"""Text into a terminal, whatever it can write."""

from __future__ import annotations

from rich.console import Console


def write(console: Console, text: str) -> None:
    """Wrapped between words in a terminal, as it is into a file or a pipe."""
    console.print(encodable(text, console), markup=False, highlight=False, soft_wrap=not console.is_terminal)


def encodable(text: str, console: Console) -> str:
    """What the terminal cannot write becomes a question mark; control characters, which could move its cursor, too."""
    kept = "".join(each if each.isprintable() or each == "\n" else "?" for each in text)
    return kept.encode(console.encoding, "replace").decode(console.encoding)
