"""What a tool returns says what it did: as text in `print` and in a session, as HTML in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True, slots=True)
class Skipped:
    """A layer that a tool left as it was, and why.

    Attributes:
        name: the layer's name; empty where it is the model itself.
        kind: its class.
        why: the reason, in words.
    """

    name: str
    kind: str
    why: str

    def __str__(self) -> str:
        return f"{called(self.name)} ({self.kind}): {self.why}"


class Record:
    """Base of the tools' records: it reads as its text wherever it is shown.

    The text is the lines of `_head`, then one line for each group of equal `_rows`, the layers in `skipped` last. A
    subclass says what these are, or writes `__str__`. Dataclasses that derive from it are declared with repr=False, or
    they would show their fields instead.
    """

    __slots__ = ()

    # What was not done with a skipped layer, in words.
    _left = "left alone"

    def _head(self) -> list[str]:
        """The first lines."""
        return []

    def _rows(self) -> Iterable[tuple[str, str]]:
        """What became of each layer, in words, and its name."""
        return ()

    def __str__(self) -> str:
        skipped: Iterable[Skipped] = getattr(self, "skipped", ())
        left = [(f"{each.kind}  {self._left} ({each.why})", called(each.name)) for each in skipped]
        return "\n".join([*self._head(), *table([*self._rows(), *left])])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """In a notebook: the text, with its columns as they are."""
        return f'<pre style="overflow-x: auto">{escape(str(self))}</pre>'


def table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """A line for each group of equal rows: how many there are, the row, and some of their names."""
    groups: dict[str, list[str]] = {}
    for row, name in rows:
        groups.setdefault(row, []).append(name)
    return [f"{len(names):4}  {row}: {some(names)}" for row, names in groups.items()]


def called(*names: str) -> str:
    """All names of one layer for a line; a name is empty where the layer is the model itself."""
    return ", ".join(names) or "(the model)"


def some(names: Sequence[str]) -> str:
    """Names for a line: all of three, else the first two and the last."""
    if len(names) <= 3:
        return ", ".join(names)
    return f"{', '.join(names[:2])} … {names[-1]}"
