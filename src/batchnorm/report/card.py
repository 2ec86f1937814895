"""What a notebook shows of a Run, whatever it is and however damaged."""

from __future__ import annotations

from markupsafe import Markup

from batchnorm.runs.run import Run


def card(run: Run) -> str:
    """HTML without a script. Never raises: of what cannot be read, the reason is shown."""
    try:
        kind = run.info.get("kind")
        if kind == "watch":
            from batchnorm.report.watch.card import card as watched

            return watched(run)
        if kind == "study":
            from batchnorm.report.study.answer import answer

            lines = Markup("").join(Markup("<p>{}</p>").format(line) for line in answer(run).lines())
            return str(Markup("<div><p><b>{}</b></p>{}</div>").format(str(run.path), lines))
        return str(Markup("<p>{}</p>").format(repr(run)))
    except Exception as error:  # whatever a Run's files hold, a notebook's cell must end
        return str(Markup("<p><b>{}</b>: {}</p>").format(type(error).__name__, str(error)))
