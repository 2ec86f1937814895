"""A study's Run -> the answer to "do gamma and beta undo batch normalization?", in words computed from its numbers.

Three parts: could they, do they, and what stays when they do. Where something was not measured, the answer says so.
"""

from __future__ import annotations

from dataclasses import dataclass

from batchnorm import words
from batchnorm.record.run import Run
from batchnorm.report.findings import SAME_FUNCTION, Could, End, Findings, find
from batchnorm.report.measured import Study
from batchnorm.report.parts import Part, by_layer, differ
from batchnorm.report.stays import stays
from batchnorm.words import count, index, number, percent, times

MOST = 0.5
FEW = 0.1


@dataclass(frozen=True)
class Answer:
    """The headline sentence, and the three parts. `verdict`: "yes", "partly", "no" or "unknown"."""

    verdict: str
    headline: str
    could: Part
    do: Part
    stays: Part

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        return self.could, self.do, self.stays

    def lines(self) -> list[str]:
        """For the terminal: the headline, then a paragraph a part."""
        return [self.headline, *(f"{part.question} {part.text}" for part in self.parts)]


def answer(run: Run) -> Answer:
    """The answer of a study's Run. Raises RunError only where one of its tables is damaged."""
    return tell(find(Study.read(run)))


def tell(findings: Findings) -> Answer:
    """The words for the numbers."""
    verdict = _verdict(findings.learned)
    return Answer(verdict, _headline(findings, verdict), _could(findings.could), _do(findings), stays(findings))


def _verdict(learned: End) -> str:
    if not learned.known:
        return "unknown"
    if not learned.share.agrees(MOST):
        return "partly"
    if learned.share.median > MOST:
        return "yes"
    return "partly" if learned.share.median > FEW else "no"


def _headline(findings: Findings, verdict: str) -> str:
    learned, undone = findings.learned, findings.undone
    if verdict == "unknown":
        return f"{_lacking(learned)} to say whether gamma and beta undo batch normalization."
    share = percent(learned.share.median)
    result = f"{share} of the units come nearer to undone than to bare normalization"
    if verdict == "yes":
        head = f"Yes, here they do: learned from gamma = 1 and beta = 0, {result}"
    elif verdict == "partly":
        disagree = "" if learned.share.agrees(MOST) else ", and the seeds disagree"
        head = f"In part{disagree}: learned from gamma = 1 and beta = 0, {result}"
    else:
        could = "Gamma and beta could undo batch normalization, but learned" if findings.could.reached else "Learned"
        some = "none" if learned.share.high == 0 else f"only {share}"
        end = f"{some} of the units come nearer to undone than to bare normalization"
        head = f"No. {could} from gamma = 1 and beta = 0, {end}"
    if not undone.known:
        return f"{head}."
    stay = undone.share.median
    if stay > MOST:
        return f"{head}; started undone, {percent(stay)} stay nearer to undone."
    return f"{head}; {'even ' if verdict == 'no' else ''}started undone, {percent(stay)} stay nearer to undone."


def _could(could: Could) -> Part:
    question = "Could they?"
    if could.largest != could.largest:
        text = "Not known: the network that starts undone was not compared with the one without batch normalization."
        return Part(question, words.UNKNOWN, "difference at step 0", (text,))
    seeds = "one seed" if could.seeds == 1 else f"the largest over {could.seeds} seeds"
    largest = number(could.largest)
    if could.reached:
        first = (
            "Yes. Set to undo it, at step 0 and in inference mode, the network with batch normalization gives the same "
            f"logits as the one without, to within {largest} ({seeds})."
        )
    else:
        first = (
            "The identity was not reached here: at step 0 and in inference mode the logits of `undone` and `none` "
            f"differ by up to {largest} ({seeds}), more than {SAME_FUNCTION:g}: they did not start as one function."
        )
    sentences = [first]
    if could.rms.known:
        relative = f", {times(could.relative.median)} the logits' own deviation" if could.relative.known else ""
        sentences.append(
            f"Batch by batch, as in training, an RMS difference of {could.rms.text(number)} remains{relative}: mean "
            "and deviation change from batch to batch, gamma and beta do not, so no constants can undo that part."
        )
    return Part(question, largest, "largest difference of logits at step 0, in inference mode", tuple(sentences))


