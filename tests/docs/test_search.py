"""The search of the site has the right page among the first three, for the questions that users ask most.

The ranking is the site's: its own search worker runs on the built index, in node.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
FIRST = 3
QUESTIONS = {
    "train eval accuracy differs": ["how-to/train-and-eval"],
    "freeze batch norm": ["how-to/fine-tuning-and-averages", "tutorials/frozen"],
    "fold batch norm into convolution": ["how-to/checkpoints-and-exports", "tutorials/ship"],
    "SyncBatchNorm CPU": ["how-to/many-processes"],
    "undo_index": ["quantities"],
    "momentum convention keras": ["how-to/checkpoints-and-exports", "explanation/frameworks"],
    "environment variables": ["reference/environment"],
    "NaN running_var": ["how-to/train-and-eval"],
    "Expected more than 1 value per channel when training": ["how-to/small-batches"],
    "small batch size": ["how-to/small-batches"],
    "gradient accumulation": ["how-to/small-batches"],
    "padding sequences": ["how-to/sequences-and-several-inputs"],
    "GAN discriminator": ["how-to/sequences-and-several-inputs"],
    "weight decay gamma beta": ["how-to/fine-tuning-and-averages"],
    "EMA weights worse": ["how-to/fine-tuning-and-averages"],
    "torch.compile graph break": ["how-to/compile-and-speed"],
    "activation checkpointing": ["how-to/compile-and-speed"],
    "ONNX export": ["how-to/checkpoints-and-exports"],
    "recalibrate": ["reference/surgery"],
    "dead units": ["findings"],
    "command line options": ["reference/command-line"],
    "parquet columns": ["run-format"],
    "BatchNorm2d arguments": ["reference/layers"],
    "upgrade": ["changelog"],
}
"""A question, and the pages of which one is the answer."""


@pytest.fixture(scope="module")
def ranking(site: Path) -> dict[str, list[str]]:
    node = shutil.which("node")
    if node is None:
        pytest.skip("no node")
    (worker,) = (site / "assets" / "javascripts" / "workers").glob("search.*.min.js")
    done = subprocess.run(
        [node, str(Path(__file__).with_name("search.cjs")), str(worker), str(site / "search" / "search_index.json")],
        input=json.dumps(list(QUESTIONS)),
        capture_output=True,
        text=True,
        check=True,
    )
    pages = [[page.removesuffix(".html") for page in answer] for answer in json.loads(done.stdout)]
    return dict(zip(QUESTIONS, pages, strict=True))


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_right_page_is_among_the_first_three(question: str, ranking: dict[str, list[str]]) -> None:
    assert set(ranking[question][:FIRST]) & set(QUESTIONS[question]), ranking[question][:8]
