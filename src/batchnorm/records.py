"""Records: what a tool returns, shown as text by `print` and in a session, as HTML in a notebook."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True, slots=True)
class Skipped:
    """A layer that a tool did not change, and why.

    Attributes:
        name: the layer's name; empty if it is the model itself.
        kind: its class.
        why: the reason, in words.
    """

    name: str
    kind: str
    why: str

    def __str__(self) -> str:
        return f"{format_names(self.name)} ({self.kind}): {self.why}"


class Record:
    """Base of the tools' records: print and repr show a summary.

    The text is the lines of `_head`, then one line per group of equal `_rows`, and the layers in `skipped` last.
    Subclasses override these, or `__str__`. Dataclasses need repr=False, or they would show their fields.
    """

    __slots__ = ()

    # The words for a skipped layer.
    _left = "left alone"

    def _head(self) -> list[str]:
        """The first lines."""
        return []

    def _rows(self) -> Iterable[tuple[str, str]]:
        """Per layer: what was done, in words, and its name."""
        return ()

    def __str__(self) -> str:
        skipped: Iterable[Skipped] = getattr(self, "skipped", ())
        rows = [(f"{layer.kind}  {self._left} ({layer.why})", format_names(layer.name)) for layer in skipped]
        return "\n".join([*self._head(), *table([*self._rows(), *rows])])

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """In a notebook: the text, preformatted."""
        return f'<pre style="overflow-x: auto">{escape(str(self))}</pre>'


def table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """One line per group of equal rows: their number, the row, and some of their names."""
    groups: dict[str, list[str]] = {}
    for row, name in rows:
        groups.setdefault(row, []).append(name)
    return [f"{len(names):4}  {row}: {abbreviate(names)}" for row, names in groups.items()]


def format_names(*names: str) -> str:
    """All names of one layer; the empty name is the model itself."""
    return ", ".join(names) or "(the model)"


def abbreviate(names: Sequence[str]) -> str:
    """Up to three names; of more, the first two and the last."""
    if len(names) <= 3:
        return ", ".join(names)
    return f"{', '.join(names[:2])} … {names[-1]}"
