"""What it costs to serve many adapters: requests/s, latency and memory with 5, 100, 1,000 and 5,000 of them.

    python benchmarks/many_adapters.py                    5, 100 and 1,000 adapters, three rounds
    python benchmarks/many_adapters.py --full             5,000 too
    python benchmarks/many_adapters.py --servers qaa lora stock --base examples/smollm2/base
    python benchmarks/many_adapters.py --counts 5 50 --rounds 1 --seconds 10      short, to see that it works
    python benchmarks/many_adapters.py --starts           what a start costs, and a cold adapter, with 10,000
    python benchmarks/many_adapters.py --starts --counts 40 --rounds 1 --cold 3   short, to see that it works

A small random Llama, or the model that --base names, is served with that many random adapters and fewer slots for
them (--max-loras) than there are, save for the 5 that the others are compared with. Clients wait for their answers
(a closed load) and ask for the adapters by Zipf's law, so that the engine keeps exchanging what is in its slots.
Prompts and answers have fixed lengths. --servers: `qaa` is qaa-serve with QAA adapters, `lora` qaa-serve with LoRA
r = 16 of the same modules, `stock` vLLM without the plugin, with the same LoRA adapters, all in its host memory.

Each round starts a server anew for every count and kind, in turn, every other round backwards, so that a slow
spell or a drift of the machine falls on all of them. Ratios, to the first count and to stock vLLM, are taken
within a round; medians over the rounds are printed, with the least and the most. Memory is resident (RSS), summed
over the server's processes, before the first request; pages that two processes share count twice. Bytes per
adapter are those of GET /v1/adapters, for QAA and for LoRA r = 16 of the same modules.

Nothing is measured before it is checked: two adapters must answer differently, and each the same twice. S-LoRA's
paper reports 5.5 % less throughput with 2,000 LoRA adapters than with 5, on a GPU and with models of billions of
parameters; neither is compared here.

--starts measures something else: seconds until /ready says that requests are taken, with no adapters and with so
many of a base of 30 layers (a few contents under different names), in turn: a first start, without a STATE, and a
later one, when all have been checked. Then, on the server that was started again, the time to the first token of
adapters that are checked and not in the engine (cold), and of the same ones again (warm): one after the other, and
--at-once different ones together.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import shlex
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "loadtests")]

import httpx
import openai
import psutil
import server_process
import tiny_models
import torch
import transformers
import workload
from make_adapters import make_adapters
from records import Objective, Record, figures
from rich.console import Console
from rich.progress import track
from rich.table import Table
from server_process import ServerProcess
from transformers import LlamaConfig

START_LIMIT_S = 3600
LORA_RANK = 16
#: Kinds of servers, and of the adapters that each has.
SERVERS = {"qaa": "qaa", "lora": "lora", "stock": "lora"}
#: Different contents for --base, whose adapters are large; their names are as many as --counts says.
CONTENTS = 32
#: Where the LoRA adapter that is only weighed lies inside the adapters directory.
WEIGHED = ".weighed"

console = Console(highlight=False)
console.width = max(console.width, 110)


# ---------------------------------------------------------------------------------------------------- stage


def make_base(directory: Path, hidden: int, layers: int) -> Path:
    """A random Llama with the tests' tokenizer, whose words t3 to t159 are its tokens."""
    tiny_models.CONFIGS["llama"] = lambda: LlamaConfig(
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=max(1, hidden // 64),
        num_key_value_heads=max(1, hidden // 64),
        vocab_size=tiny_models.VOCAB,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    return tiny_models.make_model(directory, "llama")


def words(rng: random.Random, tokens: int) -> str:
    """A prompt of so many tokens."""
    return " ".join(f"t{rng.randrange(4, tiny_models.VOCAB)}" for _ in range(tokens))


def take(contents: list[Path], names: list[str], directory: Path) -> Path:
    """An adapters directory with these names, whose contents are taken in turn, by hard links."""
    for i, name in enumerate(names):
        shutil.copytree(contents[i % len(contents)], directory / name, copy_function=os.link)
    return directory


def start(args: argparse.Namespace, base: Path, adapters: Path, state: Path, *options: str) -> ServerProcess:
    command = [
        "qaa-serve", str(base), "--adapters", str(adapters), "--state-dir", str(state), "--dtype", "float32",
        "--served-model-name", "base", "--max-loras", str(args.max_loras), "--max-lora-rank", str(LORA_RANK),
        "--kv-cache-memory-bytes", "256M", "--max-num-seqs", str(args.clients), "--max-model-len", "512",
        "--disable-uvicorn-access-log", *options, *shlex.split(args.server_options),
    ]  # fmt: skip
    return ServerProcess(command, state.with_suffix(".log"), measuring=True)


def start_stock(args: argparse.Namespace, base: Path, adapters: Path, log: Path) -> ServerProcess:
    """vLLM's own server without the plugin; it reads all adapters before it is ready."""
    names = sorted(path.name for path in adapters.iterdir())
    command = [
        "python", "-m", "vllm.entrypoints.openai.api_server", "--model", str(base), "--dtype", "float32",
        "--served-model-name", "base", "--host", "127.0.0.1", "--enable-lora",
        "--lora-modules", *(f"{name}={adapters / name}" for name in names),
        "--max-loras", str(args.max_loras), "--max-cpu-loras", str(max(len(names), args.max_loras)),
        "--max-lora-rank", str(LORA_RANK), "--kv-cache-memory-bytes", "256M", "--max-num-seqs", str(args.clients),
        "--max-model-len", "512", "--disable-uvicorn-access-log",
    ]  # fmt: skip
    environment = {"VLLM_PLUGINS": "none", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    return ServerProcess(command, log, "Application startup complete", measuring=True, environment=environment)


def resident_bytes(server: ServerProcess) -> dict[str, int]:
    """RSS of each of the server's processes, by what it calls itself."""
    found: dict[str, int] = {}
    for process in server.family():
        try:
            title, memory = " ".join(process.cmdline()), process.memory_info().rss
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        name = next((n for n in ("EngineCore", "Worker") if n in title), None)
        name = name or ("server" if process.pid == server.process.pid else "other")
        found[name] = found.get(name, 0) + memory
    return found


# -------------------------------------------------------------------------------------------------- checks


async def check(client: openai.AsyncOpenAI, names: list[str]) -> None:
    """Two adapters answer differently, each the same twice, and neither like the base.

    Raises:
        SystemExit: if not.
    """
    answers: dict[str, set[str]] = {}
    for name in ("base", *names):
        for _ in range(2):
            done = await client.completions.create(
                model=name, prompt="t11 t12 t13 t14", max_tokens=16, temperature=0, extra_body={"ignore_eos": True}
            )
            answers.setdefault(name, set()).add(done.choices[0].text)
    if any(len(texts) > 1 for texts in answers.values()):
        raise SystemExit(f"the same request was answered in two ways: nothing is measured. {answers}")
    if len(set.union(*answers.values())) < len(answers):
        raise SystemExit(f"two models answered alike: nothing is measured. {answers}")


# --------------------------------------------------------------------------------------------------- load


Text = Callable[[random.Random, int], str]


async def load(
    client: openai.AsyncOpenAI, names: list[str], args: argparse.Namespace, seed: int, text: Text
) -> dict[str, Any]:
    """A closed load for --warm-up and then --seconds; the figures of the second part."""
    rng, records = random.Random(seed), []
    models = workload.Models([], names, workload.parse_popularity(args.popularity), rng)
    prompts, answers = (workload.parse_lengths(form) for form in (args.prompt_tokens, args.output_tokens))
    began = time.perf_counter()
    until = began + args.warm_up + args.seconds

    async def ask() -> None:
        while (sent := time.perf_counter()) < until:
            name = models.next()
            stream = await client.completions.create(
                model=name, prompt=text(rng, prompts.draw(rng)), max_tokens=answers.draw(rng), stream=True,
                stream_options={"include_usage": True}, extra_body={"ignore_eos": True},
            )  # fmt: skip
            times, tokens = [], 0
            async for chunk in stream:
                if chunk.choices and chunk.choices[0].text:
                    times.append(time.perf_counter() - sent)
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
            took = time.perf_counter() - sent
            between = (times[-1] - times[0]) / (tokens - 1) if tokens > 1 else None
            outcome = ("adapter", "unknown", None, "answered", "")
            records.append(Record(sent - began, name, *outcome, took, times[0], between, tokens=tokens))

    async with asyncio.TaskGroup() as group:
        for _ in range(args.clients):
            group.create_task(ask())
    return figures(records, args.warm_up, args.warm_up + args.seconds, Objective())


# ------------------------------------------------------------------------------------------------- measure


async def use(
    server: ServerProcess, names: list[str], args: argparse.Namespace, seed: int, text: Text
) -> dict[str, Any]:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600
    ) as client:
        await check(client, names[:2])
        return await load(client, names, args, seed, text)


def bytes_of(server: ServerProcess) -> dict[str, dict[str, int | None]]:
    """Bytes in the store, in host memory and in the slots of one adapter of each kind that is loaded."""
    found: dict[str, dict[str, int | None]] = {}
    for adapter in server.adapters().values():
        if adapter["bytes"] and adapter["bytes"]["host"]:
            found.setdefault(adapter["kind"], adapter["bytes"])
    return found


def weigh_lora(server: ServerProcess) -> None:
    """Publish the LoRA adapter, to see its bytes."""
    with server.admin() as admin:
        admin.put("/v1/adapters/weighed-lora", json={"path": f"{WEIGHED}/lora-00000"}).raise_for_status()


def measure(
    args: argparse.Namespace, root: Path, base: Path, kind: str, count: int, round_: int, text: Text
) -> dict[str, Any]:
    """One server with ``count`` adapters: started, checked, loaded and ended."""
    place = root / f"{kind}-{count}-{round_}"
    contents = sorted((root / "pool" / SERVERS[kind]).iterdir())
    names = [f"{SERVERS[kind]}-{i:05}" for i in range(count)]
    adapters = take(contents, names, place / "adapters")
    began = time.perf_counter()
    if kind == "stock":
        server = start_stock(args, base, adapters, place / "stock.log")
    else:
        shutil.copytree(root / "pool" / "lora" / "lora-00000", adapters / WEIGHED / "lora-00000")
        server = start(args, base, adapters, place / "state", "--strict-adapters")
    try:
        server.wait_ready(START_LIMIT_S)
        row: dict[str, Any] = {"server": kind, "adapters": count, "round": round_}
        row["start_s"] = time.perf_counter() - began
        time.sleep(2)
        row["resident_bytes"] = resident_bytes(server)
        row["resident_total_bytes"] = sum(row["resident_bytes"].values())
        console.print(f"[dim]{kind}, {count:,} adapters: started in {row['start_s']:.0f} s; load[/dim]")
        found = asyncio.run(use(server, names, args, round_, text))
        if not found["requests_per_second"] or not found["answered"]:
            raise SystemExit(
                f"no request with {count:,} adapters began and ended within {args.seconds:g} s: raise --seconds"
            )
        row["requests"] = found["answered"]
        row["requests_per_second"], row["tokens_per_second"] = (
            found["requests_per_second"], found["tokens_per_second"],
        )  # fmt: skip
        row["ttft_p50_s"], row["ttft_p95_s"] = found["ttft_s"]["p50"], found["ttft_s"]["p95"]
        row["inter_token_p50_s"] = found["inter_token_s"]["p50"]
        row["resident_after_bytes"] = sum(resident_bytes(server).values())
        if kind != "stock":
            weigh_lora(server)
            row["bytes"] = bytes_of(server)
    finally:
        server.stop()
    shutil.rmtree(place)
    return row


def ratios_of(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> dict[str, float] | None:
    """Requests/s of rows over those of others in the same round: median, least and most; None without any."""
    beside = {row["round"]: row["requests_per_second"] for row in others}
    ratios = [row["requests_per_second"] / beside[row["round"]] for row in rows if beside.get(row["round"])]
    return {"median": statistics.median(ratios), "least": min(ratios), "most": max(ratios)} if ratios else None


def medians(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the rounds for each server and count, with the ratios to its first count and to stock vLLM."""
    of: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for row in rows:
        of.setdefault((row["server"], row["adapters"]), []).append(row)
    result = []
    for (kind, count), mine in of.items():
        middle = {
            key: statistics.median(row[key] for row in mine)
            for key, value in mine[0].items()
            if isinstance(value, float) or key.endswith("_total_bytes")
        }
        first = next(others for (other, _), others in of.items() if other == kind)
        stock = of.get(("stock", count), []) if kind != "stock" else []
        ratios = {"to_first": ratios_of(mine, first), "to_stock": ratios_of(mine, stock)}
        result.append({"server": kind, "adapters": count, **middle, **ratios})
    return result


# ------------------------------------------------------------------------------------------------- starts


def wait_for(server: ServerProcess, condition: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """What /ready says as soon as a condition holds of it.

    Raises:
        SystemExit: if the server ends, or it takes more than an hour.
    """
    deadline = time.monotonic() + START_LIMIT_S
    while server.process.poll() is None and time.monotonic() < deadline:
        with suppress(httpx.HTTPError):
            told: dict[str, Any] = httpx.get(f"{server.url}/ready", timeout=60).json()
            if condition(told):
                return told
        time.sleep(0.05)
    raise SystemExit(f"the server did not start; its log ends with:\n{server.text()[-4000:]}")


async def first_token_s(client: openai.AsyncOpenAI, name: str) -> float:
    began = time.perf_counter()
    stream = await client.completions.create(
        model=name, prompt="t11 t12 t13 t14", max_tokens=4, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    first = 0.0
    async for chunk in stream:
        if not first and chunk.choices and chunk.choices[0].text:
            first = time.perf_counter() - began
    return first


async def cold_and_warm(server: ServerProcess, names: list[str], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds to the first token, alone and together, of names that are not in the engine, and of the same again.

    Raises:
        SystemExit: if two models answer alike, or some that are to be cold are in the engine.
    """
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=600
    ) as client:
        await check(client, names[:2])
        for name in names[:2] * 3:
            await first_token_s(client, name)  # whatever is slow the first time
        await asyncio.gather(*(first_token_s(client, names[i % 2]) for i in range(args.at_once)))
        alone, together = names[2 : 2 + args.cold], names[2 + args.cold :][: args.at_once]
        known = server.adapters()
        if warm := [name for name in (*alone, *together) if known[name]["bytes"]["host"]]:
            raise SystemExit(f"{warm[0]} is in the engine already: nothing is measured")
        found: dict[str, Any] = {"cold_s": [], "warm_s": []}
        for name in alone:
            found["cold_s"].append(await first_token_s(client, name))
            found["warm_s"].append(await first_token_s(client, name))
        for which in ("cold", "warm"):
            found[f"{which}_together_s"] = await asyncio.gather(*(first_token_s(client, n) for n in together))
        return found


def measure_start(
    args: argparse.Namespace, base: Path, pool: list[Path], count: int, place: Path
) -> dict[str, Any]:
    """A first and a later start with so many names, and, if there are any, cold and warm ones."""
    names = [f"name-{i:06}" for i in range(count)]
    (place / "adapters").mkdir(parents=True)
    for i, name in enumerate(names):
        shutil.copytree(pool[i % len(pool)], place / "adapters" / name, copy_function=os.link)
    row: dict[str, Any] = {"adapters": count}
    for which in ("first", "later"):
        began = time.perf_counter()
        server = start(args, base, place / "adapters", place / "state")
        try:
            told = wait_for(server, lambda told: told["status"] == "ready")
            row[f"{which}_s"] = time.perf_counter() - began
            if told["adapters"] != count or (which == "later" and told["unchecked"]):
                raise SystemExit(f"of {count:,} adapters the server has {told}: nothing is measured")
            wait_for(server, lambda told: not told["unchecked"])
            row[f"{which}_checked_s"] = time.perf_counter() - began
            if names and which == "later":
                row |= asyncio.run(cold_and_warm(server, names, args))
        finally:
            server.stop()
    shutil.rmtree(place)
    return row


def measure_starts(args: argparse.Namespace, root: Path) -> list[dict[str, Any]]:
    """Starts with none and with --counts, in turn."""
    base = make_base(root / "base", args.hidden, args.layers)
    pool = list(make_adapters(str(base), root / "pool", "qaa", 8, size=1.0))
    measure_start(args, base, pool, 0, root / "warm-up")  # whatever a first server compiles or reads for all
    rows = []
    for round_ in range(args.rounds):
        for count in (0, *args.counts)[:: -1 if round_ % 2 else 1]:
            row = measure_start(args, base, pool, count, root / f"{count}-{round_}")
            rows.append({"round": round_, **row})
            console.print(
                f"round {round_ + 1} of {args.rounds}, {count:,} adapters: {row['first_s']:.1f} s, "
                f"later {row['later_s']:.1f} s"
            )
    return rows


def show_starts(args: argparse.Namespace, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print and return medians over the rounds, with the least and the most."""

    def text(values: Iterable[float], form: str) -> str:
        least, *_, most = ordered = sorted(values) * 2
        middle = f"{statistics.median(ordered):{form}}"
        return middle if least == most else f"{middle} ({least:{form}} to {most:{form}})"

    of: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        of.setdefault(row["adapters"], []).append(row)
    table = Table("adapters", "first start s", "over none s", "later start s", "over none s", "all checked s")
    tokens = Table("adapters", "first token", "cold ms", "warm ms", "cold over warm")
    medians = []
    for count, mine in of.items():
        over = {
            which: [row[which] - none[which] for row, none in zip(mine, of[0], strict=True)]
            for which in ("first_s", "later_s")
        }
        middle = {
            key: statistics.median(row[key] for row in mine) for key in ("first_s", "later_s", "first_checked_s")
        }
        medians.append(
            {"adapters": count, **middle, **{f"over_none_{k}": statistics.median(v) for k, v in over.items()}}
        )
        cells = [
            cell
            for which in ("first_s", "later_s")
            for cell in (text((row[which] for row in mine), ".1f"), text(over[which], ".1f"))
        ]
        table.add_row(f"{count:,}", *cells, text((row["first_checked_s"] for row in mine), ".1f"))
        if not count:
            continue
        for what, suffix, figure in (
            ("alone", "_s", statistics.median),
            (f"{args.at_once} together, the half", "_together_s", statistics.median),
            (f"{args.at_once} together, the slowest", "_together_s", max),
        ):
            cold, warm = ([figure(row[which + suffix]) for row in mine] for which in ("cold", "warm"))
            ratios = [c / w for c, w in zip(cold, warm, strict=True)]
            tokens.add_row(
                f"{count:,}", what, text((1e3 * c for c in cold), ".1f"), text((1e3 * w for w in warm), ".1f"),
                text(ratios, ".2f"),
            )  # fmt: skip
            medians[-1][what] = {
                "cold_s": statistics.median(cold), "warm_s": statistics.median(warm),
                "ratio": statistics.median(ratios),
            }  # fmt: skip
    console.print(table)
    console.print(tokens)
    return medians


# ------------------------------------------------------------------------------------------------- output


def show(found: dict[str, Any]) -> None:
    def ratio(value: dict[str, float] | None) -> str:
        if value is None:
            return "-"
        return f"{value['median']:.2f} ({value['least']:.2f} to {value['most']:.2f})"

    table = Table(
        "server", "adapters", "requests/s", "to its first", "to stock", "TTFT p50/p95 ms", "ITL p50 ms", "RSS MiB",
        "start s",
    )  # fmt: skip
    for row in found["medians"]:
        table.add_row(
            row["server"], f"{row['adapters']:,}", f"{row['requests_per_second']:.2f}", ratio(row["to_first"]),
            ratio(row["to_stock"]), f"{1e3 * row['ttft_p50_s']:.0f} / {1e3 * row['ttft_p95_s']:.0f}",
            f"{1e3 * row['inter_token_p50_s']:.1f}" if "inter_token_p50_s" in row else "-",
            f"{row['resident_total_bytes'] / 2**20:,.0f}", f"{row['start_s']:.0f}",
        )  # fmt: skip
    console.print(table)
    for kind, size in found["bytes"].items():
        console.print(f"{kind}: {size['store']:,} bytes on disk, {size['host']:,} in host memory, an adapter")


def plot(found: dict[str, Any], path: Path) -> None:
    """Requests/s relative to each server's first count, and memory, against the number of adapters."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for kind, colour in zip(SERVERS, ("#1f77b4", "#d95f02", "#777777"), strict=True):
        if not (mine := [row for row in found["medians"] if row["server"] == kind]):
            continue
        counts = sorted(row["adapters"] for row in mine)
        mine.sort(key=lambda row: row["adapters"])
        ratios = [row["to_first"] for row in mine]
        spread = [[r["median"] - r["least"] for r in ratios], [r["most"] - r["median"] for r in ratios]]
        left.errorbar(counts, [r["median"] for r in ratios], spread, fmt="o-", color=colour, capsize=3, label=kind)
        resident = [row["resident_total_bytes"] / 2**20 for row in mine]
        right.plot(counts, resident, "o-", color=colour, label=kind)
    left.axhline(1, color="#999999", linewidth=0.8)
    left.set(xscale="log", xlabel="adapters", ylabel=f"requests/s, {counts[0]} adapters = 1")
    right.set(xscale="log", xlabel="adapters", ylabel="resident memory after start, MiB")
    for axes in (left, right):
        axes.set_ylim(0, 1.1 * axes.get_ylim()[1])
        axes.set_xticks(counts, [f"{count:,}" for count in counts])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def hardware() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


# -------------------------------------------------------------------------------------------------- main


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--counts", type=int, nargs="+", help="numbers of adapters; the first is compared with (5 100 1000)")
    add("--full", action="store_true", help="5,000 adapters too")
    add("--starts", action="store_true", help="starts and cold adapters (--counts: 10000)")
    add("--cold", type=int, default=10, help="cold adapters that are asked for alone (default: 10)")
    add("--at-once", type=int, default=20, help="cold adapters that are asked for together (default: 20)")
    add("--rounds", type=int, default=3, help="servers started of each kind for each count (default: 3)")
    add("--servers", nargs="+", choices=SERVERS, default=["qaa"], help="kinds of servers (default: qaa)")
    add("--base", type=Path, help="a model's directory in place of the random Llama")
    add("--seconds", type=float, default=60, help="load that is measured (default: 60)")
    add("--warm-up", type=float, default=10, help="seconds of load before that (default: 10)")
    add("--clients", type=int, default=16, help="requests under way at once (default: 16)")
    add("--max-loras", type=int, help="slots of the engine (8; with --starts as many as --at-once)")
    add("--popularity", default="zipf:1", help=f"{workload.POPULARITY_FORMS} (default: zipf:1)")
    add("--prompt-tokens", default="fixed:32", help=f"{workload.LENGTH_FORMS} (default: fixed:32)")
    add("--output-tokens", default="fixed:32", help="in the same forms (default: fixed:32)")
    add("--hidden", type=int, help="width of the base (256; with --starts 64)")
    add("--layers", type=int, help="layers of the base (4; with --starts 30)")
    add("--server-options", default="", help='further options of qaa-serve, in quotes: "--enforce-eager"')
    add("--json", type=Path, help="where to write all figures")
    add("--plot", type=Path, help="where to write a PNG file")
    args = parser.parse_args()
    counts = [5, 100, 1000, 5000] if args.full else [5, 100, 1000]
    usual = {"counts": counts, "max_loras": 8, "hidden": 256, "layers": 4}
    if args.starts:
        usual = {"counts": [10_000], "max_loras": args.at_once, "hidden": 64, "layers": 30}
        args.clients = max(args.clients, args.at_once)
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.starts and min(args.counts) < (needed := 2 + args.cold + args.at_once):
        parser.error(f"--counts: {needed} are asked for, so at least as many are needed")
    if args.starts and (args.plot or args.base or args.servers != ["qaa"]):
        parser.error("--starts: without --plot, --base and --servers")
    if args.base and not (args.base / "tokenizer.json").is_file():
        parser.error(f"--base: {args.base} has no tokenizer.json")
    if min(args.counts) < 2:
        parser.error("--counts: two adapters are compared, so at least 2 are needed")
    for parse_form, form in (
        (workload.parse_popularity, args.popularity),
        (workload.parse_lengths, args.prompt_tokens),
        (workload.parse_lengths, args.output_tokens),
    ):
        try:
            parse_form(form)
        except workload.WorkloadError as error:
            parser.error(str(error))
    return args


def write(args: argparse.Namespace, found: dict[str, Any]) -> None:
    """Print where the figures are from, and write them into --json's file."""
    origin = {
        "command": shlex.join(["python", "benchmarks/many_adapters.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "settings": {k: v for k, v in vars(args).items() if k not in ("json", "plot")},
    }
    console.print(f"{origin['hardware']}, {origin['cores']} cores, torch {origin['torch']}")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({**origin, **found}, indent=1, default=str) + "\n")


def main() -> None:
    args = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # through what ends the servers
    server_process.START_LIMIT_S = START_LIMIT_S
    transformers.utils.logging.disable_progress_bar()
    if (others := os.getloadavg()[0]) > 0.5:
        console.print(
            f"Warning: the load average is {others:.1f}: what else runs here is in the figures", style="yellow"
        )
    rows = []
    with tempfile.TemporaryDirectory(prefix="many-adapters-") as temporary:
        root = Path(temporary)
        if args.starts:
            write(args, {"rounds": (found := measure_starts(args, root)), "medians": show_starts(args, found)})
            return
        base = args.base.resolve() if args.base else make_base(root / "base", args.hidden, args.layers)
        text = workload.exact_english(workload.load_tokenizer(str(base))) if args.base else words
        contents = min(max(args.counts), CONTENTS) if args.base else max(args.counts)
        for kind in sorted({"lora", *(SERVERS[server] for server in args.servers)}):
            count = contents if kind in (SERVERS[server] for server in args.servers) else 1
            made = make_adapters(
                str(base), root / "pool" / kind, kind, count, rank=LORA_RANK, size=0.1 if args.base else 1.0
            )
            for _ in track(made, total=count, description=f"{kind} adapters", console=console):
                pass
        for round_ in range(args.rounds):
            order = [(count, server) for count in args.counts for server in args.servers]
            for count, server in order[:: -1 if round_ % 2 else 1]:
                rows.append(measure(args, root, base, server, count, round_, text))
                console.print(
                    f"round {round_ + 1} of {args.rounds}, {server}, {count:,} adapters: "
                    f"{rows[-1]['requests_per_second']:.2f} requests/s, started in {rows[-1]['start_s']:.0f} s"
                )
    found = {"medians": medians(rows), "rounds": rows}
    found["bytes"] = next((row["bytes"] for row in rows if "bytes" in row), {})
    show(found)
    write(args, found)
    if args.plot:
        plot(found, args.plot)


if __name__ == "__main__":
    main()
