"""What stays when gamma and beta undo: the gradient that is diverted, when the arms part, and who learns faster."""

from __future__ import annotations

from batchnorm import words
from batchnorm.report.parts import Part, by_layer, differ
from batchnorm.report.study.numbers import Faster, Findings
from batchnorm.words import accuracy, count, percent, times


def stays(findings: Findings) -> Part:
    """The third part of the answer."""
    diverted = findings.diverted["undone"]
    sentences = (_diverted_words(findings), _parting_words(findings), _faster_words(findings.faster))
    figure, label = (
        diverted.start,
        "of the gradient's energy never reaches the layers below, even with gamma and beta set to undo",
    )
    if not figure.known:
        figure, label = diverted.after, "of the gradient's energy never reaches the layers below, started undone"
    known = percent(figure.median) if figure.known else words.UNKNOWN
    return Part("What stays when they do?", known, label, sentences)


def _diverted_words(findings: Findings) -> str:
    undone, learned = findings.diverted["undone"], findings.diverted["learned"]
    if not undone.after.known and not undone.start.known:
        return "How much of the gradient is diverted when undone is not known."
    text = ""
    if undone.start.known:
        text = (
            f"At step 0, where `undone` is set to undo, {undone.start.text(percent)} of the gradient's energy goes "
            "to gamma and beta instead of the layers below (median over units)"
        )
    if undone.after.known:
        text += ("; " if text else "Of the gradient's energy, ") + (
            f"over the measured steps after that {undone.after.text(percent)}"
            if text
            else f"{undone.after.text(percent)} goes to gamma and beta instead of the layers below in `undone`"
        )
    if learned.after.known:
        text += f", and in `learned` {learned.after.text(percent)}"
    peak = ""
    if differ(undone.layers):
        peak = f" At its highest it is {by_layer(undone.layers, percent)} in the layers of `undone`, from the input up."
    return f"{text}.{peak}"


def _parting_words(findings: Findings) -> str:
    parting = findings.parting
    distance = ""
    if parting.distance.known:
        distance = (
            f" At step {count(parting.distance_step)} their logits differ by an RMS of "
            f"{times(parting.distance.median)} the logits' own deviation."
        )
    if parting.seeds == 0:
        return f"When `undone` and `none` part is not known.{distance}"
    if parting.seeds == 1:
        return f"One seed has no spread to hold the parting of `undone` and `none` against.{distance}"
    if parting.step != parting.step:
        return (
            f"At no measured step do the held-out losses of `undone` and `none` part by more than the spread between "
            f"the {parting.seeds} seeds.{distance}"
        )
    stays = " on" if parting.stays == 1 else f" on, at {percent(parting.stays)} of the measured steps"
    return (
        f"The held-out losses of `undone` and `none` part by more than the spread between seeds from step "
        f"{count(parting.step)}{stays}.{distance}"
    )


def _rough(ratio: float) -> str:
    """Two digits: the measured steps are themselves a fifth apart."""
    return f"{ratio:.0f}" if ratio >= 9.5 else f"{ratio:.1f}"


def _faster_words(faster: Faster) -> str:
    if not faster.known:
        return "Who learns faster is not known."
    if not (faster.undone_learns and faster.none_learns):
        learner = "undone" if faster.undone_learns else "none" if faster.none_learns else ""
        who = f"only `{learner}` gets clear of guessing" if learner else "neither gets clear of guessing"
        bests = f"best accuracy {accuracy(faster.best_undone)} and {accuracy(faster.best_none)}"
        return f"Of `undone` and `none`, {who} within the steps measured ({bests})."
    ratio = faster.ratio
    if not ratio.known:
        return f"Who learns faster is not known: no seed of both reaches {accuracy(faster.target)} accuracy."
    arms = [("undone", faster.undone), ("none", faster.none)]
    if ratio.low <= 1 <= ratio.high:
        head = "Neither learns clearly faster: `undone`"
        factor = f"the ratio of steps is {ratio.text(_rough)}"
    else:
        if ratio.median < 1:
            arms.reverse()
            ratio = ratio.inverse()
        head = f"`{arms[0][0]}` learns faster: it"
        factor = f"{ratio.text(_rough)} times as many steps"
    (_, its), (second, others) = arms
    at = f"{accuracy(faster.target)} accuracy at step {count(its.median)}"
    return f"{head} reaches {at}, `{second}` at step {count(others.median)}, {factor}."
