"""How much memory is free and used, with files of control groups made up here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM is not installed")

import vllm_qaa.memory
from vllm_qaa.memory import cgroup_free, host_free
from vllm_qaa.worker import QAAWorkerManager

GiB = 1 << 30


@pytest.fixture
def cgroups(tmp_path):
    (tmp_path / "fs").mkdir()
    return tmp_path / "fs"


def belongs_to(cgroups: Path, *lines: str) -> int | None:
    """What is free for a process whose /proc/PID/cgroup has these lines."""
    membership = cgroups.parent / "membership"
    membership.write_text("".join(f"{line}\n" for line in lines))
    return cgroup_free(cgroups, membership)


def group(cgroups: Path, path: str, limit: int | str, used: int, idle_cache: int = 0, version: int = 2) -> None:
    directory = cgroups / path if version == 2 else cgroups / "memory" / path
    directory.mkdir(parents=True, exist_ok=True)
    limit_file, usage_file, stat = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    (directory / limit_file).write_text(f"{limit}\n")
    (directory / usage_file).write_text(f"{used}\n")
    (directory / "memory.stat").write_text(f"anon {used - idle_cache}\n{stat} {idle_cache}\n")


def test_a_container_s_limit_counts(cgroups):
    """A container with a namespace of its own sees its group as the topmost."""
    group(cgroups, "", 4 * GiB, GiB)
    assert belongs_to(cgroups, "0::/") == 3 * GiB


def test_files_in_memory_that_may_be_dropped_are_free(cgroups):
    group(cgroups, "", 4 * GiB, 3 * GiB, idle_cache=2 * GiB)
    assert belongs_to(cgroups, "0::/") == 3 * GiB


def test_the_tightest_group_on_the_way_counts(cgroups):
    group(cgroups, "system.slice", 2 * GiB, 1 * GiB)
    group(cgroups, "system.slice/qaa.service", 4 * GiB, 1 * GiB)
    group(cgroups, "other.slice", GiB, GiB)
    assert belongs_to(cgroups, "0::/system.slice/qaa.service") == 1 * GiB


def test_a_group_without_a_limit_limits_nothing(cgroups):
    group(cgroups, "user.slice", "max", GiB)
    assert belongs_to(cgroups, "0::/user.slice") is None


def test_a_path_of_outside_the_container_means_the_topmost(cgroups):
    """Without a namespace of its own, a container is told its path on the host."""
    group(cgroups, "", 4 * GiB, GiB, version=1)
    assert belongs_to(cgroups, "5:memory:/docker/0123", "0::/../elsewhere") == 3 * GiB


def test_version_1_counts_memory_s_own_hierarchy(cgroups):
    group(cgroups, "pod", 5 * GiB, 2 * GiB, idle_cache=GiB, version=1)
    group(cgroups, "elsewhere", GiB, GiB, version=1)
    assert belongs_to(cgroups, "6:cpu,cpuacct:/elsewhere", "4:hugetlb,memory:/pod", "0::/") == 4 * GiB


def test_more_used_than_allowed_is_nothing_free(cgroups):
    group(cgroups, "", GiB, 2 * GiB)
    assert belongs_to(cgroups, "0::/") == 0


def test_without_control_groups_the_machine_counts(cgroups):
    assert cgroup_free(cgroups, cgroups / "missing") is None


@pytest.mark.parametrize(("machine", "container", "free"), [(8, 3, 3), (2, 3, 2), (8, None, 8)])
def test_the_smaller_of_machine_and_container_is_free(monkeypatch, machine, container, free):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=machine))
    monkeypatch.setattr(vllm_qaa.memory, "cgroup_free", lambda *_: container)
    assert host_free() == free


def test_the_kinds_of_a_gpu_s_memory_make_up_the_whole(monkeypatch):
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (50 * GiB, 80 * GiB))
    manager = QAAWorkerManager.__new__(QAAWorkerManager)
    manager.device = torch.device("cuda:0")
    manager._adapter_manager = SimpleNamespace(modules={}, circuit_bytes=lambda: 0)
    runner = SimpleNamespace(model=torch.nn.Linear(8, 8, bias=False), kv_caches=[torch.zeros(100)])
    sizes = manager.memory(runner)
    assert (sizes["weights"], sizes["kv_cache"], sizes["adapters"]) == (4 * 64, 4 * 100, 0)
    assert sizes["free"] == 50 * GiB
    assert sum(sizes.values()) == 80 * GiB
