"""A part of the answer, and how its sentences speak of layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from batchnorm.words import listing

NOTABLE = 0.1
LISTED = 6


@dataclass(frozen=True)
class Part:
    """One question, the number that answers it (with a label), and the sentences around it; `arms` in backticks."""

    question: str
    figure: str
    label: str
    sentences: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.sentences)


def differ(layers: tuple[float, ...]) -> bool:
    """Whether a number for all layers together would hide what the layers do."""
    return len(layers) > 1 and max(layers) - min(layers) > NOTABLE


def by_layer(values: tuple[float, ...], form: Callable[[float], str]) -> str:
    """The layers' numbers in words, from the input up; their range where there are many layers."""
    if len(values) > LISTED:
        return f"{form(min(values))} to {form(max(values))}"
    return listing(form(value) for value in values)
