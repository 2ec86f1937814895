"""What a tool returns says what it did: as text in `print` and in a session, as HTML in a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape


class Record:
    """Base of the tools' records: a subclass writes `__str__`, and reads like it wherever it is shown.

    Dataclasses that derive from it are declared with repr=False, or they would show their fields instead.
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        """In a notebook: the text, with its columns as they are."""
        return f'<pre style="overflow-x: auto">{escape(str(self))}</pre>'


@dataclass(frozen=True, slots=True)
class Skipped:
    """A layer that was left as it was, and why."""

    name: str
    kind: str
    why: str

    def __str__(self) -> str:
        return f"{self.name or '(the model)'} ({self.kind}): {self.why}"


def some(names: list[str]) -> str:
    """Names for a line: all of three, else the first two and the last."""
    if len(names) <= 3:
        return ", ".join(names)
    return f"{', '.join(names[:2])} … {names[-1]}"
