"""Updates by a step's plan: the branch of CPUs, and that of GPUs whose circuits run between CUDA graphs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from circuits_support import compiled, fresh_generator

pytest.importorskip("vllm", reason="vLLM is not installed")

from delta_support import CPU, SLICES, SLOTS, WIDTH, Layer, adapters, filled, updates
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm_qaa.delta import LayerCircuits
from vllm_qaa.manager import QAAModelManager
from vllm_qaa.plan import NOTHING, make_plan
from vllm_qaa.planned import CpuDelta, PlanHolder, PlannedCircuits, PlannedDelta

from qaa_serve.circuits import circuits_of

#: Base, LoRA, four kinds of circuits, and slot 3, whose adapter has nothing in this layer; then rows of padding.
STEP = [-1, 0, 2, 1, 5, 4, 0, -1, 3, 2]
PADDING = 2


class Punica:
    """vLLM's shrink and expand, in torch: y of a row is its slot's product, untouched without a slot."""

    def __init__(self, slots: list[int]):
        self.slots = slots

    def add_shrink(self, z: torch.Tensor, x: torch.Tensor, a: tuple[torch.Tensor, ...], scale: float) -> None:
        z.zero_()
        for row, slot in enumerate(self.slots):
            for i, part in enumerate(a) if slot >= 0 else ():
                z[i, row] = scale * part[slot, 0].float() @ x[row].float()

    def add_expand(
        self, y: torch.Tensor, z: torch.Tensor, b: tuple[torch.Tensor, ...], slices: Any, add_inputs: bool
    ) -> None:
        assert add_inputs
        for row, slot in enumerate(self.slots):
            if slot >= 0:
                y[row] += torch.cat([part[slot, 0].float() @ z[i, row] for i, part in enumerate(b)]).to(y.dtype)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    compiled()


def delta_of(kind: str, layer: Layer, of_slot: Any) -> tuple[Any, PlanHolder]:
    """A layer's delta on one of the backends, with all adapters put in."""
    circuits = circuits_of("cpu" if kind == "compiled" else "torch")
    plans, store = PlanHolder(circuits), PlannedCircuits(circuits)
    layer.delta = delta = (PlannedDelta if kind == "planned" else CpuDelta)(layer, plans)
    for slot, (form, angles, standard) in of_slot.items():
        store.put(slot, store.pack(form, {layer: LayerCircuits(angles, standard)}))
    delta.put_lora(1, 4)
    return delta, plans


def planned(of_slot: Any, step: list[int]) -> Any:
    ids = [slot + 1 for slot in step]  # 0 is the base
    forms = [of_slot[slot][0] if slot in of_slot else None for slot in range(SLOTS)]
    return make_plan(ids, [slot + 1 for slot in range(SLOTS)], forms, CPU)


@pytest.mark.parametrize("adds", [True, False], ids=["this rank adds", "another rank adds"])
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "row-parallel"])
@pytest.mark.parametrize("kind", ["compiled", "cpu", "planned"])
def test_a_mixed_batch_gets_what_each_adapter_gives(kind: str, sharded: bool, adds: bool) -> None:
    generator = fresh_generator()
    of_slot = adapters(generator)
    rows = len(STEP) + PADDING
    whole = torch.randn(rows, WIDTH, generator=generator)
    whole[len(STEP) :] = float("nan")
    layer = filled(generator, Layer(whole if sharded else None, adds))
    x = whole[:, WIDTH // 2 :].contiguous() if sharded else whole
    layer.punica_wrapper = Punica(STEP)
    delta, plans = delta_of(kind, layer, of_slot)
    plans.plan = planned(of_slot, STEP)
    output = torch.ones(rows, sum(SLICES))
    delta.add(x, output)
    right = 1 + updates(layer, x, STEP, of_slot, with_circuits=adds)
    torch.testing.assert_close(output.double(), right, rtol=1e-4, atol=1e-4)
    assert (output[[0, 7, *range(len(STEP), rows)]] == 1).all()


@pytest.mark.parametrize("kind", ["compiled", "cpu", "planned"])
def test_a_slot_that_was_emptied_gives_nothing_and_keeps_nothing(kind: str) -> None:
    """Within one plan too: which circuits a token has is looked up once for layers alike."""
    generator = fresh_generator()
    of_slot = {slot: adapters(generator)[0] for slot in (0, 2)}  # of one form
    layer = filled(generator, Layer())
    layer.punica_wrapper = Punica([0, 2, 0])
    delta, plans = delta_of(kind, layer, of_slot)
    plans.plan = planned(of_slot, [0, 2, 0])
    x, before, after = torch.randn(3, WIDTH, generator=generator), torch.zeros(3, 48), torch.zeros(3, 48)
    full = delta.nbytes
    delta.add(x, before)
    delta.clear(0)
    delta.add(x, after)
    torch.testing.assert_close(after[1], before[1])
    assert (before[[0, 2]] != 0).any(dim=1).all()
    assert (after[[0, 2]] == 0).all()
    delta.clear(2)
    assert delta.nbytes < full, "circuits of a form that no slot has are let go"
    delta.clear(1)
    assert delta.nbytes == 0


def test_no_step_uses_a_plan_of_adapters_that_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LRUCacheLoRAModelManager, "remove_all_adapters", lambda _: None)
    manager = QAAModelManager.__new__(QAAModelManager)
    manager._plans = PlanHolder(circuits_of("torch"))
    manager._plans.plan = planned(adapters(fresh_generator()), STEP)
    manager.remove_all_adapters()
    assert manager._plans.plan is NOTHING
