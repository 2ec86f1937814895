"""A record as tables: the cells, the groups, and what is red or missing."""

from pathlib import Path

import pytest

from batchnorm.bench import conduct, table
from batchnorm.bench import record as records
from batchnorm.bench.cases import Case
from batchnorm.bench.timing import Samples

ROUNDS = 3


def result(case: Case, **seconds: float) -> dict:
    """As it is stored, of contenders that take the same time in every round, where apart a quarter of it forward."""
    samples = {
        name.replace("_", " "): Samples([0.25 * s] * ROUNDS, [0.75 * s] * ROUNDS)
        if case.train and name not in ("floor", "jax")
        else Samples([s] * ROUNDS)
        for name, s in seconds.items()
    }
    return {
        "case": {"shape": list(case.shape), "layout": case.layout, "dtype": case.dtype}
        | {"variant": case.variant, "mode": case.mode},
        "name": case.name,
        "gate": {"passed": True, "channels": 1, "errors": []},
    } | conduct.figures(case, samples, 32 << 20)


def cold_and_warm(cold: dict, warm: dict) -> dict:
    return cold | {"rotated": 7, "warm": {name: warm[name] for name in ("contenders", "ratios", "floors")}}


@pytest.fixture
def record():
    made = records.begin(["bench", "--quick"], {"threads": 1}) | {"status": "complete", "allocator": "tuned"}
    made["date"] = "2026-01-02T03:04:05+00:00"
    made["machine"] |= {"processor": "AMD EPYC", "cores": 2}
    made["versions"] |= {"torch": "2.13.0", "batchnorm": "0.1.0"}
    made["versions"].pop("jax", None)
    made["git"] = {"commit": "abcdef012345", "dirty": False}
    shape = (32, 64, 56, 56)
    made["results"] = [
        result(Case(shape, "contiguous"), ours=10e-3, eager=31e-3, in_place=28e-3, floor=3e-3),
        result(Case(shape, "channels_last"), ours=0.5e-3, eager=0.75e-3, jax=0.6e-3, floor=0.1e-3),
        result(Case(shape, "contiguous", mode="eval"), ours=200e-3, eager=300e-3, floor=160e-3),
    ]
    return made


def test_the_cells(record):
    training, inference = table.tables(record)
    assert training.title == "bn+relu, float32, training"
    assert training.columns == (
        "case", "ours", "eager", "x eager", "x fwd", "x bwd", "x in place", "x JAX", "floor", "GB/s"
    )  # fmt: skip
    gigabytes = 2.5 * 2 * 32 * 64 * 56 * 56 * 4 / 1e9
    assert training.rows == [
        ("32x64x56x56", "10.0", "31.0", "3.10 [3.10..3.10]", "3.10", "3.10", "2.80", "", "1.33",
         f"{gigabytes / 10e-3:.1f}"),
        ("32x64x56x56 channels_last", "0.500", "0.750", "1.50 [1.50..1.50]", "1.50", "1.50", "", "1.20", "2.00",
         f"{gigabytes / 0.5e-3:.1f}"),
    ]  # fmt: skip
    assert inference.title == "bn+relu, float32, inference"
    assert "x fwd" not in inference.columns
    assert inference.rows[0][1:4] == ("200", "300", "1.50 [1.50..1.50]")
    assert inference.rows[0][-2] == "1.25"


def test_warm_times_follow_the_cold_ones_and_are_left_out_where_there_are_none(record):
    cold, warm = record["results"][0], result(Case((32, 64, 56, 56), "contiguous"), ours=8e-3, eager=20e-3, floor=2e-3)
    record["results"][0] = cold_and_warm(cold, warm)
    training, inference = table.tables(record)
    assert training.columns[-4:] == ("floor", "GB/s", "warm", "x warm")
    assert [row[-2:] for row in training.rows] == [("8.0", "2.50"), ("", "")]
    assert training.rows[0][1] == "10.0"
    assert inference.columns[-1] == "GB/s"
    text = table.markdown(record)
    assert table.COLD_NOTE in text
    assert table.WARM_NOTE not in text


def test_a_record_of_schema_1_says_that_its_times_are_warm(record):
    record["schema"] = 1
    text = table.markdown(record)
    assert table.WARM_NOTE in text
    assert table.COLD_NOTE not in text
    record["machine"]["gpu"] = {"name": "Some GPU"}
    assert table.WARM_NOTE not in table.markdown(record)


FOLDER = Path(__file__).parents[2] / "benchmarks"
STORED = [path for path in sorted(FOLDER.glob("*.json")) if '"threads": ' in path.read_text(encoding="utf-8")]


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_records_are_rendered(path):
    stored = records.load(path)
    text = table.markdown(stored)
    assert (table.WARM_NOTE in text) is bool(stored["schema"] == 1 and stored["results"])


