"""What a tool returns says what it did: as text in `print` and in a session, as HTML in a notebook."""

from __future__ import annotations

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
