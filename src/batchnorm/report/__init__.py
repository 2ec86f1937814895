"""From a Run on disk, or a check-up, to what people read.

    render(run)            one self-contained HTML file; several watched Runs make one page
    show(run)              the same in the terminal
    Report.of(run)         both, with what was read and the page as data

Each of KINDS goes from numbers to an answer, a page as data, HTML. Nothing here imports torch, and this module none of
the plotting libraries: they load with what needs them.
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

    Subject = Run | Checkup | str | os.PathLike[str]

__all__ = ["FILE", "KINDS", "Kind", "Report", "card", "render", "show"]

FILE = "report.html"


@dataclass(frozen=True)
class Kind:
    """What shows a kind of Run: names of modules, imported at first use.

    Attributes:
        what: the kind in words, for messages.
        texts: its summarize() reads the Runs, show() prints them, describe() returns JSON values, card() HTML.
        pages: its build() makes the page as data, of what summarize() returns.
        several: whether one page can show several Runs, and follow their trainings.
    """

    what: str
    texts: str
    pages: str
    several: bool = False


KINDS: Mapping[str, Kind] = {
    "study": Kind("study", "batchnorm.report.study.terminal", "batchnorm.report.study.page"),
    "watch": Kind("watched training", "batchnorm.report.watch.terminal", "batchnorm.report.watch.page", several=True),
    "checkup": Kind("check-up", "batchnorm.report.checkup.page", "batchnorm.report.checkup.page"),
}


@dataclass(frozen=True)
class Report:
    """What there is to show of Runs of a kind, or of a check-up; each part is made at first use.

    Attributes:
        kind: what shows this kind of Run.
        subjects: the Runs, or the check-up.
    """

    kind: Kind
    subjects: tuple[Any, ...]

    @classmethod
    def of(cls, run: Subject | Sequence[Subject]) -> Report:
        """The report of one or several Runs, or of a check-up.

        Args:
            run: a Run or its folder, a sequence of watched ones, or what `batchnorm.check` returns.

        Raises ValueError where one page cannot show them, RunError where one cannot be read.
        """
        given = run if isinstance(run, Sequence) and not isinstance(run, str) else [run]
        subjects = tuple(Run(each) if isinstance(each, str | os.PathLike) else each for each in given)
        kinds = sorted({_kind_of(each) for each in subjects})
        if len(kinds) != 1:
            of = f"these are of kinds {' and '.join(kinds)}" if kinds else "there is none: give a Run"
            raise ValueError(f"one page shows Runs of one kind, {of}")
        if kinds[0] not in KINDS:
            where = subjects[0].path if isinstance(subjects[0], Run) else "it"
            raise RunError(f"{where} is a Run of kind {kinds[0]!r}, which this batchnorm does not know")
        kind = KINDS[kinds[0]]
        if len(subjects) > 1 and not kind.several:
            raise ValueError(f"a page shows one {kind.what}: give one RUN")
        return cls(kind, subjects)

    @cached_property
    def summary(self) -> Any:
        """What was read, and what is said of it. Raises RunError where a table is damaged."""
        return import_module(self.kind.texts).summarize(self.subjects)

    @cached_property
    def page(self) -> Page:
        """The page as data."""
        page: Page = import_module(self.kind.pages).build(self.summary)
        return page

    def target(self, out: str | os.PathLike[str] | None = None) -> Path:
        """Where the page goes: to `out`, or to report.html in the folder of the one Run.

        Raises ValueError where there is no default: for several Runs, and for a check-up.
        """
        if out is not None:
            return Path(out)
        if len(self.subjects) > 1:
            raise ValueError("several Runs make one page: say where it goes with out=...")
        if not isinstance(self.subjects[0], Run):
            raise ValueError(f"a {self.kind.what} has no folder: say where its page goes with out=...")
        return self.subjects[0].path / FILE

    def write(self, out: str | os.PathLike[str] | None = None, refresh: int | None = None) -> Path:
        """Write the page as one HTML file and return its path.

        Args:
            out: the file; by default report.html in the Run's folder.
            refresh: after how many seconds an open page loads itself again; None for never.

        Raises RunError where a table is damaged or the file cannot be written.
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
        """Print the answer and its numbers.

        Args:
            console: where to; by default standard output.
        """
        from rich.console import Console as Terminal

        import_module(self.kind.texts).show(self.summary, console or Terminal())

    def describe(self, page: Path | None = None) -> dict[str, Any]:
        """The answer and its numbers as JSON values, with the path of the page; what is not known is NaN."""
        described: dict[str, Any] = import_module(self.kind.texts).describe(self.summary)
        return described | ({} if page is None else {"report": str(page)})

    def card(self) -> str:
        """HTML for a notebook."""
        return str(import_module(self.kind.texts).card(self.summary))


def render(run: Subject | Sequence[Subject], out: str | os.PathLike[str] | None = None) -> Path:
    """Write the report as one self-contained HTML file and return its path.

    Works without torch.

    Args:
        run: a Run or its folder; several watched ones, for a page of all; or what `batchnorm.check` returns.
        out: the file; by default report.html in the Run's folder.

    Raises RunError where a Run is damaged or the file cannot be written, ValueError where one page cannot show them.
    """
    return Report.of(run).write(out)


def show(run: Subject | Sequence[Subject]) -> None:
    """Print the answer and its numbers in the terminal.

    Writes nothing and works without torch.

    Args:
        run: as of `render`.

    Raises RunError where a Run is damaged, ValueError where they cannot be shown together.
    """
    Report.of(run).show()


def card(run: Run) -> str:
    """What a notebook shows of a Run: HTML without a script.

    Args:
        run: any Run; where something of it cannot be read, the card says why.
    """
    from markupsafe import Markup

    try:
        if run.info.get("kind") not in KINDS:
            return str(Markup("<p>{}</p>").format(repr(run)))
        return Report.of(run).card()
    except Exception as error:  # whatever a Run's files hold, a notebook's cell must end
        return str(Markup("<p><b>{}</b>: {}</p>").format(type(error).__name__, str(error)))


def _kind_of(subject: Any) -> str:
    if isinstance(subject, Run):
        return str(subject.info.get("kind"))
    if hasattr(subject, "explanation"):
        return "checkup"
    raise TypeError(f"a report is of a Run, of its folder or of a check-up, got {type(subject).__name__}")
