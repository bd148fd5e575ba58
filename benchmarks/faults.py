"""Hot swap under load and damaged adapters, on a tiny random model in a real server.

    python benchmarks/faults.py                       1,000 swaps and 500 damaged adapters, some minutes
    python benchmarks/faults.py --swaps 60 --damaged 60 --schema-examples 20

Every answer is compared with what transformers and the reference circuits say its adapter answers. Prints the
figures of docs/hot-swap.md; --json FILE writes them too. Exits with 1 if an answer was wrong or a request failed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import pickle
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import httpx
import numpy as np
import openai
import torch
import transformers
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from server_process import ADMIN_KEY, ServerProcess
from tiny_models import ATTENTION, VOCAB, ReferenceModel, make_lora, make_model, make_qaa

from qaa_serve.adapters import load_adapter
from qaa_serve.registry import read_revision

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMES = tuple(f"n{i}" for i in range(8))
#: How each name is replaced: by a path in the adapters directory, an upload, or a directory renamed into place.
WAYS = ("path", "path", "path", "upload", "upload", "upload", "directory", "directory")
PROMPTS = ("t11 t12 t13 t14 t15 t16", "t90 t4 t57", "t30 t31 t32 t33 t34 t35 t36 t37 t38")
TOKENS = 12


def words(seed: int, length: int) -> str:
    ids = torch.randint(4, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))
    return " ".join(f"t{i}" for i in ids.tolist())


@dataclass
class Stage:
    """A base model, eight adapters in two versions each, and what each of them answers."""

    root: Path
    base: Path
    adapters: Path
    _answers: dict[tuple[str, str, str], str] = field(default_factory=dict)

    @classmethod
    def make(cls, root: Path) -> Stage:
        """Six QAA and two LoRA adapters; version A of each is in the adapters directory."""
        stage = cls(root, make_model(root / "base", "llama"), root / "adapters")
        for i, name in enumerate(NAMES):
            for j, version in enumerate("AB"):
                place, seed = stage.version(name, version), 10 * i + j
                if i in (2, 7):
                    make_lora(place, stage.base, ATTENTION["llama"], seed)
                else:
                    make_qaa(place, stage.base, ATTENTION["llama"], seed, heads=1 + i % 2)
            shutil.copytree(stage.version(name, "A"), stage.adapters / name)
        return stage

    def version(self, name: str, version: str) -> Path:
        """Where a version's files are: inside the adapters directory, but hidden."""
        return self.adapters / ".versions" / f"{name}-{version}"

    def revision(self, name: str, version: str) -> str:
        return read_revision(self.version(name, version), name).revision

    def answers(self, prompts: tuple[str, ...] = PROMPTS) -> dict[tuple[str, str, str], str]:
        """(name, version, prompt) -> greedy text by transformers and reference circuits; ("base", "", ...) too."""
        missing = [prompt for prompt in prompts if ("base", "", prompt) not in self._answers]
        if missing:
            reference = ReferenceModel(self.base)
            worn: dict[tuple[str, str], Any] = {("base", ""): None}
            for name in NAMES:
                for version in "AB":
                    place = self.version(name, version)
                    is_lora = json.loads((place / CONFIG).read_text())["peft_type"] == "LORA"
                    worn[name, version] = place if is_lora else load_adapter(place)
            self._answers |= {
                (name, version, prompt): greedy(reference, adapter, prompt)
                for (name, version), adapter in worn.items()
                for prompt in missing
            }
        return {key: text for key, text in self._answers.items() if key[2] in prompts}


def greedy(reference: ReferenceModel, adapter: Any, prompt: str, count: int = TOKENS) -> str:
    tokens = [1 if word == "<s>" else int(word[1:]) for word in prompt.split()]
    return " ".join(f"t{token}" for token in reference.greedy(adapter, tokens, count) if token > 2)


# ------------------------------------------------------------------------------------------------ clients


