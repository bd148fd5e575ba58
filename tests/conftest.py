"""Settings and fixtures for all tests."""

from __future__ import annotations

import gc
import logging
import os
import sys
from pathlib import Path

# In-process engines: no second process, no binding to one core, no usage statistics.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_HOST_IP", "127.0.0.1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Temporary directories are in memory where there is room: what is tested waits for the disk at each change.
if os.access("/dev/shm", os.W_OK):
    memory = os.statvfs("/dev/shm")
    # The whole suite takes half a gigabyte; and some tests run programs that they have written.
    if memory.f_bavail * memory.f_frsize >= 2 << 30 and not memory.f_flag & os.ST_NOEXEC:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")
# The many commands and servers that are started here compile our modules once, not each for itself.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

import pytest
import torch

# Programs that measure or try something, whose short forms are tests too.
sys.path[:0] = [str(Path(__file__).parents[1] / folder) for folder in ("benchmarks", "loadtests", "deploy")]


#: The files that take longest, from the longest on (docs/development.md).
LONGEST = (
    "test_console.py",
    "test_server_life.py",
    "test_hot_swap.py",
    "test_locustfile.py",
    "test_gpu_check.py",
    "test_server.py",
    "test_replicas.py",
    "test_console_faults.py",
    "test_training_resume.py",
    "test_compare_runs.py",
    "test_cluster.py",
    "test_server_rules.py",
    "test_triton_training.py",
    "test_deploy.py",
    "test_sources_objects.py",
    "test_fuzz.py",
    "test_triton_compile.py",
    "test_vllm_exactness.py",
    "test_sources_crash.py",
    "test_plugin_static.py",
    "test_train_then_serve.py",
    "test_circuits_backends.py",
    "test_circuits_options.py",
)


@pytest.hookimpl(tryfirst=True)  # before -m chooses by the markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # What is quick comes first, so that what it finds is soon seen; then the longest, and last what else is slow:
    # no worker is left with a long file at the end.
    if "PYTEST_XDIST_WORKER" in os.environ:
        long = {name: number for number, name in enumerate(LONGEST)}
        servers = {item.path for item in items if "vllm" in item.keywords or "slow" in item.keywords}
        items.sort(
            key=lambda item: (long.get(item.path.name, len(long) if item.path in servers else -1), item.path)
        )
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU; torch sees none"))
            if hasattr(item, "callspec") and item.callspec.params.get("backend") == "triton":
                item.add_marker(pytest.mark.slow)  # Triton's interpreter, a hundred times slower than the others


def pytest_collection_finish() -> None:
    # What is imported and collected stays: the garbage collector, which each training calls, need not look at it.
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or Triton's bindings tell of all that is left at the end


_SET_NUM_THREADS = torch.set_num_threads

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers are at least as many as the cores: threads of each would wait for one another, spinning.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def as_before_an_engine() -> None:
    """A server in this process silences loggers, leads ours past pytest's, and replaces a function of torch's."""
    torch.set_num_threads = _SET_NUM_THREADS
    ours = logging.getLogger("qaa_serve")
    ours.handlers, ours.propagate = [], True
    ours.setLevel(logging.NOTSET)
    logging.root.setLevel(logging.WARNING)
    for logger in logging.root.manager.loggerDict.values():
        if isinstance(logger, logging.Logger):
            logger.disabled = False


@pytest.fixture(scope="session")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from training_support import make_chat_base

    return make_chat_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def base(chat_base: Path) -> Path:
    """A tiny random Llama with a chat template. Modules that need others have a fixture of the same name."""
    return chat_base


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Eight rows to train on."""
    from training_support import write_rows

    return write_rows(tmp_path / "rows.jsonl")


@pytest.fixture(scope="module")
def chromium():
    """A browser for the console's tests."""
    from console_support import browser

    with browser() as chromium:
        yield chromium


@pytest.fixture
def page(chromium, url: str, keys: tuple[str, str]):
    """A tab on the console at `url`, with `keys` typed in: a client's and an admin's."""
    from console_support import tab, type_keys

    with tab(chromium, url, permissions=["clipboard-read", "clipboard-write"]) as page:
        type_keys(page, *keys)
        yield page
