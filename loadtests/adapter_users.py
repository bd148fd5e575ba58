"""Locust users that ask an OpenAI-compatible server for adapters, and note how cold each of them was.

A locust file subclasses AdapterUser; locustfile.py beside this file is the ready-made one, docs/load-tests.md has
an example. Locust's tables get, besides the HTTP requests, the time to the first token (TTFT) and the mean time
between tokens (ITL) by where the adapter was when its request came: device, host, store or source; or base.
"""

from __future__ import annotations

import itertools
import json
import logging
import math
import random
import shlex
import sys
import time
from argparse import ArgumentTypeError
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import gevent
import locust
import requests
import workload
from locust import FastHttpUser, events
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS
from locust.env import Environment
from locust.exception import StopTest
from locust.runners import WorkerRunner
from records import Objective, Record, summarise
from report import read_series, text_table, write_report
from workload import WorkloadError

SLO_MISSED = 3
UNUSABLE = 2

log = logging.getLogger("loadtests")


# ------------------------------------------------------------------------------------------------- options


def _checked(parse: Callable[[str], Any]) -> Callable[[str], str]:
    """The text itself, once it can be parsed: locust sends options to its workers, and shows them in its pages."""

    def check(text: str) -> str:
        try:
            parse(text)
        except ValueError as error:
            raise ArgumentTypeError(str(error)) from error
        return text

    return check


def parse_swap(text: str) -> tuple[str, list[str]]:
    """An adapter's name and the directories it is published from in turn.

    Raises:
        WorkloadError: unless it is NAME=PATH1,PATH2.
    """
    name, _, rest = text.partition("=")
    paths = [path for path in rest.split(",") if path]
    if not name or len(paths) < 2:
        raise WorkloadError(f"{text!r} is not of the form NAME=PATH1,PATH2")
    return name, paths


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise WorkloadError(f"{text} is no JSON object")
    return found


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    """Add our options to locust's; a limit or share of 0 is none."""
    add = parser.add_argument
    add(
        "--api-key", metavar="KEY", env_var="OPENAI_API_KEY", default="", is_secret=True,
        help="the client's key; better in the variable, which others on the machine cannot see",
    )  # fmt: skip
    add(
        "--admin-key", metavar="KEY", env_var="QAA_SERVE_ADMIN_KEY", default="", is_secret=True,
        help="key of qaa-serve's admin API: it tells kinds and tiers of adapters, and is needed for --swap",
    )  # fmt: skip
    add("--admin-host", metavar="URL", default="", help="where the admin API is, if not at --host")
    add(
        "--models", metavar="PATTERNS", default="*",
        help="adapters of GET /v1/models to ask for, as patterns with commas between: 'support-*,json' (all)",
    )  # fmt: skip
    add("--base-share", type=float, default=0.0, help="share of the requests that go to the base model (0)")
    add(
        "--popularity", metavar="FORM", type=_checked(workload.parse_popularity), default="uniform",
        help=f"how the others are shared among the adapters: {workload.POPULARITY_FORMS} (uniform)",
    )  # fmt: skip
    add(
        "--cold-share", metavar="SHARES", type=_checked(workload.parse_shares), default="",
        help="share of the adapters' requests that go to the one asked for the longest ago, several in turn: "
        "'0,0.25,1'. They are cold if the server cannot hold all in memory. The rest goes to --hot adapters",
    )  # fmt: skip
    add("--turn", metavar="SECONDS", type=float, default=10.0, help="how long each share lasts (10)")
    add("--hot", metavar="N", type=int, default=4, help="adapters that --cold-share keeps warm (4)")
    for name, what in (("--prompt-tokens", "length of prompts"), ("--output-tokens", "max_tokens of answers")):
        add(
            name, metavar="FORM", type=_checked(workload.parse_lengths), default="lognormal:64,0.5",
            help=f"{what}: {workload.LENGTH_FORMS} (lognormal:64,0.5)",
        )  # fmt: skip
    add(
        "--tokenizer", metavar="PATH", default="",
        help="the model's directory or its tokenizer.json: prompts are then exactly as long, and tokens are "
        "counted where the server does not; else four tokens are taken for three words",
    )  # fmt: skip
    add(
        "--extra-body", metavar="JSON", type=_checked(_object), default="{}",
        help="further fields of every body; '{\"ignore_eos\": true}' makes vLLM's answers as long as they may be",
    )  # fmt: skip
    add("--seed", metavar="N", type=int, default=0, help="decides everything that is drawn (0)")
    add("--warm-up", metavar="SECONDS", type=float, default=0.0, help="load that is left out of all figures (0)")
    add(
        "--swap", metavar="NAME=PATH1,PATH2", type=_checked(parse_swap), action="append", default=[],
        include_in_web_ui=False,
        help="publish adapter NAME from these directories of the server's source in turn; may be repeated",
    )  # fmt: skip
    add("--swap-every", metavar="SECONDS", type=float, default=10.0, help="time between two swaps (10)")
    add("--slo-ttft-ms", metavar="MS", type=float, default=0.0, help="longest time to the first token")
    add("--slo-itl-ms", metavar="MS", type=float, default=0.0, help="longest mean time between a request's tokens")
    add("--slo-seconds", metavar="SECONDS", type=float, default=0.0, help="longest time to the complete answer")
    add(
        "--slo-share", metavar="SHARE", type=float, default=0.99,
        help=f"share of the requests that must meet every --slo limit, or the exit status is {SLO_MISSED} (0.99)",
    )  # fmt: skip
    add(
        "--report", metavar="DIR", default="", include_in_web_ui=False,
        help="write report.md, plots, summary.json and records.jsonl (a line for each request) there",
    )  # fmt: skip