@dataclass(frozen=True)
class Keys:
    client: str = "none"
    admin: str = ADMIN_KEY

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.admin}"}


class Admin:
    """The admin API."""

    def __init__(self, url: str, keys: Keys):
        self._http = httpx.AsyncClient(base_url=url, headers=keys.headers, timeout=60)

    async def __aenter__(self) -> Admin:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._http.aclose()

    async def get(self, name: str) -> dict[str, Any]:
        return (await self._http.get(f"/v1/adapters/{name}")).json()

    async def all(self) -> dict[str, dict[str, Any]]:
        return {item["id"]: item for item in (await self._http.get("/v1/adapters")).json()["data"]}

    async def replace(self, stage: Stage, name: str, version: str, way: str) -> None:
        """Have a version served under a name; returns when the server says it is."""
        source = stage.version(name, version)
        if way == "path":
            answer = await self._http.put(f"/v1/adapters/{name}", json={"path": str(source)})
            answer.raise_for_status()
        elif way == "upload":
            with (source / CONFIG).open("rb") as config, (source / WEIGHTS).open("rb") as weights:
                answer = await self._http.put(f"/v1/adapters/{name}", files={"config": config, "weights": weights})
            answer.raise_for_status()
        else:
            rename_into_place(source, stage.adapters / name)
        expected = stage.revision(name, version)
        deadline = time.monotonic() + 60
        while (await self.get(name)).get("revision") != expected:
            assert time.monotonic() < deadline, f"{name} did not become {expected}: {await self.get(name)}"
            await asyncio.sleep(0.01)


def rename_into_place(source: Path, place: Path) -> None:
    """What `qaa-serve train` and a careful person do."""
    beside = place.with_name(f".{place.name}.new")
    shutil.copytree(source, beside)
    if place.exists():
        old = place.with_name(f".{place.name}.old")
        place.rename(old)
        beside.rename(place)
        shutil.rmtree(old)
    else:
        beside.rename(place)


def openai_client(server: ServerProcess, keys: Keys = Keys()) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=keys.client, max_retries=0, timeout=60)


async def complete(client: openai.AsyncOpenAI, model: str, prompt: str, stream: bool, tokens: int = TOKENS) -> str:
    ask = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0}
    if not stream:
        answer = await client.completions.create(**ask, extra_body={"ignore_eos": True})
        assert answer.model == model
        return answer.choices[0].text.strip()
    chunks = await client.completions.create(**ask, stream=True, extra_body={"ignore_eos": True})
    return "".join([chunk.choices[0].text async for chunk in chunks if chunk.choices]).strip()


# -------------------------------------------------------------------------------------------------- swaps


