"""A study's answer in words.

The first screen has a word and a number. Three parts follow: could they undo it, do they, and what remains if they do.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from batchnorm import words
from batchnorm.report.page import Bar, BarGroup, Lead, Part, by_layer, differ
from batchnorm.report.study.numbers import ABOVE_CHANCE, NEAR_THE_BEST, Diverted, End, Study, best, last_step, paired
from batchnorm.report.tables import Array
from batchnorm.words import WORDS, Spread, accuracy, angle, count, index, number, percent, share, times

SAME_FUNCTION = 1e-4
"""Threshold of the logits' difference: below it, two networks are the same function up to rounding."""


def _stays_part(study: Study) -> Part:
    undone = Diverted.of_arm(study, "undone")
    label = "of the gradient's energy never reaches the layers below, "
    if undone.start.known:
        figure, label = undone.start, f"{label}even with gamma and beta set to undo"
    else:
        figure, label = undone.after, f"{label}when training starts undone"
    sentences = (_diverted_words(study, undone), _difference_words(study), _faster_words(study))
    return Part("What stays when they do?", percent(figure.median), label, sentences)


def _diverted_words(study: Study, undone: Diverted) -> str:
    after = undone.after.text(percent)
    if undone.start.known:
        text = (
            f"At step 0, where `undone` is set to undo, {undone.start.text(percent)} of the gradient's energy goes "
            "to gamma and beta instead of the layers below (median over units)"
        )
        if undone.after.known:
            text += f"; over the measured steps after that {after}"
    elif undone.after.known:
        text = f"Of the gradient's energy, {after} goes to gamma and beta instead of the layers below in `undone`"
    else:
        return "How much of the gradient is diverted in `undone` is not known."
    learned = Diverted.of_arm(study, "learned").after
    if learned.known:
        text += f", and in `learned` {learned.text(percent)}"
    if differ(undone.layers):
        peaks = by_layer(undone.layers, percent)
        return f"{text}. At its highest it is {peaks} in the layers of `undone`, from the input up."
    return f"{text}."


def _difference_words(study: Study) -> str:
    """The step from which on the held-out losses of `undone` and `none` differ by more than those of the seeds."""
    logits = last_step(study.parting)
    apart, distance = _relative(logits["rms"], logits["logit_std"]), ""
    if apart.known:
        distance = (
            f" At step {count(float(logits['step'].max()))} their logits differ by an RMS of "
            f"{times(apart.median)} the logits' standard deviation."
        )
    steps, (a, b) = paired("loss", study.sound(study.curves, "undone"), study.sound(study.curves, "none"))
    both = np.isfinite(a) & np.isfinite(b)
    seeds, enough = int(both.any(axis=0).sum()), both.sum(axis=1) >= 2
    if seeds == 0:
        return f"From which step on `undone` and `none` differ is not known.{distance}"
    if seeds == 1:
        return f"With one seed, there is no spread to compare with the difference of `undone` and `none`.{distance}"
    a, b = np.where(both, a, np.nan)[enough], np.where(both, b, np.nan)[enough]
    between_seeds = np.maximum(np.nanmax(a, 1) - np.nanmin(a, 1), np.nanmax(b, 1) - np.nanmin(b, 1))
    differs = np.abs(np.nanmean(a - b, axis=1)) > between_seeds
    if not differs.any():
        return (
            "The held-out losses of `undone` and `none` differ by no more than the spread between the "
            f"{seeds} seeds at every measured step.{distance}"
        )
    first = int(np.argmax(differs))
    share_of_later = float(differs[first:].mean())
    where = "" if share_of_later == 1 else f", at {percent(share_of_later)} of the measured steps"
    return (
        f"From step {count(steps[enough][first])} on, the held-out losses of `undone` and `none` differ by more than "
        f"the spread between seeds{where}.{distance}"
    )