def _do(findings: Findings) -> Part:
    learned, undone, optimal = findings.learned, findings.undone, findings.optimal
    label = "of the units end nearer to undone than to bare normalization, learned from gamma = 1, beta = 0"
    gone = findings.diverged
    sentences = [
        f"{_verdict_words(learned)} {_learned_words(learned, gone.get('learned', 0))}",
        _undone_words(undone, gone.get("undone", 0)),
    ]
    if optimal.known:
        arrives = optimal.share.median > MOST
        sentences.append(
            f"Where undoing is optimal (the target is the un-normalized input), gradient descent ends at "
            f"{optimal.index.text(index)} with {percent(optimal.share.median)} of the units nearer to undone"
            + (": they can find the way when the loss asks for it." if arrives else ": there, too, they do not arrive.")
        )
    else:
        sentences.append("The task where undoing is optimal was not measured far enough to compare.")
    figure = percent(learned.share.median) if learned.known else words.UNKNOWN
    return Part("Do they?", figure, label, tuple(sentences))


def _verdict_words(learned: End) -> str:
    if not learned.known:
        return f"{_lacking(learned)} to say."
    share = learned.share
    if not share.agrees(MOST):
        return "The seeds disagree."
    if share.median > MOST:
        return "Yes, nearly all do." if share.median > 1 - FEW else "Yes, here most do."
    if share.median > FEW:
        return "Some do."
    return "None does." if share.high == 0 else "Rarely."


def _learned_words(learned: End, diverged: int) -> str:
    if not learned.share.known:
        return f"{_unknown_words('learned', diverged)} (gamma = 1 and beta = 0 at the start)."
    return (
        f"At step {count(learned.step)}, `learned` (gamma = 1 and beta = 0 at the start) has a median undo_index of "
        f"{learned.index.text(index)}, where 0 is bare normalization and 1 the identity; "
        f"{learned.share.text(percent)} of its units are nearer to undone than to bare normalization."
        f"{_position_words(learned)}{'' if learned.trained else ' It had not got clear of guessing by then.'}"
    )


def _lacking(end: End) -> str:
    """What a claim about this arm would need: before a network learns, gamma and beta stand where they started."""
    return "Too little was learned" if end.enough and end.share.known else "Too little was measured"


def _unknown_words(arm: str, diverged: int) -> str:
    if diverged:
        return f"`{arm}` diverged in {'one seed' if diverged == 1 else f'{diverged} seeds'}, and no other was measured"
    return f"Nothing is known of `{arm}`"


def _position_words(end: End) -> str:
    if not end.position.known:
        return ""
    restored = end.position.text(index)
    return f" Whatever the weights' scale, the median unit's beta/gamma is {restored} of mean/s (undone: 1, bare: 0)."


def _undone_words(undone: End, diverged: int) -> str:
    if not undone.share.known:
        return f"{_unknown_words('undone', diverged)} (the same network started undone)."
    numbers = f"a median undo_index of {undone.index.text(index)} and {undone.share.text(percent)} of the units"
    if not undone.enough:
        return f"`undone` was followed to step {count(undone.step)} only: {numbers} nearer to undone."
    if not undone.trained:
        return f"`undone` had not got clear of guessing at step {count(undone.step)}: {numbers} nearer to undone."
    fate = "most stay" if undone.share.median > MOST else "most leave"
    if not undone.share.agrees(MOST):
        fate = "the seeds disagree on whether most stay"
    layers = (
        f" Its layers, from the input up, end at {by_layer(undone.layers, index)}." if differ(undone.layers) else ""
    )
    return (
        f"Started undone, {fate}: `undone` ends, at step {count(undone.step)}, with {numbers} nearer to undone.{layers}"
        f"{_position_words(undone)}"
    )