def objective_of(options: Any) -> Objective | None:
    """The SLO on the command line; None if there is none."""
    limits = (options.slo_ttft_ms / 1000, options.slo_itl_ms / 1000, options.slo_seconds)
    return Objective(*(limit or math.inf for limit in limits), options.slo_share) if any(limits) else None


# --------------------------------------------------------------------------------------------------- a test


def bearer(key: str) -> dict[str, str]:
    """The header for a key; none without."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def tier_of(adapter: dict[str, Any], model: str) -> str:
    """Where a NAME or NAME@REVISION is, from what GET /v1/adapters/NAME says."""
    if adapter.get("state") == "known":
        return "source"
    told = adapter
    if "@" in model:
        told = next((one for one in adapter.get("revisions", ()) if one["revision"] == model), {})
    sizes = told.get("bytes")
    if not sizes:
        return "unknown"
    return "device" if sizes["slot"] else "host" if sizes["host"] else "store"


class Load:
    """The test of this process: what is to be asked, and what became of it.

    In a distributed test each worker has one and sends its records; the master's gathers them.
    """

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.options: Any = environment.parsed_options
        self.host = (environment.host or "").rstrip("/")
        self.admin_host = self.options.admin_host.rstrip("/") or self.host
        self.leads = not isinstance(environment.runner, WorkerRunner)
        self.began, self.began_at = time.perf_counter(), time.time()
        self.ended: float | None = None
        self.unusable = ""
        self.records: list[Record] = []
        self.swaps: dict[str, dict[str, int]] = {}
        self.before: dict[str, float] = {}
        self.after: dict[str, float] = {}
        self.background: list[gevent.Greenlet] = []

    @property
    def now(self) -> float:
        """Seconds from the beginning of the test."""
        return time.perf_counter() - self.began

    def prepare(self) -> None:
        """Publish what is to be swapped, ask for the models, and begin to draw.

        Raises:
            WorkloadError: if the server cannot be used with these options.
        """
        options, runner = self.options, self.environment.runner
        self.extra_body = _object(options.extra_body)
        self.lengths = [workload.parse_lengths(text) for text in (options.prompt_tokens, options.output_tokens)]
        self.cold_shares = workload.parse_shares(options.cold_share)
        self.tokenizer = workload.load_tokenizer(options.tokenizer) if options.tokenizer else None
        self.text = workload.exact_english(self.tokenizer) if self.tokenizer else workload.english
        if self.leads:
            for swap in options.swap:
                name, paths = parse_swap(swap)
                published = itertools.cycle(paths)
                if problem := self.publish(name, next(published)):
                    raise WorkloadError(f"--swap {name}: {problem}")
                self.background.append(gevent.spawn(self.swap, name, published))
        self.list_models()
        self.rng = random.Random(f"{options.seed} {max(0, getattr(runner, 'worker_index', 0))}")
        self.models = workload.Models(
            [name for name, kind in self.kinds.items() if kind == "base"],
            [name for name, kind in self.kinds.items() if kind != "base"],
            workload.parse_popularity(options.popularity),
            self.rng,
            base_share=options.base_share,
            hot=options.hot if self.cold_shares else 0,
        )

    def list_models(self) -> None:
        """Ask for the models that fit --models, the bases, what each is, and whether the server tells tiers.

        Raises:
            WorkloadError: if the server lists none.
        """
        try:
            answer = requests.get(f"{self.host}/v1/models", headers=bearer(self.options.api_key), timeout=30)
            answer.raise_for_status()
            parents = {card["id"]: card.get("parent") for card in answer.json()["data"]}
        except (requests.RequestException, ValueError, KeyError, TypeError) as error:
            raise WorkloadError(f"{self.host}/v1/models does not list models: {error}") from error
        told = self.list_kinds()
        self.tells_tiers = told is not None
        patterns = [pattern.strip() for pattern in self.options.models.split(",")]
        self.kinds = {
            name: (told or {}).get(name, "adapter") if parent else "base"
            for name, parent in sorted(parents.items(), key=lambda item: (bool(item[1]), item[0]))
            if not parent or any(fnmatch(name, pattern) for pattern in patterns)
        }
        if set(self.kinds.values()) <= {"base"} and self.options.models != "*":
            raise WorkloadError(f"--models {self.options.models} fits none of: {', '.join(sorted(parents))}")

    def list_kinds(self) -> dict[str, str] | None:
        """Adapter -> qaa or lora; adapter for those that are not checked. None if the server does not tell."""
        try:
            answer = requests.get(f"{self.admin_host}/v1/adapters", headers=self.admin_headers, timeout=60)
            answer.raise_for_status()
        except requests.RequestException as error:
            log.warning("kinds and tiers of adapters are unknown: %s", error)
            return None
        return {adapter["id"]: (adapter.get("kind") or "adapter").lower() for adapter in answer.json()["data"]}

    @property
    def admin_headers(self) -> dict[str, str]:
        """The admin's key, or else the client's."""
        return bearer(self.options.admin_key or self.options.api_key)

    def asked_cold(self) -> float | None:
        """The share of cold requests that is wanted now; None if popularity decides."""
        if not self.cold_shares:
            return None
        number = max(0.0, self.now - self.options.warm_up) // self.options.turn
        return self.cold_shares[int(number) % len(self.cold_shares)]

    def add(self, record: Record) -> None:
        """A request has ended: keep it, and show its times in locust's tables, out of the line Aggregated."""
        self.records.append(record)
        if record.at < self.options.warm_up or not record.answered:
            return
        for name, seconds in (("TTFT", record.first_s), ("ITL", record.inter_token_s)):
            if seconds is not None:
                self.environment.stats.get(record.tier, name).log(round(seconds * 1000), 0)

    # ---- beside the users, in the process that leads

    def publish(self, name: str, path: str) -> str:
        """Publish an adapter from a directory; what went wrong, nothing if it went well."""
        url = f"{self.admin_host}/v1/adapters/{name}"
        with self.environment.events.request.measure("PUT", f"/v1/adapters/{name}") as request:
            answer = requests.put(url, json={"path": path}, headers=self.admin_headers, timeout=300)
            if answer.status_code != 200:
                raise RuntimeError(f"{answer.status_code} {answer.text[:300]}")
        problem = request["exception"]
        self.swaps.setdefault(name, {"done": 0, "failed": 0})["failed" if problem else "done"] += 1
        return str(problem or "")

    def swap(self, name: str, paths: Any) -> None:
        """Publish the next one every --swap-every seconds, for ever."""
        while True:
            gevent.sleep(self.options.swap_every)
            self.publish(name, next(paths))

    def scrape(self) -> dict[str, float]:
        """The server's series; none if it has no /metrics."""
        try:
            answer = requests.get(f"{self.host}/metrics", timeout=60)
            return read_series(answer.text) if answer.status_code == 200 else {}
        except requests.RequestException:
            return {}

    def begin_measuring(self) -> None:
        """When the warm-up is over: locust's tables begin anew, and the server's counters are noted."""
        gevent.sleep(max(0.0, self.options.warm_up - self.now))
        if self.options.warm_up:
            self.environment.stats.reset_all()
        self.before = self.scrape()

    def learn_kinds(self) -> None:
        """Of adapters that nobody had checked before the test."""
        if self.tells_tiers:
            told = self.list_kinds() or {}
            self.kinds |= {name: kind for name, kind in told.items() if self.kinds.get(name) == "adapter"}
            self.records = [r._replace(kind=self.kinds.get(r.model, r.kind)) for r in self.records]

    def summary(self) -> dict[str, Any]:
        """All figures."""
        options, kinds = self.options, list(self.kinds.values())
        ended = self.now if self.ended is None else self.ended
        keys = [key for key in (options.api_key, options.admin_key) if key]
        return {
            "command": shlex.join(["locust", *(without(keys, argument) for argument in sys.argv[1:])]),
            "host": self.host,
            "began_at": self.began_at,
            "locust": locust.__version__,
            "users": options.num_users,
            "models": {kind: kinds.count(kind) for kind in sorted(set(kinds))},
            "swaps": self.swaps,
            "server": {"before": self.before, "after": self.after},
            **summarise(
                self.records, options.warm_up, max(ended, options.warm_up),
                objective=objective_of(options), every=options.turn,
            ),
        }  # fmt: skip


