"""The code of every page of the documentation runs as it is written, and prints what the page shows."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import page_code
from batchnorm.bench.record import has_glibc

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# What a page prints without an output block: in any case, anywhere in the output.
PROMISED = {
    "docs/surgery.md": (
        "hardly trained",  # check
        "too-few-steps",  # compare
        "2 batch norm layers recalibrated",
        "1 batch norm layer frozen",
        "\nFalse\n",  # still not in training after train()
        "2 of 2 batch norm layers folded",
        "for keras",
        "gamma and beta undo it: of 16 units, 100% are undone;",
    ),
    "docs/variants.md": (
        "accumulated as one batch: True",
        "valid positions alone: True",
        "nothing elsewhere: True",
        "a batch of one: torch.Size([1, 64])",
        "apart: tensor(True)",
        "averaged over 3 states",
    ),
    "docs/watch.md": ("undo_index", "bare normalization"),
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def has_code(page: Path) -> bool:
    blocks = page_code.blocks_of(page.read_text(encoding="utf-8"))
    return any(block.language in ("python", "console") for block in blocks)


WITH_CODE = [page for page in PAGES if has_code(page)]  # the README first


@pytest.mark.parametrize(
    "page", [WITH_CODE[0], *(pytest.param(page, marks=pytest.mark.slow) for page in WITH_CODE[1:])], ids=name_of
)
def test_the_code_of_a_page_runs_and_prints_what_the_page_shows(page: Path, tmp_path: Path) -> None:
    if "torchrun" in page.read_text(encoding="utf-8") and not torch.distributed.is_available():
        pytest.skip("PyTorch without torch.distributed")
    if page.name == "allocator.md" and not maps_small_pages():
        pytest.skip("the page is about glibc and pages of 4 KiB")
    result = page_code.run(page, tmp_path)
    for block, printed in page_code.differences(page, result):
        pytest.fail(f"{page}:{block.line}: the page shows\n{block.text}\nand its code prints\n{printed}")
    printed = result.printed.lower()
    assert not [promise for promise in PROMISED.get(name_of(page), ()) if promise.lower() not in printed]
    also = ALSO.get(name_of(page))
    if also:
        also(result)


def maps_small_pages() -> bool:
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    return has_glibc() and (not huge.exists() or "[always]" not in huge.read_text(encoding="utf-8"))


def every_process_has_the_same_statistics(result: page_code.Result) -> None:
    (printed,) = (printed for command, printed in result.commands.items() if command.startswith("torchrun"))
    means = dict(re.findall(r"process (\d): 1 batch norm layer synchronized, running mean (-?\d+\.\d{6})", printed))
    assert means.keys() == {"0", "1"}
    assert means["0"] == means["1"]


def the_report_is_written(result: page_code.Result) -> None:
    assert [command.split()[0] for command in result.commands] == ["python", "batchnorm", "batchnorm", "batchnorm"]
    report = (result.folder / "runs" / "first" / "report.html").read_text(encoding="utf-8")
    assert "undo batch normalization" in report
    assert len(report) > 100_000


ALSO = {"docs/variants.md": every_process_has_the_same_statistics, "docs/watch.md": the_report_is_written}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_blocks_compile(page: Path) -> None:
    for block in page_code.blocks_of(page.read_text(encoding="utf-8")):
        if block.language == "python":
            compile(block.text, f"{page}:{block.line}", "exec")


def test_the_numbers_that_the_page_about_watch_names_are_those_of_the_code() -> None:
    from batchnorm.recording._recorder import writer
    from batchnorm.recording.steps import log_spaced

    page = " ".join((DOCS / "watch.md").read_text(encoding="utf-8").split())
    wanted = log_spaced()
    dense = next(step for step in range(1, 1000) if not wanted(step))
    assert f"all of the first {dense} steps" in page
    assert "105 of the first" in page
    assert f"at most the last {writer.AGE:.0f} seconds" in page
    assert writer.SHARE == 0.01
    assert f"{writer.HELD // 2**20} MB at most" in page


def prose_of(page: Path) -> str:
    return re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def anchors_of(page: Path, level: str = "#+") -> set[str]:
    """The anchors of a page's headings, as mkdocs makes them."""
    headings = re.findall(rf"^{level} (.*)$", prose_of(page), re.MULTILINE)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", sorted((DOCS / "how-to").glob("*.md")), ids=name_of)
def test_links_of_the_how_to_pages_lead_to_a_page_and_a_heading(page: Path) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", prose_of(page)):
        goal = (page.parent / target).resolve() if target else page
        assert goal.is_file(), target
        assert not anchor or anchor in anchors_of(goal), f"{target}#{anchor}"


