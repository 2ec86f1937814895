"""What kind of layer a batch norm is and which layer feeds it, in a few words."""

from __future__ import annotations

PARAMETRIZED = ".parametrizations."


def module_of(parameter: str) -> str:
    """The module that has this parameter: "conv1" of "conv1.weight"."""
    return parameter.partition(PARAMETRIZED)[0] if PARAMETRIZED in parameter else parameter.rpartition(".")[0]


def brief(name: str, kind: str, producer: str) -> str:
    """For a narrow column: "BN2d on conv1". The producer's name is without the beginning that the layer's has, too."""
    fed = producer.removeprefix(name.rpartition(".")[0] + ".")
    return " ".join(filter(None, (kind.replace("BatchNorm", "BN"), f"on {fed}" if fed else "")))