def test_the_markdown(record):
    text = table.markdown(record)
    assert text.startswith("    batchnorm bench --quick\n\n**bn+relu, float32, training**\n\n| case | ours |")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in rows[:4]} == {11}
    assert text.endswith(
        "AMD EPYC, 1 thread on 2 cores; PyTorch 2.13.0, batchnorm 0.1.0, commit abcdef012345; "
        "allocator: tuned; 2026-01-02."
    )


def test_what_is_red_or_missing_is_said_and_has_no_row(record):
    record["results"][0] |= {"gate": {"passed": False, "channels": 1, "errors": ["dx: error 1.0e+00"]}}
    record["results"][1]["excluded"] = {"jax": ["y: 3 of 64 channels differ from PyTorch's"]}
    record["notes"] = ["JAX is not installed and was not timed"]
    record["status"] = "interrupted"
    assert [len(one.rows) for one in table.tables(record)] == [1, 1]
    assert table.red(record) == ["32x64x56x56 contiguous float32 bn+relu train: dx: error 1.0e+00"]
    text = table.markdown(record)
    assert "Red: 32x64x56x56 contiguous float32 bn+relu train: dx: error 1.0e+00" in text
    assert "jax was not timed, it computes something else (y: 3 of 64 channels differ from PyTorch's)" in text
    assert "JAX is not installed" in text
    assert "(interrupted)" in text


def model(**changes) -> dict:
    """A network's entry as `models.measure` makes it."""

    def spread(median: float) -> dict:
        return {"median": median, "q1": median - 0.1, "q3": median + 0.1}

    faster = {"ours": 1.4, "ours unfused": 1.2, "compile": 1.3, "ours compiled": 1.5}
    return {
        "model": "ResNet-50", "layout": "channels_last", "shape": [16, 3, 224, 224], "dtype": "float32",
        "contenders": {"stock": {"whole": {"median": 3.0}}},
        "excluded": {},
        "ratios": {name: dict.fromkeys(("whole", "forward", "backward"), spread(x)) for name, x in faster.items()},
        "at_most": spread(1.8),
        "gain_share": 0.5,
        "layers": {"all": 53, "converted": 53, "fused": 49},
        "saved_bytes": {"ours": 1 << 30, "stock": 3 << 29},
        "loss": {"agree": dict.fromkeys(faster, True), "difference": dict.fromkeys(faster, 2e-5), "noise": 1e-5},
    } | changes  # fmt: skip


def without(*names: str, **changes) -> dict:
    """The entry of a network in which some contenders are left out."""
    full = model()
    return full | {"ratios": {name: ratio for name, ratio in full["ratios"].items() if name not in names}} | changes


def test_networks_have_a_table_that_names_the_allocator(record):
    record |= {"results": [], "models": [model()]}
    steps, detail = table.tables(record)
    assert steps.title == "Whole training steps, allocator: tuned"
    assert steps.columns == (
        "network", "stock", "ours", "ours unfused", "compile", "ours compiled", "bound", "reached", "saved MiB"
    )  # fmt: skip
    name = "ResNet-50 channels_last 16x3x224x224"
    assert steps.rows == [
        (name, "3,000", "1.40 [1.30..1.50]", "1.20", "1.30", "1.50", "1.80", "50%", "1,536 → 1,024")
    ]  # fmt: skip
    assert detail.rows == [(name, "49 of 53", "1.40", "1.40", "2e-05 [1e-05]")]
    assert table.red(record) == table.notes(record) == []


def test_columns_are_of_the_contenders_that_a_record_has(record):
    record |= {"results": [], "models": [without("compile", "ours compiled", gain_share=None)]}
    steps, _ = table.tables(record)
    assert steps.columns[2:5] == ("ours", "ours unfused", "bound")
    assert steps.rows[0][5] == ""


def test_a_network_that_one_contender_did_not_run_says_why(record):
    why = {"ours": "its losses differ by 1e-02", "compile": "its losses differ by 3e-02"}
    why["ours compiled"] = "torch.compile failed: no kernel"
    agreeing = {"ours": False, "ours unfused": True, "compile": False}
    loss = {"agree": agreeing, "difference": {"ours": None}, "noise": 1e-5}
    record |= {"results": [], "models": [without(*why, excluded=why, loss=loss, gain_share=None), model()]}
    steps, detail = table.tables(record)
    assert steps.rows[0][2:8] == ("–", "1.20", "–", "–", "1.80", "")
    assert detail.rows[0][1:] == ("49 of 53", "–", "–", "not finite [1e-05]")
    name = "ResNet-50 channels_last 16x3x224x224"
    assert table.red(record) == [f"{name}, ours: its losses differ by 1e-02"]
    assert table.notes(record) == [
        f"{name}: compile is left out: its losses differ by 3e-02",
        f"{name}: ours compiled is left out: torch.compile failed: no kernel",
    ]


