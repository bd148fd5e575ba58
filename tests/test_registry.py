"""Names and revisions."""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from registry_support import make, make_lora
from safetensors.torch import save_file

from qaa_serve.adapters import WEIGHTS_FILE, AdapterError, digest_of
from qaa_serve.registry import Ids, Revision, check_name, public_form, read_revision


def test_a_revision_is_named_by_its_content(tmp_path):
    revision = read_revision(make(tmp_path / "support"))
    assert revision.name == "support"
    assert revision.revision == f"support@{digest_of(tmp_path / 'support')[:12]}"
    assert revision.kind == "QAA"
    assert revision.rank == 4
    assert revision.details["ansatz"] == "ryrz_ring_ry"


def test_the_same_content_elsewhere_has_the_same_name_and_id(tmp_path):
    """Replicas agree on names without talking to each other; ids are each process's own."""
    here, there = make(tmp_path / "a" / "support"), tmp_path / "b" / "support"
    shutil.copytree(here, there)
    assert read_revision(here).revision == read_revision(there).revision
    assert read_revision(here).int_id == read_revision(there).int_id


def test_other_content_has_another_name_and_id(tmp_path):
    before = read_revision(make(tmp_path / "support", seed=1))
    after = read_revision(make(tmp_path / "support", seed=2))
    assert before.name == after.name
    assert before.revision != after.revision
    assert before.int_id != after.int_id


def test_the_same_content_under_another_name_is_another_adapter(tmp_path):
    make(tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    one, two = read_revision(tmp_path / "one"), read_revision(tmp_path / "two")
    assert one.digest == two.digest
    assert one.int_id != two.int_id


def test_ids_fit_in_32_bits_and_leave_vllms_own_alone(tmp_path):
    ids = {read_revision(make(tmp_path / f"n{i}", seed=i)).int_id for i in range(50)}
    assert len(ids) == 50
    assert all(1 << 16 <= number < 1 << 31 for number in ids)


def test_ids_are_counted_kept_and_never_given_twice():
    ids = Ids(first=5, limit=8)
    assert [ids.of(name) for name in ("a@1", "b@1", "a@1", "c@1", "b@1")] == [5, 6, 5, 7, 6]
    with pytest.raises(OverflowError, match="start the server anew"):
        ids.of("d@1")
    assert ids.of("c@1") == 7


def test_many_threads_that_ask_at_once_agree_on_ids():
    ids, names = Ids(), [f"n{i}@1" for i in range(2000)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda _: [ids.of(name) for name in names], range(8)))
    assert all(answer == answers[0] for answer in answers)
    assert len(set(answers[0])) == 2000


def test_what_differs_after_the_first_12_digits_is_another_revision_to_the_engine():
    one, two = (Revision("a", "0" * 12 + digit * 52, Path("x"), "QAA", 4, 1, "base", {}) for digit in "ab")
    assert one.revision == two.revision == "a@000000000000"
    assert one.engine_name != two.engine_name
    assert one.int_id != two.int_id
    assert public_form(one.engine_name) == one.revision


@pytest.mark.parametrize("name", ["a", "support-v2", "0.5_x", "A" * 128])
def test_names_that_are_taken(name):
    check_name(name)
    assert name


@pytest.mark.parametrize(
    "name", ["", ".hidden", "-x", "a b", "a/b", "a@b", "ä", "a\n", "a\x00", "A" * 129, "..", chr(0x430)]
)
def test_names_that_are_refused(name):
    with pytest.raises(AdapterError, match="cannot be an adapter's name"):
        check_name(name)


def test_lora_rank_is_the_largest_of_its_patterns(tmp_path):
    revision = read_revision(make_lora(tmp_path / "lora", rank_pattern={"q_proj": 16}))
    assert (revision.kind, revision.rank, revision.base) == ("LORA", 16, "org/base")


@pytest.mark.parametrize("settings", [{"r": 0}, {"r": "8"}, {"peft_type": "IA3"}])
def test_what_cannot_be_served_is_refused(tmp_path, settings):
    with pytest.raises(AdapterError, match=r"positive integer r|QAA and LORA adapters can be served"):
        read_revision(make_lora(tmp_path / "x", **settings))


def test_what_a_lora_adapter_holds_is_checked(tmp_path):
    adapter = make_lora(tmp_path / "lora")
    assert read_revision(adapter).digest == digest_of(adapter)
    weights = adapter / WEIGHTS_FILE
    os.truncate(weights, weights.stat().st_size - 1)
    with pytest.raises(AdapterError, match="is damaged or no safetensors file"):
        read_revision(adapter)
    save_file({}, weights)
    with pytest.raises(AdapterError, match="holds no tensors"):
        read_revision(adapter)
    bad = torch.tensor([1.0, float("nan"), float("-inf"), 0.0]).expand(16, 4).contiguous()
    save_file({"q_proj.lora_A.weight": torch.ones(4, 16), "q_proj.lora_B.weight": bad}, weights)
    with pytest.raises(AdapterError, match=r"q_proj\.lora_B\.weight has 32 values that are NaN or infinite"):
        read_revision(adapter)


def test_the_base_is_found_beside_the_adapter(tmp_path):
    (tmp_path / "base").mkdir()
    assert read_revision(make(tmp_path / "adapters" / "a")).base == str(tmp_path / "base")
