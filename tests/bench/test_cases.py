"""Which cases there are, how they are found, and what their tensors look like."""

import pytest
import torch

from batchnorm.bench import cases
from batchnorm.bench.cases import DEFAULT, EVERY, QUICK, Case, matches


def test_every_listed_combination_is_reachable_and_none_twice():
    places = {(case.shape, case.layout) for case in EVERY}
    assert len(places) == 5 * 2 + 2 + 4
    assert len(EVERY) == len(set(EVERY)) == len(places) * 2 * 4 * 2
    for case in EVERY:
        assert [other for other in EVERY if matches(other.name, case.name)] == [case]


@pytest.mark.parametrize("chosen", [DEFAULT, QUICK], ids=["default", "quick"])
def test_the_smaller_sets_are_part_of_the_whole_without_repeats(chosen):
    assert set(chosen) <= set(EVERY)
    assert len(chosen) == len(set(chosen))


def test_the_default_holds_every_shape_and_layout_and_each_kind_of_variation():
    assert {(case.shape, case.layout) for case in DEFAULT} == {(case.shape, case.layout) for case in EVERY}
    for field in ("dtype", "variant", "mode"):
        assert {getattr(case, field) for case in DEFAULT} == {getattr(case, field) for case in EVERY}
    assert len(QUICK) < 20 < len(DEFAULT) < 100


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("channels_last", {"channels_last"}),
        ("channels_last_3d", {"channels_last_3d"}),
        ("3d", {"channels_last_3d"}),
        ("CHANNELS_LAST float32 bn+relu", {"channels_last"}),
        ("nothing", set()),
    ],
)
def test_a_filter_means_whole_words_where_there_are_such(text, found):
    assert {case.layout for case in EVERY if matches(case.name, text)} == found


def test_a_variant_is_a_word_and_its_parts_are_found_in_others():
    assert {case.variant for case in EVERY if matches(case.name, "bn")} == {"bn"}
    assert {case.variant for case in EVERY if matches(case.name, "relu")} == {"bn+relu", "bn+add+relu"}


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "channels_last_3d", "rows"])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_tensors_are_what_the_case_says(layout, mode):
    shape = {"rows": (9, 6), "channels_last_3d": (2, 6, 3, 4, 5)}.get(layout, (2, 6, 4, 5))
    case = Case(shape, layout, "bfloat16", "bn+add+relu", mode)
    call, again, other = case.make(3), case.make(3), case.make(4)
    memory_format = cases._MEMORY_FORMATS.get(layout, torch.contiguous_format)
    for tensor in (call.x, call.grad_y, call.residual):
        assert tensor.shape == shape
        assert tensor.dtype == torch.bfloat16
        assert tensor.is_contiguous(memory_format=memory_format)
    assert {v.dtype for v in (call.gamma, call.beta, call.running_mean, call.running_var)} == {torch.float32}
    assert call.act == "relu"
    assert call.training is (mode == "train")
    assert (call.grad_y is call.x) is (mode == "eval")
    assert torch.equal(call.x, again.x)
    assert not torch.equal(call.x, other.x)


def test_sizes_of_a_case():
    case = Case((2, 6, 4, 5), "contiguous", "bfloat16", "bn", "train")
    assert (case.size, case.values, case.itemsize, case.tensor_bytes) == ("2x6x4x5", 40, 2, 480)
    assert (case.act, case.residual) == (None, False)
    assert case.make(0).residual is None