@pytest.mark.parametrize("right", [True, False])
def test_a_compiled_network_is_red_if_the_compiler_is_right_about_stock(record, right):
    why = dict.fromkeys(["ours compiled"] if right else ["compile", "ours compiled"], "its losses differ")
    loss = model()["loss"] | {"agree": {"ours": True, "compile": right, "ours compiled": False}}
    record |= {"results": [], "models": [without(*why, excluded=why, loss=loss)]}
    assert len(table.red(record)) == int(right)
    assert len(table.notes(record)) == (0 if right else 2)


@pytest.mark.parametrize("agree", [True, False])
def test_a_network_of_an_older_record_is_read(record, tmp_path, agree):
    spread = {"median": 1.4, "q1": 1.3, "q3": 1.5}
    older = {
        "model": "ResNet-50", "layout": "channels_last", "batch": 16, "side": 224,
        "contenders": {"ours": {"whole": {"median": 2.0}}, "stock": {"whole": {"median": 3.0}}},
        "ratio": dict.fromkeys(("whole", "forward", "backward"), spread),
        "at_most": spread | {"median": 1.7},
        "layers": {"all": 53, "converted": 53, "fused": 49},
        "saved_bytes": {"ours": 1 << 30, "stock": 3 << 29},
        "loss": {"agree": agree, "difference": 2e-5, "noise": 1e-5},
    }  # fmt: skip
    records.store(record | {"results": [], "models": [older]}, tmp_path / "older.json")
    loaded = records.load(tmp_path / "older.json")
    steps, _ = table.tables(loaded)
    name, ours = "ResNet-50 channels_last 16x3x224x224", "1.40 [1.30..1.50]" if agree else "–"
    assert steps.rows == [(name, "3,000", ours, "1.70", "", "1,536 → 1,024")]
    assert table.red(loaded) == ([] if agree else [f"{name}, ours: its losses differ"])


def timed_in_inference() -> dict:
    times = {"folded": 0.5, "ours": 0.6, "stock": 0.75}
    spread = {"median": 1.5, "q1": 1.4, "q3": 1.6}
    return {
        "gate": {"passed": True, "errors": []},
        "folded": 53,
        "difference": {"ours": 1e-7, "folded": 2e-6},
        "contenders": {name: {"whole": {"median": median}} for name, median in times.items()},
        "ratio": {"ours": spread | {"median": 1.2}, "stock": spread},
    }


def test_inference_has_a_table_and_a_note(record):
    record |= {"results": [], "models": [model() | {"inference": timed_in_inference()}, model()]}
    training, _, inference = table.tables(record)
    assert len(training.rows) == 2
    assert inference.title == "Inference of networks, allocator: tuned"
    assert inference.rows == [
        ("ResNet-50 channels_last 16x3x224x224", "750", "600", "500", "", "", "1.20 [1.40..1.60]", "1.50 [1.40..1.60]",
         "53 of 53", "2e-06")
    ]  # fmt: skip
    assert table.INFERENCE_NOTE in table.markdown(record)
    assert table.red(record) == []


def test_inference_that_is_wrong_is_red_and_has_no_row(record):
    gate = {"gate": {"passed": False, "errors": ["folded: 3 layers are left"]}, "folded": 50, "difference": {}}
    record |= {"results": [], "models": [model() | {"inference": gate}]}
    assert len(table.tables(record)) == 2
    assert table.red(record) == ["ResNet-50 channels_last 16x3x224x224 in inference: folded: 3 layers are left"]
    assert table.INFERENCE_NOTE not in table.markdown(record)


def test_the_terminal_shows_every_cell_whole_in_80_columns(record, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    compiled = result(
        Case((128, 256, 28, 28), "contiguous"), ours=101e-3, eager=123e-3, in_place=1, compile=1, jax=1, floor=3e-3
    )
    record["results"][0] = cold_and_warm(compiled, compiled)
    table.show(record)
    shown = capsys.readouterr().out
    assert "…" not in shown
    for word in ("32x64x56x56", "channels_last", "[1.22..1.22]", "bn+relu, float32, inference", "abcdef012345"):
        assert word in shown


def test_the_networks_table_fits_in_100_columns(record, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    longest = {"model": "EfficientNet-B0", "inference": timed_in_inference()}
    record |= {"results": [], "models": [model(**longest), model(model="MobileNetV2", layout="contiguous")]}
    table.show(record)
    lines = capsys.readouterr().out.partition("stock: one step")[0].splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith("─") for line in lines) == 3, "rows of a table, not blocks"
    assert "…" not in "".join(lines)


def test_the_markdown_of_networks_is_one_table_with_its_origin(record):
    record |= {"results": [], "models": [model()]}
    text = table.markdown(record)
    assert "| network | stock | ours | ours unfused | compile | ours compiled | bound | reached | saved MiB |" in text
    assert "2 cores; PyTorch 2.13.0, batchnorm 0.1.0, commit abcdef012345; allocator: tuned; 2026-01-02." in text
    assert table.NOTE not in text