def without(keys: list[str], argument: str) -> str:
    """An argument of the command line that can be shown."""
    key = next((key for key in keys if argument == key or argument.endswith(f"={key}")), "")
    return f"{argument.removesuffix(key)}..." if key else argument


load: Load | None = None  # the test that is running, or ran last, in this process


def current() -> Load:
    """The test that runs."""
    if load is None or load.unusable:
        raise StopTest("no test was prepared" if load is None else load.unusable)
    return load


# --------------------------------------------------------------------------------------------------- users


class BrokenAnswerError(Exception):
    """An answer that is an error, or is not complete; the message is counted in locust's table of failures."""


class AdapterUser(FastHttpUser):
    """What a user has: `chat` and `complete`, whose arguments are drawn as the options say unless they are given.

    Subclasses have tasks, and may have another wait_time (none: a request follows an answer) and weight, and
    other ways to draw.
    """

    abstract = True
    network_timeout = connection_timeout = 300.0
    stream = True

    def __init__(self, environment: Environment) -> None:
        current()
        super().__init__(environment)
        self.admin = requests.Session()

    def draw_model(self) -> str:
        """The model of the next request."""
        return current().models.next(current().asked_cold())

    def draw_prompt(self) -> str:
        """Its prompt."""
        return current().text(current().rng, current().lengths[0].draw(current().rng))

    def draw_max_tokens(self) -> int:
        """The most tokens of its answer."""
        return current().lengths[1].draw(current().rng)

    def chat(
        self, model: str | None = None, prompt: str | None = None, max_tokens: int | None = None, **fields: Any
    ) -> Record:
        """One chat completion; ``fields`` are added to its body."""
        messages = [{"role": "user", "content": self.draw_prompt() if prompt is None else prompt}]
        return self.ask("/v1/chat/completions", model, max_tokens, {"messages": messages, **fields})

    def complete(
        self, model: str | None = None, prompt: str | None = None, max_tokens: int | None = None, **fields: Any
    ) -> Record:
        """One completion; ``fields`` are added to its body."""
        text = self.draw_prompt() if prompt is None else prompt
        return self.ask("/v1/completions", model, max_tokens, {"prompt": text, **fields})

    def ask(self, path: str, model: str | None, max_tokens: int | None, fields: dict[str, Any]) -> Record:
        """Send a request, read its answer to the end, and keep a record of it.

        Status 429 is no failure: the user waits as long as the server asks (at most 10 s).
        """
        test = current()
        model = self.draw_model() if model is None else model
        body = {"model": model, "max_tokens": self.draw_max_tokens() if max_tokens is None else max_tokens}
        if self.stream:
            body |= {"stream": True, "stream_options": {"include_usage": True}}
        kind, asked_cold, wait = test.kinds.get(model.partition("@")[0], "unknown"), test.asked_cold(), 0.0
        tier = self.look_for(model, kind)
        outcome, problem, answer = "unfinished", "", Answer()
        began, at = time.perf_counter(), test.now
        try:
            with self.client.post(
                path,
                json=body | test.extra_body | fields,
                stream=self.stream,
                catch_response=True,
                headers=bearer(test.options.api_key) | {"Accept-Encoding": "identity"},
            ) as response:
                try:
                    if response.status_code == 429:
                        outcome, wait = "refused", _retry_after(response)
                        response.request_meta["name"] += " (429)"
                    elif response.status_code != 200:
                        raise BrokenAnswerError(_problem_of(response))
                    else:
                        answer.read(response, self.stream, began)
                        outcome = "answered"
                    response.success()
                except (BrokenAnswerError, *FAILURE_EXCEPTIONS) as error:
                    outcome, problem = "failed", (str(error) or type(error).__name__)[:300]
                    wait = 0.5 if response.status_code == 0 else 0.0
                    response.failure(problem)
                finally:
                    seconds = time.perf_counter() - began
                    response.request_meta["response_time"] = seconds * 1000
        finally:
            record = Record(
                at, model, kind, tier, asked_cold, outcome, problem, time.perf_counter() - began,
                answer.first, *answer.gaps(test.tokenizer),
            )  # fmt: skip
            test.add(record)
        gevent.sleep(wait)
        return record

    def look_for(self, model: str, kind: str) -> str:
        """The tier that a model is in now. What the server says of slots is some seconds old."""
        test = current()
        if kind == "base" or not test.tells_tiers:
            return "base" if kind == "base" else "unknown"
        try:
            url = f"{test.admin_host}/v1/adapters/{model.partition('@')[0]}"
            answer = self.admin.get(url, headers=test.admin_headers, timeout=60)
            return tier_of(answer.json(), model) if answer.status_code == 200 else "unknown"
        except (requests.RequestException, ValueError):
            return "unknown"