def _relative(rms: Array, deviation: Array) -> Spread:
    return Spread.of(rms / np.where(deviation > 0, deviation, np.nan))


def _rough(ratio: float) -> str:
    """Two digits: more would not be accurate, as measured steps are 20% apart."""
    return f"{ratio:.0f}" if ratio >= 9.5 else f"{ratio:.1f}"


def _faster_words(study: Study) -> str:
    """Which arm first reaches NEAR_THE_BEST of the lower of both best accuracies."""
    curves = {arm: study.sound(study.curves, arm) for arm in ("undone", "none")}
    bests = {arm: best(curve) for arm, curve in curves.items()}
    target = NEAR_THE_BEST * float(np.min([*bests.values()]))
    if not math.isfinite(target + study.chance):
        return "Which learns faster is not known."
    learners = [arm for arm, most in bests.items() if NEAR_THE_BEST * most >= ABOVE_CHANCE * study.chance]
    if len(learners) < 2:
        who = f"{f'only `{learners[0]}`' if learners else 'neither'} gets better than guessing"
        most = f"best accuracy {accuracy(bests['undone'])} and {accuracy(bests['none'])}"
        return f"Of `undone` and `none`, {who} within the measured steps ({most})."
    steps, matrices = paired("accuracy", *curves.values())
    reached = [  # the first step per seed; NaN if it has none
        np.where((matrix >= target).any(axis=0), steps[np.argmax(matrix >= target, axis=0)], np.nan)
        for matrix in matrices
    ]
    ratio = Spread.of(np.maximum(reached[1], 1) / np.maximum(reached[0], 1))
    if not ratio.known:
        return f"Which learns faster is not known: no seed reaches {accuracy(target)} accuracy in both arms."
    arms = [(arm, Spread.of(at).median) for arm, at in zip(curves, reached, strict=True)]
    if ratio.low <= 1 <= ratio.high:
        head = "Neither learns clearly faster: `undone`"
        factor = f"the ratio of steps is {ratio.text(_rough)}"
    else:
        if ratio.median < 1:
            arms.reverse()
            ratio = Spread(1 / ratio.median, 1 / ratio.high, 1 / ratio.low, ratio.count)
        head = f"`{arms[0][0]}` learns faster: it"
        factor = f"{ratio.text(_rough)} times as many steps"
    (_, first_step), (second, second_step) = arms
    first = f"{accuracy(target)} accuracy at step {count(first_step)}"
    return f"{head} reaches {first}, `{second}` at step {count(second_step)}, {factor}."


QUESTION = "Do gamma and beta undo batch normalization?"


@dataclass(frozen=True)
class Answer:
    """The first screen, the headline and the three parts; `verdict` is a key of `words.WORDS`."""

    verdict: str
    lead: Lead
    headline: str
    could: Part
    do: Part
    stays: Part

    @property
    def parts(self) -> tuple[Part, Part, Part]:
        return self.could, self.do, self.stays

    def lines(self) -> list[str]:
        """Paragraphs for the terminal: the headline, then one per part; the first two parts begin with their figure."""
        by_word = (f"{part.question} {part.figure}. {part.text}" for part in (self.could, self.do))
        return [self.headline, *by_word, f"{self.stays.question} {self.stays.text}"]


def answer(study: Study) -> Answer:
    """The answer of a study. Missing arms, seeds, steps or values make parts of it unknown and never raise."""
    ends = {arm: End.of_arm(study, arm) for arm in ("learned", "fixed", "undone")}
    learned, _, undone = ends.values()
    could = _could_part(study)
    headline = _headline(learned, undone, could.figure == "Yes")
    return Answer(learned.verdict, _lead(ends), headline, could, _do_part(study, learned, undone), _stays_part(study))


