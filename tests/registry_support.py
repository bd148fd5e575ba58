"""Small adapters, an engine that can be told to fail or to wait, and waiting for what others do."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from qaa_serve.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterConfig,
    ModuleWeights,
    digest_of,
    save_adapter,
)
from qaa_serve.registry import Catalogue, EngineRefusedError, Revision, RevisionStore

#: The longest that anything is waited for, in seconds.
PATIENCE_S = 30.0


def make(directory: Path, seed: int = 0, **settings: Any) -> Path:
    """A QAA adapter; another seed makes other weights."""
    config = AdapterConfig(base_model_name_or_path="../../base", target_modules=("q_proj",), **settings)
    theta = torch.randn(
        config.heads, *config.circuit(4).theta_shape, generator=torch.Generator().manual_seed(seed)
    )
    weights = ModuleWeights(theta, torch.ones(16, config.rank(4)))
    save_adapter(directory, config, {"model.layers.0.self_attn.q_proj": weights}, overwrite=True)
    return directory


def make_lora(directory: Path, value: float = 1.0, **settings: Any) -> Path:
    """A LoRA adapter, as far as it is checked without an engine."""
    directory.mkdir(parents=True)
    config = {
        "peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"],
        "base_model_name_or_path": "org/base", **settings,
    }  # fmt: skip
    (directory / CONFIG_FILE).write_text(json.dumps(config))
    rank = (settings.get("rank_pattern") or {}).get("q_proj", 4)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{layer}.lora_A.weight": torch.full((rank, 16), value),
        f"{layer}.lora_B.weight": torch.ones(16, rank),
    }
    save_file(tensors, directory / WEIGHTS_FILE)
    return directory


def make_store(directory: Path, max_bytes: int = 1 << 20, max_adapter_bytes: int = 1 << 16) -> RevisionStore:
    return RevisionStore(directory, max_bytes=max_bytes, max_adapter_bytes=max_adapter_bytes)


def make_catalogue(store: RevisionStore, engine: FakeEngine, **settings: Any) -> Catalogue:
    return Catalogue(store, engine, **{"cache_bytes": 1 << 20, **settings})


def tree(directory: Path) -> list[str]:
    """Everything below a directory."""
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


class FakeEngine:
    """Holds what it is given, as the real one does, and reads it from where it lies.

    Attributes:
        held: revisions in its memory.
        loads: all that were asked for, in order.
        unloads: all that were forgotten, in order.
        refuses: revisions whose loading fails.
        go: cleared, loading waits until it is set.
        loading: set while a load waits.
        gates: events that the loads and unloads of certain revisions wait for.
        busy: revisions that are being loaded.
    """

    def __init__(self, reads: bool = True):
        self.held: set[Revision] = set()
        self.loads: list[str] = []
        self.unloads: list[str] = []
        self.refuses: Callable[[Revision], bool] = lambda revision: False
        self.go = asyncio.Event()
        self.go.set()
        self.loading = asyncio.Event()
        self.gates: dict[Revision, asyncio.Event] = {}
        self.busy: set[Revision] = set()
        self.unloading: set[Revision] = set()
        self._reads = reads

    def hang(self, *revisions: Revision) -> None:
        """Have the loads of these, or their unloads, wait until `gates` says go."""
        for revision in revisions:
            self.gates[revision] = asyncio.Event()

    async def load(self, revision: Revision) -> int:
        assert revision not in self.held, "it is there already"
        assert revision not in self.busy | self.unloading, "it is being loaded, or unloaded"
        self.busy.add(revision)
        try:
            self.loads.append(revision.revision)
            self.loading.set()
            await asyncio.sleep(0)
            await self.go.wait()
            if revision in self.gates:
                await self.gates[revision].wait()
            self.loading.clear()
            if self.refuses(revision):
                raise EngineRefusedError("the engine refuses it")
            if self._reads:
                assert digest_of(revision.path) == revision.digest
            self.held.add(revision)
            return revision.nbytes
        finally:
            self.busy.discard(revision)

    async def unload(self, revision: Revision) -> None:
        assert revision in self.held
        assert revision not in self.unloading
        self.unloading.add(revision)
        await asyncio.sleep(0)
        if revision in self.gates:
            await self.gates[revision].wait()
        self.unloading.discard(revision)
        self.held.remove(revision)
        self.unloads.append(revision.revision)


async def eventually(condition: Callable[[], object], what: str) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(PATIENCE_S):
        try:
            while not condition():
                await asyncio.sleep(0.01)
        except asyncio.CancelledError:
            raise AssertionError(f"never came true: {what}") from None


async def settle() -> None:
    """Let everything run that does not wait for an event, a thread or a clock."""
    for _ in range(20):
        await asyncio.sleep(0)
