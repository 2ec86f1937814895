"""Render a Run, a check-up or the memory of steps as an HTML page, in the terminal, and as JSON.

    render(run)            write one self-contained HTML file; several watched Runs make one page
    show(run)              print the same in the terminal
    Report.of(run)         both, and the page as data

Nothing here imports torch. The plotting libraries are imported at first use.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from batchnorm.runs.run import Run, RunError, write_text_atomically

if TYPE_CHECKING:
    from rich.console import Console

    from batchnorm.checks.check import Checkup
    from batchnorm.report.page import Page

    Subject = Run | Checkup | Mapping[str, Any] | str | os.PathLike[str]

__all__ = ["FILE", "KINDS", "Kind", "Report", "card", "render", "show"]

FILE = "report.html"


@dataclass(frozen=True)
class Kind:
    """The modules that show a kind of Run, imported at first use.

    Attributes:
        label: the kind in words, for messages.
        texts: a module: summarize() reads the Runs, show() prints them, describe() returns JSON values, card() HTML.
        pages: a module: build() makes the page as data from the result of summarize().
        several: whether one page can show several Runs and follow their trainings.
    """

    label: str
    texts: str
    pages: str
    several: bool = False


KINDS: Mapping[str, Kind] = {
    "study": Kind("study", "batchnorm.report.study.terminal", "batchnorm.report.study.page"),
    "watch": Kind("watched training", "batchnorm.report.watch.terminal", "batchnorm.report.watch.page", several=True),
    "checkup": Kind("check-up", "batchnorm.report.checkup.page", "batchnorm.report.checkup.page"),
    "memory": Kind("measurement of memory", "batchnorm.report.memory", "batchnorm.report.memory"),
}


@dataclass(frozen=True)
class Report:
    """The report of Runs of one kind, or of a check-up; each part is made at first use.

    Attributes:
        kind: the modules that show it.
        subjects: the Runs, the check-up or the record.
    """

    kind: Kind
    subjects: tuple[Any, ...]

    @classmethod
    def of(cls, run: Subject | Sequence[Subject]) -> Report:
        """The report of `run`, as for `render`.

        Raises ValueError if one page cannot show them, RunError if one cannot be read.
        """
        runs = run if isinstance(run, Sequence) and not isinstance(run, str) else [run]
        subjects = tuple(Run(subject) if isinstance(subject, str | os.PathLike) else subject for subject in runs)
        kinds = sorted({_kind_of(subject) for subject in subjects})
        if len(kinds) != 1:
            got = f"got kinds {' and '.join(kinds)}" if kinds else "got none: pass a Run"
            raise ValueError(f"one page shows Runs of one kind, {got}")
        if kinds[0] not in KINDS:
            where = subjects[0].path if isinstance(subjects[0], Run) else "it"
            raise RunError(f"{where} is a Run of kind {kinds[0]!r}, which this batchnorm does not know")
        kind = KINDS[kinds[0]]
        if len(subjects) > 1 and not kind.several:
            raise ValueError(f"a page shows one {kind.label}: pass one RUN")
        return cls(kind, subjects)

    @cached_property
    def summary(self) -> Any:
        """The numbers and the answer. Raises RunError if a table is damaged."""
        return import_module(self.kind.texts).summarize(self.subjects)

    @cached_property
    def page(self) -> Page:
        page: Page = import_module(self.kind.pages).build(self.summary)
        return page

    def target(self, out: str | os.PathLike[str] | None = None) -> Path:
        """The file of the page: `out`, or report.html in the Run's folder.

        Raises ValueError without `out` for several Runs and for a check-up.
        """
        if out is not None:
            return Path(out)
        if len(self.subjects) > 1:
            raise ValueError("several Runs make one page: set its file with out=...")
        if not isinstance(self.subjects[0], Run):
            raise ValueError(f"a {self.kind.label} has no folder: set the file of its page with out=...")
        return self.subjects[0].path / FILE

    def write(self, out: str | os.PathLike[str] | None = None, refresh: int | None = None) -> Path:
        """Write the page to `target(out)` and return its path; an open page reloads itself after `refresh` seconds.

        Raises RunError if a table is damaged or the file cannot be written.
        """
        from batchnorm.report.page import render

        target = self.target(out)
        text = render(self.page, refresh)
        try:
            write_text_atomically(target, text)
        except OSError as error:
            raise RunError(f"cannot write {target}: {error.strerror or error}") from error
        return target

    def show(self, console: Console | None = None) -> None:
        """Print the answer and its numbers to the console, by default to standard output."""
        from rich.console import Console as Terminal

        import_module(self.kind.texts).show(self.summary, console or Terminal())

    def describe(self, page: Path | None = None) -> dict[str, Any]:
        """The answer and its numbers as JSON values, with the path of the page; unknown values are NaN."""
        values: dict[str, Any] = import_module(self.kind.texts).describe(self.summary)
        return values | ({} if page is None else {"report": str(page)})

    def card(self) -> str:
        """HTML for a notebook."""
        return str(import_module(self.kind.texts).card(self.summary))


def render(run: Subject | Sequence[Subject], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the report as one self-contained HTML file and return its path.

    Works without torch.

    Args:
        run: a Run or its folder; several watched ones, for one page of all; the result of `batchnorm.check`; or the
            record of `batchnorm bench --memory`, as JSON values.
        out: the file; by default report.html in the Run's folder.

    Raises RunError if a Run is damaged or the file cannot be written, ValueError if one page cannot show them.
    """
    return Report.of(run).write(out)


def show(run: Subject | Sequence[Subject]) -> None:
    """Print the answer and its numbers in the terminal.

    Writes no file and works without torch.

    Args:
        run: as for `render`.

    Raises RunError if a Run is damaged, ValueError if they cannot be shown together.
    """
    Report.of(run).show()


def card(run: Run) -> str:
    """HTML without a script, for a notebook.

    Args:
        run: any Run; if it cannot be read, the card says why.
    """
    from markupsafe import Markup

    try:
        if run.info.get("kind") not in KINDS:
            return str(Markup("<p>{}</p>").format(repr(run)))
        return Report.of(run).card()
    except Exception as error:  # a damaged Run must not break a notebook's cell
        return str(Markup("<p><b>{}</b>: {}</p>").format(type(error).__name__, str(error)))


def _kind_of(subject: Any) -> str:
    if isinstance(subject, Run):
        return str(subject.info.get("kind"))
    if hasattr(subject, "explanation"):
        return "checkup"
    if isinstance(subject, Mapping) and subject.get("format") == "batchnorm-bench":
        if not subject.get("memory"):
            raise ValueError("the record has no memory of steps: batchnorm bench --memory measures it")
        return "memory"
    raise TypeError(f"a report takes a Run, its folder or a check-up, got {type(subject).__name__}")