def _lead(ends: Mapping[str, End]) -> Lead:
    learned = ends["learned"]
    groups = []
    for arm, end in ends.items():
        classes = (
            (layer, words.ClassCounts.of(end.rows.rows(layer=layer)["code"])) for layer in end.rows.names("layer")
        )
        groups.append(BarGroup(arm, tuple(Bar(layer, counts) for layer, counts in classes if counts.units)))
    return Lead(
        QUESTION,
        WORDS[learned.verdict],
        share(learned.classes.share("undone")) if learned.measured else words.UNKNOWN,
        "of the units that started at gamma = 1 and beta = 0 are undone at the last step",
        tuple(group for group in groups if group.bars),
    )


def _headline(learned: End, undone: End, could: bool) -> str:
    verdict = learned.verdict
    if verdict in ("unknown", "too early"):
        return f"{_lacking(learned)} to say whether gamma and beta undo batch normalization."
    start = "learned from gamma = 1 and beta = 0"
    text = learned.classes.text()
    if verdict == "yes":
        head = f"Yes, here they do: {start}, {_share(learned, 'undone')} of the units end undone"
    elif verdict == "partly":
        disagree = "" if learned.agree else ", and the seeds disagree"
        head = f"In part{disagree}: {start}, {_share(learned, 'undone')} of the units end undone, {_moves(learned)}"
    elif verdict == "no":
        who = "Gamma and beta could undo batch normalization, but learned" if could else "Learned"
        ended = learned.share("undone")
        some = "none of the units ends" if ended.high == 0 else f"only {percent(ended.median)} of the units end"
        head = f"No. {who} from gamma = 1 and beta = 0, {some} undone, {_moves(learned)}"
    elif verdict == "dead":
        head = f"Most units are dead: {start}, the units are {text}"
    else:
        head = f"There is little to undo: {start}, of the units {text}"
    if not undone.known:
        return f"{head}."
    few = undone.share("undone").median <= words.MOST
    even, only = ("even ", "only ") if verdict == "no" and few else ("", "")
    return f"{head}; {even}when started undone, {only}{_share(undone, 'undone')} end undone, {_moves(undone)}."


def _share(end: End, name: str) -> str:
    return percent(end.share(name).median)


def _moves(end: End) -> str:
    """The shares of the units that moved toward the identity and away from it."""
    moves = (("toward", "moved toward it"), ("away", "moved away from it"))
    parts = [f"{_share(end, name)} {text}" for name, text in moves if end.classes[name]]
    return words.listing(parts) if parts else "none moved toward it or away from it"


def _could_part(study: Study) -> Part:
    """How the logits of `undone` and `none` differ at step 0: at most in inference mode, and per batch in training."""
    inference, training = study.start.rows(mode="inference"), study.start.rows(mode="training")
    question, most, count = "Could they?", words.quantile(inference["max"], 1), len(np.unique(inference["seed"]))
    if math.isnan(most):
        text = "The network that starts undone was not compared with the one without batch normalization."
        return Part(question, WORDS["unknown"], "it was not compared at step 0", (text,))
    seeds = "one seed" if count == 1 else f"the largest over {count} seeds"
    largest = number(most)
    if most <= SAME_FUNCTION:
        figure, label = "Yes", f"set to undo it, the logits are equal to within {largest} in inference mode"
        sentence = (
            "At step 0 and in inference mode, the network with gamma and beta set to undo gives the same logits as the "
            f"network without batch normalization, to within {largest} ({seeds})."
        )
    else:
        figure, label = "Not here", f"set to undo it, the logits differ by up to {largest} in inference mode"
        sentence = (
            "The identity was not reached here: at step 0 and in inference mode the logits of `undone` and `none` "
            f"differ by up to {largest} ({seeds}), more than {SAME_FUNCTION:g}. So they did not start as one function."
        )
    sentences = [sentence]
    rms = np.sqrt(training.with_column("square", training["rms"] ** 2).means("square", ("seed",))["square"])
    if Spread.of(rms).known:
        relative = _relative(rms, training.means("logit_std", ("seed",))["logit_std"])
        deviation = f", {times(relative.median)} the logits' standard deviation" if relative.known else ""
        sentences.append(
            f"With batch statistics, as in training, an RMS difference of {Spread.of(rms).text(number)} remains"
            f"{deviation}: mean and deviation change from batch to batch, and constant gamma and beta cannot undo that."
        )
    return Part(question, figure, label, tuple(sentences))


