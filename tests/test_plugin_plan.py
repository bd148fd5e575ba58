"""Which tokens a step's plan gives to which slot."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm_qaa.plan import NOTHING, make_plan

CPU = torch.device("cpu")
FORM = ("ryrz_ring_ry", 2, 1)
OTHER = ("ry_ring", 3, 1)


def test_base_tokens_belong_to_nobody():
    plan = make_plan([0, 0, 0], [7, 8], [FORM, None], CPU)
    assert plan.empty
    assert plan.num_tokens == 3
    assert NOTHING.empty


def test_tokens_side_by_side_are_a_slice():
    (group,) = make_plan([0, 7, 7, 7, 0], [None, 7], [None, FORM], CPU).qaa
    assert group.slots == (1,)
    assert group.span == slice(1, 4)
    assert group.tokens.tolist() == [[1, 2, 3]]


def test_scattered_tokens_are_an_index():
    (group,) = make_plan([7, 0, 7], [7], [FORM], CPU).qaa
    assert group.span is None
    assert group.tokens.tolist() == [[0, 2]]


def test_slots_of_one_form_and_count_share_a_group():
    plan = make_plan([5, 6, 7, 7, 8, 9], [9, 8, 7, 6, 5], [OTHER, FORM, FORM, FORM, None], CPU)
    groups = {group.slots: group.tokens.tolist() for group in plan.qaa}
    assert groups == {(3, 1): [[1], [4]], (2,): [[2, 3]], (0,): [[5]]}
    assert [(group.slots, group.tokens.tolist()) for group in plan.lora] == [((4,), [[0]])]


def test_an_adapter_in_no_slot_is_an_error():
    with pytest.raises(RuntimeError, match="adapter 3 is wanted"):
        make_plan([3], [None, 2], [None, None], CPU)
