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
    assert (plan.qaa, plan.lora) == ((), ())
    assert plan.num_tokens == 3
    assert (NOTHING.qaa, NOTHING.lora) == ((), ())


def test_tokens_side_by_side_are_a_slice():
    (group,) = make_plan([0, 7, 7, 7, 0], [None, 7], [None, FORM], CPU).qaa
    assert group.present == (1,)
    assert group.span == slice(1, 4)
    assert group.rows.tolist() == [1, 2, 3]
    assert group.slots.tolist() == [1, 1, 1]


def test_scattered_tokens_are_an_index():
    (group,) = make_plan([7, 0, 7], [7], [FORM], CPU).qaa
    assert group.span is None
    assert group.rows.tolist() == [0, 2]


def test_slots_of_one_form_are_one_group_in_the_order_of_the_rows():
    plan = make_plan([6, 5, 7, 7, 8, 9, 6], [9, 8, 7, 6, 5], [OTHER, FORM, FORM, FORM, None], CPU)
    groups = {group.form: (group.rows.tolist(), group.slots.tolist()) for group in plan.qaa}
    assert groups == {FORM: ([0, 2, 3, 4, 6], [3, 2, 2, 1, 3]), OTHER: ([5], [0])}
    assert [(group.slot, group.rows.tolist()) for group in plan.lora] == [(4, [1])]


def test_the_circuits_of_each_token_are_looked_up_once_for_all_layers_alike():
    (group,) = make_plan([5, 0, 6], [5, 6], [FORM, FORM], CPU).qaa
    table = torch.tensor([[0, 1], [2, -1]], dtype=torch.int32)
    assert group.index(table, b"a").tolist() == [[0, 1], [2, -1]]
    assert group.index(table, b"a") is group.index(table, b"a")
    assert group.index(table.flip(0), b"b").tolist() == [[2, -1], [0, 1]]


def test_an_adapter_in_no_slot_is_an_error():
    with pytest.raises(RuntimeError, match="adapter 3 is wanted"):
        make_plan([3], [None, 2], [None, None], CPU)