def test_the_table_of_symptoms_links_every_section_of_the_how_to_pages() -> None:
    linked = set(re.findall(r"\]\(([\w-]+\.md#[\w-]+)\)", (DOCS / "how-to" / "index.md").read_text(encoding="utf-8")))
    pages_of_sections = sorted(set((DOCS / "how-to").glob("*.md")) - {DOCS / "how-to" / "index.md"})
    sections = {f"{page.name}#{anchor}" for page in pages_of_sections for anchor in anchors_of(page, "##")}
    assert linked == sections
    assert len(sections) == 37


# The mechanism itself, on pages that are wrong.


def page_of(folder: Path, text: str) -> Path:
    page = folder / "page.md"
    page.write_text(text, encoding="utf-8")
    return page


def test_a_page_that_shows_a_wrong_output_is_found(tmp_path: Path) -> None:
    page = page_of(tmp_path, "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n")
    ((block, printed),) = page_code.differences(page, page_code.run(page, tmp_path))
    assert (block.line, block.text, printed) == (6, "3\n", "2\n")


def test_write_puts_the_real_output_on_the_page(tmp_path: Path) -> None:
    page = page_of(tmp_path, "```python\nprint(1 + 1)\n```\n\n```text\n3\n4\n```\n\nmore\n")
    assert page_code.write(page, page_code.run(page, tmp_path)) == 1
    assert page.read_text(encoding="utf-8") == "```python\nprint(1 + 1)\n```\n\n```text\n2\n```\n\nmore\n"


@pytest.mark.parametrize("code", ["1 / 0", "import warnings; warnings.warn('old')", "print(undefined)"])
def test_a_page_whose_code_fails_or_warns_is_found_at_its_line(code: str, tmp_path: Path) -> None:
    page = page_of(tmp_path, f"# Page\n\n```python\nx = 1\n```\n\n```python\n{code}\n```\n")
    with pytest.raises(page_code.PageError, match=r'page.py", line 8'):
        page_code.run(page, tmp_path)


def test_the_blocks_of_a_page_are_one_program_and_files_are_apart(tmp_path: Path) -> None:
    page = page_of(
        tmp_path,
        "```python\nx = 1\nprint('a')\n```\n\n```text\na\n```\n\n`said.py`:\n\n```python\nprint('b')\n```\n\n"
        "```console\n$ python said.py\n```\n\n```text\nb\n```\n\n```python\nfor _ in range(3):\n    print(x)\n```\n\n"
        "```text\n1\n...\n```\n",
    )
    result = page_code.run(page, tmp_path)
    assert result.commands == {"python said.py": "b\n"}
    assert not list(page_code.differences(page, result))
    assert set(result.outputs.values()) == {"a\n", "b\n", "1\n1\n1\n"}


def test_commands_that_fail_or_are_unknown_are_found(tmp_path: Path) -> None:
    for command in ("batchnorm check nothing.pt", "rm -r /tmp/nothing"):
        with pytest.raises(page_code.PageError, match=re.escape(command.split()[-1])):
            page_code.run(page_of(tmp_path, f"```console\n{command}\n```\n"), tmp_path)


def test_commands_about_files_of_the_reader_are_not_run(tmp_path: Path) -> None:
    page = page_of(tmp_path, "```sh\nbatchnorm check FILE\npip install x\n```\n\n    batchnorm show runs/a\n")
    assert not page_code.run(page, tmp_path).commands


def test_dots_match_any_lines() -> None:
    assert page_code.agree("a\n...\nc\n", "a  \nb\nb\nc\n\n")
    assert page_code.agree("a\n...\n", "a\n")
    assert not page_code.agree("a\n...\nc\n", "a\nb\n")
    assert not page_code.agree("a.c\n", "abc\n")


def test_rounding_errors_match_each_other() -> None:
    assert page_code.agree("off by 1.2e-07 (RMS 3e-08)\n", "off by 9.8e-08 (RMS 2.5e-08)\n")
    assert not page_code.agree("off by 1.2e-07\n", "off by 1.2e-01\n")
    assert not page_code.agree("bound 1e-05\n", "bound 2e-05\n")


def test_figures_of_a_training_may_differ_a_little() -> None:
    shown = "of 96 units, 10.4% moved; index -0.35\n...\n"
    assert page_code.agree(shown, "of 96 units, 12% moved; index -0.31\nmore\n", trained=True)
    assert not page_code.agree(shown, "of 96 units, 12% moved; index -0.31\nmore\n")
    for printed in (
        "of 96 units, 32% moved; index -0.35",
        "of 96 units, 10% moved; index 0.35",
        "of 95 units, 10% moved; index -0.35",
    ):
        assert not page_code.agree(shown, printed + "\n", trained=True)