def _do_part(study: Study, learned: End, undone: End) -> Part:
    optimal = End(last_step(study.optimal))
    diverged = Counter(arm for _, arm, _ in study.diverged)
    sentences = [_learned_words(learned, diverged["learned"]), _undone_words(undone, diverged["undone"])]
    if optimal.known:
        undoes = optimal.classes.verdict == "yes"
        sentences.append(
            f"Where undoing is optimal (the target is the un-normalized input), gradient descent ends at "
            f"{optimal.index.text(index)} with {_share(optimal, 'undone')} of the units undone"
            + (": they learn to undo if the loss asks for it." if undoes else ": even there they do not learn to.")
        )
    else:
        sentences.append("The task where undoing is optimal was not measured for enough steps to compare.")
    label = f"{_share(learned, 'undone')} of the units end undone" if learned.measured else "it was not measured"
    return Part("Do they?", WORDS[learned.verdict], label, tuple(sentences))


def _learned_words(learned: End, diverged: int) -> str:
    if not learned.measured:
        return f"{_unknown_words('learned', diverged)} (gamma = 1 and beta = 0 at the start)."
    early = "" if learned.known else f"{_lacking(learned)} to say. "
    disagree = "" if learned.agree else "The seeds disagree. "
    untrained = "" if learned.trained else " It was not better than guessing by then."
    return (
        f"{early}{disagree}At step {count(learned.step)}, `learned` (gamma = 1 and beta = 0 at the start) has a median "
        f"undo_index of {learned.index.text(index)}, where 0 is bare normalization and 1 the identity; of its units, "
        f"{learned.classes.text()}.{_angle_words(learned)}{untrained}"
    )


def _lacking(end: End) -> str:
    """Why nothing can be said about this arm: before a network learns, gamma and beta keep their initial values."""
    return "Too little was learned" if end.enough and end.measured else "Too little was measured"


def _unknown_words(arm: str, diverged: int) -> str:
    if diverged:
        return f"`{arm}` diverged in {words.plural(diverged, 'seed')}, and no other was measured"
    return f"`{arm}` was not measured"


def _angle_words(end: End) -> str:
    undo, bare = end.median("undo_angle", live=True), end.median("bare_angle", live=True)
    if not (undo.known and bare.known):
        return ""
    return (
        f" Independently of the scale of the weights, the median undo_angle of its live units is "
        f"{undo.text(angle)}; 0° is undone, and bare normalization has {angle(bare.median)}."
    )


def _undone_words(undone: End, diverged: int) -> str:
    if not undone.measured:
        return f"{_unknown_words('undone', diverged)} (the same network started undone)."
    numbers = f"a median undo_index of {undone.index.text(index)}; of its units, {undone.classes.text()}"
    if not undone.enough:
        return f"`undone` was measured only to step {count(undone.step)}: {numbers}."
    if not undone.trained:
        return f"`undone` was not better than guessing at step {count(undone.step)}: {numbers}."
    fates = {"yes": "most stay", "dead": "most die", "nothing to undo": "most have nothing left to undo"}
    fate = fates.get(undone.verdict, "most leave" if undone.share("undone").median <= words.MOST else "most stay")
    if not undone.agree:
        fate = "it is unclear whether most stay (the seeds disagree)"
    layers = (
        f" Its layers, from the input up, end at {by_layer(undone.layers, index)}." if differ(undone.layers) else ""
    )
    head = f"Of the units that start undone, {fate}: at step {count(undone.step)}, `undone` has {numbers}."
    return f"{head}{layers}{_angle_words(undone)}"
