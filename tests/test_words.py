"""The rule from classes to a verdict, and the words that go with it."""

from __future__ import annotations

import numpy as np
import pytest

from batchnorm.quantities import CLASSES
from batchnorm.words import CLASS_NAMES, WORDS, ClassCounts


def counts(**units: int) -> ClassCounts:
    return ClassCounts(tuple(units.get(name, 0) for name in CLASSES))


@pytest.mark.parametrize(
    ("units", "verdict"),
    [
        ({}, "unknown"),
        ({"undone": 51, "away": 49}, "yes"),
        ({"undone": 50, "away": 50}, "partly"),
        ({"undone": 11, "away": 89}, "partly"),
        ({"undone": 10, "toward": 90}, "no"),
        ({"away": 100}, "no"),
        ({"dead": 100}, "dead"),
        ({"dead": 51, "undone": 49}, "dead"),
        ({"dead": 50, "undone": 50}, "partly"),
        ({"dead": 40, "undone": 60}, "yes"),
        ({"nothing_to_undo": 60, "away": 40}, "nothing to undo"),
        ({"unknown": 30, "dead": 25, "nothing_to_undo": 5, "undone": 40}, "unknown"),
        ({"unknown": 25, "dead": 30, "nothing_to_undo": 5, "undone": 40}, "dead"),
        ({"undone": 1}, "yes"),
    ],
)
def test_the_verdict(units: dict[str, int], verdict: str) -> None:
    found = counts(**units)
    assert found.verdict == verdict
    assert found.word == WORDS[verdict]


def test_counts_of_codes_and_totals() -> None:
    codes = np.array([[0, 0, 3], [5, 6, np.nan]])
    found = ClassCounts.of(codes)
    assert found.as_dict() == {**dict.fromkeys(CLASSES, 0), "undone": 2, "away": 1, "dead": 1, "unknown": 1}
    assert (found.units, found.moving, found.live) == (5, 3, 3)
    assert ClassCounts.total_of([found, found]).counts == tuple(2 * count for count in found.counts)
    assert ClassCounts.total_of([]) == ClassCounts()
    assert np.isnan(ClassCounts().share("undone"))


def test_shares_in_words_add_up_and_leave_out_what_there_is_none_of() -> None:
    text = counts(undone=60, toward=115, neither=179, away=313, nothing_to_undo=3, dead=18).text()
    assert text == (
        "8.7% are undone, 16.7% moved toward it, 26% did neither, 45.5% moved away from it, 0.4% had nothing to undo "
        "and 2.6% are dead"
    )
    assert counts(undone=9999, away=1).text() == "over 99.9% are undone and under 0.1% moved away from it"


def test_every_class_has_a_name() -> None:
    assert set(CLASS_NAMES) == set(CLASSES)
    assert CLASS_NAMES["nothing_to_undo"] == "nothing to undo"
