"""What all tests share: seeds, memory that shows what a kernel did not write, and the two ways to a kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import settings

from batchnorm import kernels
from batchnorm.kernels.cpu import cost
from randomness import SEED

settings.register_profile("tests", deadline=None, print_blob=True, derandomize=SEED == 0)
settings.load_profile("tests")


LONG = ("test_gpu.py", "test_folding.py")
"""Files that begin first: one that takes a minute would run alone at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_report_header() -> str:
    return f"BATCHNORM_SEED={SEED}"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """torch.empty returns NaN, so that an element a kernel forgot to write is seen."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(scope="module", params=["kernel by size", "cpu kernel"])
def kernel_route(request: pytest.FixtureRequest) -> Iterator[str]:
    """Once as users have it, where the small tensors of tests go to PyTorch's operators; once by the CPU kernel."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "cpu kernel":
            patch.setattr(kernels, "why_unsupported", lambda x, *_: cost.why_unsupported(x, True, True, tapped=True))
        yield request.param
