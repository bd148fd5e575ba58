"""Small adapters, an engine that can be told to fail or to wait, and waiting for what others do."""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from logging import getLogger
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qaa_serve.adapters import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    AdapterConfig,
    AdapterError,
    ModuleWeights,
    digest_of,
    save_adapter,
)
from qaa_serve.registry import (
    Catalogue,
    Contents,
    Engine,
    EngineRefusedError,
    Follower,
    Index,
    Revision,
    State,
    base_fingerprint,
)
from qaa_serve.sources import DirectoryHistory, DirectorySource, Source
from qaa_serve.sources.disk import exchange

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


class Place:
    """A source directory and a state directory; `serve` runs a server's catalogue on them."""

    def __init__(self, directory: Path, **settings: Any):
        self.directory = directory
        self.adapters = directory / "adapters"
        self.adapters.mkdir(parents=True, exist_ok=True)
        self.state = directory / "state"
        self.settings = settings

    def version(self, seed: int, **settings: Any) -> Path:
        """An adapter outside of the source."""
        place = self.directory / "versions" / f"seed-{seed}"
        return place if place.exists() else make(place, seed, **settings)

    def digest(self, seed: int) -> str:
        """Of that adapter."""
        return digest_of(self.version(seed))

    def drop(self, name: str, seed: int) -> str:
        """Put it into the source by hand, in one step; its digest."""
        staged, target = self.adapters / f".{name}.new", self.adapters / name
        shutil.copytree(self.version(seed), staged)
        if not target.exists():
            staged.rename(target)
        elif exchange(staged, target):
            shutil.rmtree(staged)
        else:
            pytest.skip("this file system exchanges no directories in one step")
        return self.digest(seed)

    def replica(self, which: str) -> Place:
        """Another server's place: the same source, and a state directory of its own."""
        other = Place(self.directory, **self.settings)
        other.state = self.directory / f"state-{which}"
        return other

    def make_contents(self, source: Source | None = None, **settings: Any) -> Contents:
        """What a server opens at its start."""
        chosen: dict[str, Any] = {
            "max_bytes": 1 << 20,
            "state_bytes": 1 << 24,
            "timeout_s": PATIENCE_S,
            "loaders": 4,
            **settings,
        }
        state = State(self.state, max_bytes=chosen.pop("state_bytes"))
        base = chosen.pop("base", None)
        return Contents(
            source or DirectorySource(self.adapters, rescan_s=0.2),
            state,
            Index(state.directory / "index.sqlite", base_fingerprint(base, chosen["max_bytes"])),
            DirectoryHistory(state.directory / "history"),
            base=base,
            logger=getLogger("qaa-tests"),
            **chosen,
        )

    @asynccontextmanager
    async def server(
        self,
        engine: Engine | None = None,
        *,
        source: Source | None = None,
        follow: bool = False,
        check: bool = False,
        lazy: bool = False,
        quiet_s: float = 0.05,
        **settings: Any,
    ) -> AsyncIterator[Catalogue]:
        """A catalogue that has taken over what is there.

        Args:
            engine: what runs adapters; a FakeEngine if left out.
            source: in place of the directory.
            follow: follow the source too.
            check: check in the background what nobody asked for.
            lazy: only load there what is pinned.
            quiet_s: of the follower.
            settings: of Contents and Catalogue.
        """
        names = ("max_bytes", "state_bytes", "timeout_s", "loaders", "base")
        given = {name: settings.pop(name) for name in names if name in settings}
        contents = self.make_contents(source, **given)
        tasks: list[asyncio.Task[None]] = []
        try:
            catalogue = Catalogue(contents, engine or FakeEngine(), **{"cache_bytes": 1 << 20, **settings})
            follower = Follower(contents.source, catalogue, contents.index, quiet_s=quiet_s)
            await follower.start()
            catalogue.ready = True
            if follow:
                tasks.append(asyncio.create_task(follower.run()))
            if check:
                tasks.append(asyncio.create_task(catalogue.check_in_background(lazy=lazy)))
            yield catalogue
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            contents.close()

    def serve(self, body: Callable[[Catalogue], Awaitable[None]], **settings: Any) -> None:
        """Run a body with a catalogue; see `server`."""

        async def run() -> None:
            async with self.server(**settings) as catalogue:
                await body(catalogue)

        asyncio.run(run())


class OddSource:
    """A source that counts what is asked of it, and does what a test wants before it answers.

    Attributes:
        calls: how often each of its methods was called.
        hooks: by method, called with its arguments in the thread that it is called in; may wait, or raise.
    """

    def __init__(self, source: Source):
        self.url = source.url
        self.calls: Counter[str] = Counter()
        self.hooks: dict[str, Callable[..., object]] = {}
        self._source = source

    def __getattr__(self, method: str) -> Any:
        real = getattr(self._source, method)
        if method == "changes":
            return real

        def call(*args: Any, **options: Any) -> Any:
            self.calls[method] += 1
            if method in self.hooks:
                self.hooks[method](*args)
            return real(*args, **options)

        return call

    def fail(self, error: AdapterError, *methods: str) -> None:
        """Have these methods raise."""

        def fail(*args: Any) -> None:
            raise error

        self.hooks |= dict.fromkeys(methods, fail)


class Hang:
    """A hook that waits until it is told to go on, for the calls whose arguments a test picks."""

    def __init__(self, which: Callable[..., bool] = lambda *args: True):
        self._which = which
        self.go = threading.Event()
        self.count = 0

    def __call__(self, *args: Any) -> None:
        if self._which(*args):
            self.count += 1
            assert self.go.wait(2 * PATIENCE_S)


def in_a_loop(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A test that is a coroutine."""

    @functools.wraps(test)
    def run(*args: Any, **options: Any) -> None:
        asyncio.run(test(*args, **options))

    return run


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