@dataclass
class SwapReport:
    """What happened while adapters were replaced; times in seconds, memory in bytes."""

    swaps: int = 0
    requests: int = 0
    failed: list[str] = field(default_factory=list)
    mixed: list[str] = field(default_factory=list)
    stale: list[str] = field(default_factory=list)
    swap_s: list[float] = field(default_factory=list)
    steps_s: list[float] = field(default_factory=list)
    quiet_stalls_s: list[float] = field(default_factory=list)
    stalls_s: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        step = statistics.median(self.steps_s)
        half = self.memory[len(self.memory) // 2 :] or [0]
        return {
            "swaps": self.swaps,
            "requests": self.requests,
            "failed": len(self.failed),
            "mixed": len(self.mixed),
            "stale": len(self.stale),
            "swap_ms_median": 1e3 * statistics.median(self.swap_s),
            "decode_step_ms_median": 1e3 * step,
            "stall_steps_median": statistics.median(self.stalls_s) / step,
            "stall_steps_p99": float(np.percentile(self.stalls_s, 99)) / step,
            "stall_without_swaps_steps_p99": float(np.percentile(self.quiet_stalls_s, 99)) / step,
            "memory_mb_first_last": [self.memory[0] / 1e6, self.memory[-1] / 1e6],
            "memory_growth_last_half_percent": 100 * (half[-1] / max(half[0], 1) - 1),
        }


class Timeline:
    """Which version a name stood for, as far as a client can know."""

    def __init__(self) -> None:
        # (name, version, when the swap to it was begun, when it was confirmed)
        self._swaps: list[tuple[str, str, float, float]] = [(name, "A", 0.0, 0.0) for name in NAMES]

    def begin(self, name: str, version: str) -> int:
        self._swaps.append((name, version, time.monotonic(), float("inf")))
        return len(self._swaps) - 1

    def confirm(self, number: int) -> None:
        name, version, begun, _ = self._swaps[number]
        self._swaps[number] = (name, version, begun, time.monotonic())

    def allowed(self, name: str, asked: float, answered: float) -> set[str]:
        """Versions that a request may have been answered by: not retired before it came."""
        mine = [swap for swap in self._swaps if swap[0] == name and swap[2] <= answered]
        confirmed = [swap for swap in mine if swap[3] <= asked]
        return {confirmed[-1][1]} | {version for _, version, _, end in mine if end > asked}


async def swap_under_load(
    server: ServerProcess,
    stage: Stage,
    swaps: int,
    keys: Keys,
    *,
    clients: int = 4,
    quiet_s: float = 5.0,
    tick: Callable[[], None] = lambda: None,
) -> SwapReport:
    """Replace adapters one after the other while others ask for them, and compare every answer."""
    report, timeline = SwapReport(), Timeline()
    expected = stage.answers()
    stopping = asyncio.Event()
    chance = random.Random(0)
    tokens_at: list[list[float]] = []

    async def ask(client: openai.AsyncOpenAI) -> None:
        while not stopping.is_set():
            name, prompt = chance.choice((*NAMES, "base")), chance.choice(PROMPTS)
            asked = time.monotonic()
            try:
                text = await complete(client, name, prompt, stream=chance.random() < 0.5)
            except Exception as error:
                report.failed.append(f"{name}: {error!r}")
                continue
            report.requests += 1
            if name == "base":
                if text != expected["base", "", prompt]:
                    report.mixed.append(f"base: {text}")
                continue
            found = {version for version in "AB" if text == expected[name, version, prompt]}
            if not found:
                report.mixed.append(f"{name}: {text}")
            elif not found & timeline.allowed(name, asked, time.monotonic()):
                report.stale.append(f"{name}: {found}")

    async def stream(client: openai.AsyncOpenAI) -> None:
        """Requests that only decode: their gaps between tokens show what a swap costs the others."""
        while not stopping.is_set():
            times: list[float] = []
            tokens_at.append(times)
            try:
                chunks = await client.completions.create(
                    model="base", prompt="t7 t8", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
                )
                async for _ in chunks:
                    times.append(time.monotonic())
            except Exception as error:
                report.failed.append(f"stream: {error!r}")

    def gaps() -> Iterator[tuple[float, float]]:
        for times in tokens_at:
            yield from pairwise(times)

    def longest(begin: float, end: float) -> float:
        return max((b - a for a, b in gaps() if b >= begin and a <= end), default=0.0)

    def memory() -> int:
        return sum(process.memory_info().rss for process in server.family())

    windows: list[tuple[float, float]] = []
    async with openai_client(server, keys) as client, Admin(server.url, keys) as admin:
        load = [asyncio.create_task(ask(client)) for _ in range(clients)]
        load += [asyncio.create_task(stream(client)) for _ in range(2)]
        await asyncio.sleep(quiet_s)
        quiet_end = time.monotonic()
        report.steps_s = [b - a for a, b in gaps()]
        serving = dict.fromkeys(NAMES, "A")
        for i in range(swaps):
            name = NAMES[i % len(NAMES)]
            serving[name] = "B" if serving[name] == "A" else "A"
            begun = time.monotonic()
            number = timeline.begin(name, serving[name])
            await admin.replace(stage, name, serving[name], WAYS[i % len(NAMES)])
            timeline.confirm(number)
            report.swap_s.append(time.monotonic() - begun)
            windows.append((begun, time.monotonic()))
            report.swaps += 1
            if i % max(1, swaps // 40) == 0:
                report.memory.append(memory())
            tick()
        await asyncio.sleep(0.5)
        report.memory.append(memory())
        stopping.set()
        await asyncio.gather(*load)
        for name in NAMES:  # back to where the stage began
            if serving[name] == "B":
                await admin.replace(stage, name, "A", WAYS[NAMES.index(name)])
    report.stalls_s = [longest(*window) for window in windows]
    length = statistics.median(report.swap_s)
    starts = np.arange(quiet_end - quiet_s + 0.5, quiet_end - length, length)
    report.quiet_stalls_s = [longest(start, start + length) for start in starts]
    return report


# ----------------------------------------------------------------------------------------------- damage

Damage = Callable[[Path], None]


def _edit_config(**changes: Any) -> Damage:
    def damage(place: Path) -> None:
        config = json.loads((place / CONFIG).read_text()) | changes
        (place / CONFIG).write_text(json.dumps(config))

    return damage


def _edit_tensors(edit: Callable[[str, torch.Tensor], torch.Tensor]) -> Damage:
    def damage(place: Path) -> None:
        tensors = load_file(place / WEIGHTS)
        save_file({name: edit(name, tensor).contiguous() for name, tensor in tensors.items()}, place / WEIGHTS)

    return damage


def _write(name: str, content: bytes) -> Damage:
    def damage(place: Path) -> None:
        (place / name).write_bytes(content)

    return damage


def _instead(name: str, make: Callable[[Path], object]) -> Damage:
    def damage(place: Path) -> None:
        (place / name).unlink()
        make(place / name)

    return damage


def _truncated(place: Path) -> None:
    whole = (place / WEIGHTS).read_bytes()
    (place / WEIGHTS).write_bytes(whole[: random.randrange(len(whole))])


def _bit_flipped(place: Path) -> None:
    """In the header's length: flips elsewhere may leave a valid adapter with other numbers."""
    raw = bytearray((place / WEIGHTS).read_bytes())
    raw[random.randrange(8)] ^= 1 << random.randrange(8)
    (place / WEIGHTS).write_bytes(raw)


def _chain_of_links(path: Path) -> None:
    for i in range(60):
        (path.parent / f"link{i}").symlink_to(f"link{i + 1}")
    path.symlink_to("link0")


def _only_pickle(place: Path) -> None:
    (place / WEIGHTS).rename(place / "adapter_model.bin")


DAMAGES: dict[str, Damage] = {
    "truncated": _truncated,
    "bit flipped": _bit_flipped,
    "empty weights": _write(WEIGHTS, b""),
    "empty config": _write(CONFIG, b""),
    "config not JSON": _write(CONFIG, b"{'peft_type': 'QAA'}"),
    "config deeply nested": _write(CONFIG, b"[" * 100_000),
    "config too large": _write(CONFIG, b" " * (3 << 20)),
    "config an array": _write(CONFIG, b"[]"),
    "header claims 2^63 bytes": _write(WEIGHTS, (1 << 63).to_bytes(8, "little") + b"{}"),
    "header claims 90 MB": _write(WEIGHTS, (90_000_000).to_bytes(8, "little") + b"{}"),
    "pickle as safetensors": _write(WEIGHTS, pickle.dumps({"x": 1}, protocol=4)),
    "pickle only": _only_pickle,
    "NaN": _edit_tensors(lambda name, tensor: tensor.float() * float("nan")),
    "infinite": _edit_tensors(lambda name, tensor: torch.full_like(tensor, float("inf"))),
    "wrong shape": _edit_tensors(lambda name, tensor: tensor[..., :-1]),
    "wrong rank": _edit_tensors(lambda name, tensor: tensor.flatten()),
    "too few rows": _edit_tensors(lambda name, tensor: tensor[:-1]),
    "double": _edit_tensors(lambda name, tensor: tensor.double()),
    "no tensors": lambda place: save_file({}, place / WEIGHTS),
    "unknown ansatz": _edit_config(ansatz="mystery", r=-1),
    "unknown kind": _edit_config(peft_type="IA3"),
    "unknown target": _edit_config(target_modules=["no_such_proj"]),
    "negative layers": _edit_config(layers=-2, r=0),
    "a million layers": _edit_config(layers=1_000_000, r="many"),
    "weights link out": _instead(WEIGHTS, lambda path: path.symlink_to("/etc/passwd")),
    "weights link to zeros": _instead(WEIGHTS, lambda path: path.symlink_to("/dev/zero")),
    "weights link to itself": _instead(WEIGHTS, lambda path: path.symlink_to(WEIGHTS)),
    "sixty links": _instead(WEIGHTS, _chain_of_links),
    "weights a pipe": _instead(WEIGHTS, os.mkfifo),
    "weights a directory": _instead(WEIGHTS, Path.mkdir),
    "config a directory": _instead(CONFIG, Path.mkdir),
}


#: What vLLM takes in a LoRA adapter.
FOR_QAA_ONLY = {"double", "unknown target"}


@dataclass
class DamageReport:
    """What became of damaged adapters."""

    dropped: int = 0
    requests: int = 0
    wrong: list[str] = field(default_factory=list)
    served: list[str] = field(default_factory=list)
    without_reason: list[str] = field(default_factory=list)
    reasons: dict[str, str] = field(default_factory=dict)


async def drop_damaged(
    server: ServerProcess, stage: Stage, count: int, keys: Keys, tick: Callable[[], None] = lambda: None
) -> DamageReport:
    """Rename damaged adapters into the adapters directory while good ones are asked for, then take them away."""
    report = DamageReport()
    expected = stage.answers(PROMPTS[:1])
    other = make_model(stage.root / "other", "qwen2")
    sources = [stage.version("n0", "A"), stage.version("n2", "A")]
    make_qaa(stage.root / "stranger", other, ATTENTION["qwen2"], 1)
    stopping = asyncio.Event()

    async def ask(client: openai.AsyncOpenAI) -> None:
        while not stopping.is_set():
            name = random.choice(NAMES)
            try:
                text = await complete(client, name, PROMPTS[0], stream=False)
            except Exception as error:
                report.wrong.append(f"{name}: {error!r}")
                continue
            report.requests += 1
            if text != expected[name, "A", PROMPTS[0]]:
                report.wrong.append(f"{name}: {text}")

    kinds = [*DAMAGES, "another base", "bad name"]
    names = []
    async with openai_client(server, keys) as client, Admin(server.url, keys) as admin:
        load = [asyncio.create_task(ask(client)) for _ in range(2)]
        for i in range(count):
            kind = kinds[i % len(kinds)]
            name = f"damaged {i}" if kind == "bad name" else f"damaged-{i}"
            beside = stage.adapters / f".new-{i}"
            source = sources[0 if kind in FOR_QAA_ONLY else i % 2]
            shutil.copytree(stage.root / "stranger" if kind == "another base" else source, beside)
            if kind in DAMAGES:
                DAMAGES[kind](beside)
            beside.rename(stage.adapters / name)
            names.append((name, kind))
            tick()
            await asyncio.sleep(0)
        deadline = time.monotonic() + 60 + count
        while True:
            states = await admin.all()
            unchecked = [name for name, _ in names if states.get(name, {"state": "known"})["state"] == "known"]
            if not unchecked:
                break
            assert time.monotonic() < deadline, unchecked
            await asyncio.sleep(0.2)
        for name, kind in names:
            state = states[name]
            reason = (state["rejection"] or {}).get("reason")
            if state["state"] == "served":
                report.served.append(f"{kind} ({state['kind']})")
            elif not reason:
                report.without_reason.append(kind)
            else:
                report.reasons.setdefault(kind, reason)
        report.dropped = len(names)
        for name, _ in names:
            shutil.rmtree(stage.adapters / name)
        while not set(await admin.all()) <= set(NAMES):
            assert time.monotonic() < deadline + 60
            await asyncio.sleep(0.2)
        stopping.set()
        await asyncio.gather(*load)
    return report


# ------------------------------------------------------------------------------------------------ schema


def fuzz_schema(server: ServerProcess, keys: Keys, examples: int) -> tuple[int, str]:
    """Send schemathesis' requests to our routes; (exit status, what it printed)."""
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json",
        "--include-path-regex", "^/(v1/adapters|v1/load_lora_adapter|v1/unload_lora_adapter|ready)",
        "--max-examples", str(examples), "--checks", "not_a_server_error", "--request-timeout", "20",
        "--phases", "examples,coverage,fuzzing", "--no-color", "--max-failures", "5",
        "--seed", "0", "--generation-database", "none",
    ]  # fmt: skip
    for name, value in keys.headers.items():
        command += ["--header", f"{name}: {value}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=tempfile.gettempdir())
    return done.returncode, done.stdout + done.stderr


# -------------------------------------------------------------------------------------------------- main


def start(stage: Stage, *options: str) -> ServerProcess:
    """A server for the stage; QAA and LoRA, as many slots as half the names."""
    command = ["qaa-serve", str(stage.base), "--adapters", str(stage.adapters), "--dtype", "float32"]
    command += ["--kv-cache-memory-bytes", "64M", "--max-loras", "4", "--max-num-seqs", "16"]
    command += ["--state-dir", str(stage.root / "state"), "--adapters-quiet", "0.5"]
    command += ["--disable-uvicorn-access-log", *options]
    return ServerProcess(command, stage.root / "server.log", forked=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--swaps", type=int, default=1000, help="replacements of the 8 names, in turn")
    parser.add_argument("--damaged", type=int, default=500, help="damaged adapters to drop")
    parser.add_argument("--schema-examples", type=int, default=400, help="most requests a route by schemathesis")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    args = parser.parse_args()
    figures: dict[str, Any] = {"machine": platform.machine(), "cores": os.cpu_count()}
    problems: list[str] = []
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(prefix="faults-") as temporary, Progress() as progress:
        stage = Stage.make(Path(temporary))
        server = start(stage).wait_ready()

        def bar(title: str, total: int) -> Callable[[], None]:
            task = progress.add_task(title, total=total)
            return lambda: progress.advance(task)

        try:
            tick = bar("swaps", args.swaps)
            swaps = asyncio.run(swap_under_load(server, stage, args.swaps, Keys(), quiet_s=30, tick=tick))
            figures["swaps"] = swaps.summary()
            problems += swaps.failed + swaps.mixed + swaps.stale
            tick = bar("damaged", args.damaged)
            damage = asyncio.run(drop_damaged(server, stage, args.damaged, Keys(), tick))
            figures["damaged"] = {
                "dropped": damage.dropped, "requests": damage.requests, "wrong": len(damage.wrong),
                "served": damage.served, "without_reason": damage.without_reason,
            }  # fmt: skip
            problems += damage.wrong + damage.served + damage.without_reason
            for kind, reason in damage.reasons.items():
                progress.console.print(f"{kind}: {reason}", markup=False)
            bar("schema", 1)
            status, text = fuzz_schema(server, Keys(), args.schema_examples)
            figures["schema"] = {"status": status, "printed": text.splitlines()[-6:]}
            problems += [text[-3000:]] if status else []
        finally:
            server.stop()
    for problem in problems[:10]:
        print(problem)
    text = json.dumps(figures, indent=2)
    print(text)
    if args.json:
        args.json.write_text(text + "\n")
    return int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