class Answer:
    """What came of an answer, in seconds from the request's beginning."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.text, self.choices = "", 0
        self.usage: dict[str, int] = {}

    @property
    def first(self) -> float | None:
        """When the first text came; None if it was not streamed."""
        return self.times[0] if self.times else None

    def gaps(self, tokenizer: Any) -> tuple[float | None, float | None, int, int]:
        """Mean time between tokens, the longest between chunks, tokens of the prompt and of the answer."""
        tokens = self.usage.get("completion_tokens") or (
            len(tokenizer.encode(self.text, add_special_tokens=False).ids) if tokenizer else len(self.times)
        )
        mean = (self.times[-1] - self.times[0]) / (tokens - 1) if len(self.times) > 1 and tokens > 1 else None
        longest = max((b - a for a, b in itertools.pairwise(self.times)), default=None)
        return mean, longest, self.usage.get("prompt_tokens") or 0, tokens

    def read(self, response: Any, stream: bool, began: float) -> None:
        """Take in an answer to its end.

        Raises:
            BrokenAnswerError: for an error, or an end before [DONE].
        """
        if not stream:
            self.take(response.text)
            if not self.choices:
                raise BrokenAnswerError(f"the answer has no choices: {response.text[:200]}")
            return
        done = False
        while line := response.stream.readline(b"\n"):
            if not line.startswith(b"data:"):
                continue
            now, payload = time.perf_counter() - began, line[5:].strip()
            if payload == b"[DONE]":
                done = True
            elif self.take(payload):
                self.times.append(now)
        if not done:
            raise BrokenAnswerError("the stream ended without [DONE]")

    def take(self, payload: str | bytes) -> bool:
        """Take in an answer or a chunk of one; whether it brings something generated."""
        try:
            chunk = json.loads(payload)
        except (ValueError, TypeError) as error:
            raise BrokenAnswerError(f"the answer is not JSON: {error}") from error
        if problem := chunk.get("error"):
            message = problem.get("message") if isinstance(problem, dict) else problem
            raise BrokenAnswerError(f"error in the answer: {message}")
        self.usage = chunk.get("usage") or self.usage
        brings = False
        for choice in chunk.get("choices") or ():
            self.choices += 1
            part = choice.get("delta") or choice.get("message") or choice
            for key in ("content", "text", "reasoning", "reasoning_content", "tool_calls"):
                if part.get(key):
                    brings, self.text = True, self.text + str(part[key])
        return brings


def _retry_after(response: Any) -> float:
    try:
        return min(max(float(response.headers.get("retry-after", 1)), 0.1), 10.0)
    except (TypeError, ValueError):
        return 1.0


def _problem_of(response: Any) -> str:
    if response.status_code == 0:
        return str(response.error) or type(response.error).__name__
    try:
        error = json.loads(response.text)["error"]
        return f"{response.status_code} {error['message'] if isinstance(error, dict) else error}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {(response.text or '')[:200]}"


# --------------------------------------------------------------------------------------------------- events


@events.test_start.add_listener
def start(environment: Environment, **_: Any) -> None:
    """Prepare a test; if that cannot be done, the first user stops it."""
    global load
    load = Load(environment)
    try:
        load.prepare()
    except WorkloadError as error:
        load.unusable = str(error)
        environment.process_exit_code = UNUSABLE
        return
    load.began, load.began_at = time.perf_counter(), time.time()
    if load.leads:
        load.background.append(gevent.spawn(load.begin_measuring))


@events.test_stopping.add_listener
def stopping(**_: Any) -> None:
    """No further request is sent: rates are measured until now."""
    if load is not None:
        load.ended = load.now
        gevent.killall(load.background)


@events.test_stop.add_listener
def stopped(**_: Any) -> None:
    """The last requests have ended."""
    if load is not None and load.leads and not load.unusable:
        load.after = load.scrape()
        load.learn_kinds()


@events.report_to_master.add_listener
def report(data: dict[str, Any], **_: Any) -> None:
    """In a worker: send the new records."""
    if load is not None:
        data["records"], load.records = [list(record) for record in load.records], []


@events.worker_report.add_listener
def receive(data: dict[str, Any], **_: Any) -> None:
    """In the master: add what a worker has sent."""
    if load is not None:
        load.records += [Record(*values) for values in data.get("records", ())]


@events.quitting.add_listener
def conclude(environment: Environment, **_: Any) -> None:
    """Write the report; a missed SLO decides the exit status."""
    if load is None or not load.leads or load.unusable:
        return
    summary = load.summary()
    if load.options.report:
        write_report(Path(load.options.report), summary, load.records)
    if summary["slo"] and not summary["slo"]["met"]:
        environment.process_exit_code = SLO_MISSED


@events.quit.add_listener
def say(**_: Any) -> None:
    """Print the essence below locust's tables."""
    if load is None or not load.leads:
        return
    if load.unusable:
        print(f"\nThe test could not be run: {load.unusable}", file=sys.stderr)
    else:
        print("\n" + "\n".join(text_table(load.summary())))
