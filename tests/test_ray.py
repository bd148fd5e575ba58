"""Workers on two nodes of a Ray cluster: tensor and pipeline parallelism with vLLM's Ray executor.

vLLM's CPU platform refuses Ray, for want of a name for what a node has one of. A platform plugin made here gives
it one, "GPU", and each node says that it has one; all else is vLLM's and Ray's own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")
pytest.importorskip("ray", reason="Ray is not installed")
pytestmark = pytest.mark.vllm

from server_process import free_port, gone
from test_tensor_parallel import check_mixed_requests, make_adapters, replace_adapter, start

PLATFORM = """
from vllm.platforms.cpu import CpuPlatform

class RayCpuPlatform(CpuPlatform):
    ray_device_key = "GPU"

def plugin():
    return "ray_cpu_platform.RayCpuPlatform"
"""

#: vLLM makes the buffers between stages in its warm-up, which it leaves out on a CPU with LoRA.
WORKER = """
from vllm.v1.worker.cpu_worker import CPUWorker

class WarmWorker(CPUWorker):
    def compile_or_warm_up_model(self):
        self.model_runner.profile_run()
        return super().compile_or_warm_up_model()
"""

TENSOR = ("--tensor-parallel-size", "2")
PIPELINE = ("--pipeline-parallel-size", "2", "--worker-cls", "warm_worker.WarmWorker")


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Where the platform plugin is found, by nodes, servers and workers."""
    site = tmp_path_factory.mktemp("site")
    (site / "ray_cpu_platform.py").write_text(PLATFORM)
    (site / "warm_worker.py").write_text(WORKER)
    info = site / "ray_cpu_platform-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ray-cpu-platform\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[vllm.platform_plugins]\nray_cpu = ray_cpu_platform:plugin\n")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, [os.getenv("PYTHONPATH")])]))
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        yield environment


@pytest.fixture(scope="module")
def nodes(environment):
    """Two nodes of a cluster, one worker's place on each."""
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="ray-"))  # the names of Ray's sockets must stay short
    started = []

    def node(name: str, *options: str) -> psutil.Process:
        command = [
            sys.executable, "-m", "ray.scripts.scripts", "start", "--block", "--disable-usage-stats",
            "--num-cpus", "1", "--num-gpus", "1", "--object-store-memory", "100000000",
            "--temp-dir", str(folder / name), *options,
        ]  # fmt: skip
        log = folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        started.append(process)
        deadline = time.monotonic() + 120
        while "Ray runtime started" not in log.read_text(errors="replace"):
            assert process.poll() is None, log.read_text(errors="replace")
            assert time.monotonic() < deadline
            time.sleep(0.5)
        return psutil.Process(process.pid)

    try:
        head = node("head", "--head", "--port", str(port), "--include-dashboard", "false")
        address = (folder / "head" / "ray_current_cluster").read_text().strip()
        environment.setenv("RAY_ADDRESS", address)
        yield [head, node("other", "--address", address, "--node-ip-address", "127.0.0.2")]
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(60)
        shutil.rmtree(folder, ignore_errors=True)


def workers(node: psutil.Process) -> list[psutil.Process]:
    """vLLM's workers on a node."""
    return [p for p in node.children(recursive=True) if "RayWorkerProc" in " ".join(p.cmdline())]


@pytest.mark.parametrize(("options", "end"), [(TENSOR, signal.SIGTERM), (PIPELINE, signal.SIGKILL)])
def test_workers_on_two_nodes(nodes, tmp_path, options, end):
    root = make_adapters(tmp_path)
    server = start(root, "--distributed-executor-backend", "ray", *options)
    try:
        server.wait_ready()
        check_mixed_requests(server, root)
        assert replace_adapter(server, root)
        placed = [workers(node) for node in nodes]
        assert [len(here) for here in placed] == [1, 1]
        family = [*server.family(), *placed[0], *placed[1]]
        server.process.send_signal(end)
        assert gone(family) == []
    finally:
        server.stop()
