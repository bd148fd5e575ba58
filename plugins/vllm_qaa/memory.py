"""How much memory there is for this process: of this machine, or of the container that it is in."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path, PurePosixPath

import psutil

_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


def host_free() -> int:
    """Bytes that this process can still take: of the machine, or of a container with less."""
    machine: int = psutil.virtual_memory().available
    container = cgroup_free(_CGROUPS, _MEMBERSHIP)
    return machine if container is None else min(machine, container)


def cgroup_free(cgroups: Path, membership: Path) -> int | None:
    """Bytes that the control groups of a process leave it; None if none limits it.

    A limit holds for all groups below, so every group on the way to the topmost counts. (vLLM's helper in
    `vllm.utils.cpu_resource_utils` reads the topmost alone.) Inside a container the path may be the one outside;
    the container's own group is then the topmost.

    Args:
        cgroups: where the groups' files are.
        membership: the process's /proc/PID/cgroup.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:  # not Linux
        return None
    free = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            root, limit, usage, idle_cache = cgroups, "memory.max", "memory.current", "inactive_file"
        elif "memory" in controllers.split(","):
            root, limit = cgroups / "memory", "memory.limit_in_bytes"
            usage, idle_cache = "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        inner = PurePosixPath(path.lstrip("/"))
        for group in (root / part for part in (inner, *inner.parents)):
            with suppress(OSError, ValueError):  # no such group from here; or its limit is the word "max"
                left = int((group / limit).read_text()) - int((group / usage).read_text())
                # Files that were read and may be dropped are counted as used, yet are there to be taken.
                free.append(max(left + _stat(group, idle_cache), 0))
    return min(free, default=None)


def _stat(group: Path, key: str) -> int:
    fields = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    return int(fields.get(key, 0))
