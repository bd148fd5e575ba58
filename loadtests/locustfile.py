"""Load for any OpenAI-compatible server: `locust -f loadtests/locustfile.py --host http://127.0.0.1:8000 -u 8`.

`python loadtests/locustfile.py` prints the options that are added here; `locust --help` knows its own only.

Besides the HTTP requests, locust's tables, CSV and HTML get statistics of each model class, named by their type:
TTFT, inter-token and end-to-end in milliseconds, and tokens/s (of each request, not milliseconds). They are left
out of the line "Aggregated", which counts HTTP requests. README.md beside this file tells how to read them.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
import time
from argparse import ArgumentTypeError
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from itertools import cycle
from typing import Any

import gevent
import locust
import locust.stats
import requests
import workload
from gevent.pool import Pool
from locust import FastHttpUser, LoadTestShape, events, task
from locust.argument_parser import get_parser
from locust.contrib.fasthttp import FAILURE_EXCEPTIONS
from locust.env import Environment
from locust.exception import StopTest
from locust.runners import MasterRunner, WorkerRunner
from workload import Histogram, Objective, Request, Tally, Timing, WorkloadError

TYPES = ("TTFT", "inter-token", "end-to-end", "tokens/s")
#: A request that is sent so much later than it was due counts as late, in seconds.
LATE = 0.1
SLO_MISSED = 3
UNUSABLE = 2

log = logging.getLogger("loadtests")
locust.stats.STATS_TYPE_WIDTH = max(map(len, TYPES))


# ------------------------------------------------------------------------------------------------- options


def _checked(parse: Callable[[str], Any]) -> Callable[[str], str]:
    """The text itself, once it can be parsed: locust sends options to its workers, and shows them in its pages."""

    def check(text: str) -> str:
        try:
            parse(text)
        except WorkloadError as error:
            raise ArgumentTypeError(str(error)) from error
        return text

    return check


def _share(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise ArgumentTypeError(f"{text} is not from 0 to 1")
    return float(text)


def _above_zero(text: str) -> float:
    if not float(text) > 0:
        raise ArgumentTypeError(f"{text} is not more than 0")
    return float(text)


def _count(text: str) -> int:
    return int(_above_zero(text))


def _object(text: str) -> str:
    if not isinstance(json.loads(text), dict):
        raise ArgumentTypeError(f"{text} is no JSON object")
    return text


def parse_swap(text: str) -> tuple[str, list[str]]:
    """An adapter's name and the directories it is published from in turn.

    Raises:
        WorkloadError: unless it is NAME=PATH1,PATH2.
    """
    name, found, rest = text.partition("=")
    paths = [path for path in rest.split(",") if path]
    if not name or not found or len(paths) < 2:
        raise WorkloadError(f"{text!r} is not of the form NAME=PATH1,PATH2")
    return name, paths


def _adder(parser: Any, title: str) -> Callable[..., None]:
    """Adds arguments to a group of their own, which locust's parser shows in its web page only if told so."""
    group = parser.add_argument_group(title)

    def add(*names: str, include_in_web_ui: bool = True, is_secret: bool = False, **settings: Any) -> None:
        action = group.add_argument(*names, **settings)
        action.include_in_web_ui, action.is_secret = include_in_web_ui, is_secret
        action.is_required = action.is_multiple = False

    return add


@events.init_command_line_parser.add_listener
def add_options(parser: Any) -> None:
    """Add our options to locust's."""
    add = _adder(parser, "Who asks for what (this locust file)")
    add(
        "--api-key",
        metavar="KEY",
        env_var="OPENAI_API_KEY",
        default="",
        is_secret=True,
        help="the client's key; better in the variable OPENAI_API_KEY, which others on the machine cannot see",
    )
    add(
        "--admin-key",
        metavar="KEY",
        env_var="QAA_SERVE_ADMIN_KEY",
        default="",
        is_secret=True,
        help="key of qaa-serve's admin API, for GET /v1/adapters and --swap (variable QAA_SERVE_ADMIN_KEY); "
        "without it every model with a parent is taken for an adapter of unknown kind",
    )
    add(
        "--endpoint",
        choices=("chat", "completions", "mix"),
        default="chat",
        help="/v1/chat/completions, /v1/completions, or half of each (default: chat)",
    )
    add(
        "--stream-share",
        metavar="SHARE",
        type=_share,
        default=1.0,
        help="share of requests that are streamed, 0 to 1; only these have a time to first token (default: 1)",
    )
    add(
        "--models",
        metavar="PATTERNS",
        default="*",
        help="models of GET /v1/models to ask, as patterns with commas between: 'support-*,json' (default: all)",
    )
    add(
        "--popularity",
        metavar="FORM",
        type=_checked(workload.parse_popularity),
        default="uniform",
        help=f"how requests are shared among the models: {workload.POPULARITY_FORMS} (default: uniform); of a "
        "class if there is a --mix, else of all models together. Which model is the most popular is drawn from "
        "--seed",
    )
    add(
        "--mix",
        metavar="SHARES",
        type=_checked(workload.parse_mix),
        default=None,
        help="shares of the classes base, qaa, lora, or adapter where the server does not tell the kind: "
        "base=0.2,qaa=0.6,lora=0.2 (default: by --popularity alone)",
    )
    add(
        "--prompt-tokens",
        metavar="FORM",
        type=_checked(workload.parse_lengths),
        default="lognormal:64,0.5",
        help=f"length of prompts, about, at three words for four tokens: {workload.LENGTH_FORMS} "
        "(default: lognormal:64,0.5). The summary has what the server counted",
    )
    add(
        "--output-tokens",
        metavar="FORM",
        type=_checked(workload.parse_lengths),
        default="lognormal:64,0.5",
        help="max_tokens, in the same forms; answers may end before (default: lognormal:64,0.5)",
    )
    add(
        "--extra-body",
        metavar="JSON",
        type=_object,
        default="{}",
        help="further fields of every request's body; with vLLM '{\"ignore_eos\": true}' makes answers as long as "
        "--output-tokens says",
    )
    add(
        "--request-timeout",
        metavar="SECONDS",
        type=_above_zero,
        default=300.0,
        help="longest silence of the server before a request has failed (default: 300)",
    )
    add("--seed", metavar="N", type=int, default=0, help="decides everything that is drawn (default: 0)")

    add = _adder(parser, "How fast (this locust file)")
    add(
        "--arrivals",
        metavar="FORM",
        type=_checked(workload.parse_arrivals),
        default="closed",
        help=f"{workload.ARRIVAL_FORMS} (default: closed). closed: each of the --users waits for its answer. The "
        "others send RATE requests a second whatever is still running, and --users has no meaning",
    )
    add(
        "--max-open",
        metavar="N",
        type=_count,
        default=1000,
        help="most requests under way at once if arrivals are not closed; more wait, and are counted as late "
        "(default: 1000)",
    )
    add(
        "--ramp",
        metavar="FORM",
        type=_checked(workload.parse_ramp),
        default=None,
        help=f"{workload.RAMP_FORM}: add users every so many seconds until throughput stops growing, the SLO is "
        "missed, or --users (100 if not given) or --run-time is reached, and report the knee: the fewest users "
        "with 95 %% of the best throughput",
    )
    add(
        "--swap",
        metavar="NAME=PATH1,PATH2",
        type=_checked(parse_swap),
        action="append",
        default=[],
        include_in_web_ui=False,
        help="publish adapter NAME from these directories in turn during the load (PUT /v1/adapters/NAME; paths "
        "are the server's, inside its adapters directory); the first before the load begins. May be repeated",
    )
    add(
        "--swap-every",
        metavar="SECONDS",
        type=_above_zero,
        default=10.0,
        help="time between two swaps of a name (default: 10)",
    )

    add = _adder(parser, "What is good enough (this locust file)")
    limit = {"metavar": "MS", "type": _above_zero, "default": None}
    add("--slo-ttft-ms", **limit, help="longest time to the first token, of streams")
    add("--slo-inter-token-ms", **limit, help="longest mean time from token to token of a request, of streams")
    add("--slo-seconds", **limit | {"metavar": "SECONDS"}, help="longest time to the complete answer")
    add(
        "--slo-attainment",
        metavar="SHARE",
        type=_share,
        default=None,
        help="share of the requests that must meet all of these; failed and refused ones do not. If any --slo "
        f"option is given and fewer do, the exit status is {SLO_MISSED} (default: 0.99)",
    )
    add("--summary", metavar="FILE.json", default=None, help="where to write all figures, for loadtests/report.py")


def objective_of(options: Any) -> Objective | None:
    """The SLO on the command line, in seconds; None if there is none."""
    limits = (options.slo_ttft_ms, options.slo_inter_token_ms, options.slo_seconds)
    if all(limit is None for limit in (*limits, options.slo_attainment)):
        return None
    ttft, inter_token = (None if limit is None else limit / 1000 for limit in limits[:2])
    share = 0.99 if options.slo_attainment is None else options.slo_attainment
    return Objective(ttft, inter_token, options.slo_seconds, share)


# ------------------------------------------------------------------------------------------- the server's models


def bearer(key: str) -> dict[str, str]:
    """The header for a key; none without."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def list_models(host: str, options: Any) -> dict[str, list[str]]:
    """Names by class: by GET /v1/adapters if it answers, else `adapter` for those with a parent, and `base`.

    Raises:
        WorkloadError: if the server does not list models, or none fits --models.
    """
    try:
        answer = requests.get(f"{host}/v1/models", headers=bearer(options.api_key), timeout=30)
        answer.raise_for_status()
        cards = answer.json()["data"]
        kinds = list_kinds(host, options)
        names = [(card["id"], "adapter" if card.get("parent") else "base") for card in cards]
    except (requests.RequestException, ValueError, KeyError, TypeError) as error:
        raise WorkloadError(f"{host}/v1/models does not list models: {error}") from error
    patterns = [pattern.strip() for pattern in options.models.split(",")]
    models = defaultdict(list)
    for name, default in sorted(names):
        if any(fnmatch(name, pattern) for pattern in patterns):
            models[kinds.get(name, default)].append(name)
    if not models:
        raise WorkloadError(f"--models {options.models} fits none of: {', '.join(sorted(dict(names)))}")
    return dict(models)


def list_kinds(host: str, options: Any) -> dict[str, str]:
    """Adapter -> qaa or lora, as far as the server tells."""
    try:
        answer = requests.get(
            f"{host}/v1/adapters", headers=bearer(options.admin_key or options.api_key), timeout=30
        )
        if answer.status_code != 200:
            return {}
        return {adapter["id"]: adapter["kind"].lower() for adapter in answer.json()["data"] if adapter.get("kind")}
    except (requests.RequestException, ValueError, KeyError, TypeError, AttributeError):
        return {}


# --------------------------------------------------------------------------------------------------- a test


class Run:
    """One test: what is to be asked, and what became of it.

    In a distributed test each worker has one and reports what it has tallied; the master's adds it all up.
    """

    def __init__(self, environment: Environment) -> None:
        self.environment = environment
        self.options = environment.parsed_options
        self.host = (environment.host or "").rstrip("/")
        self.objective = objective_of(self.options)
        self.began, self.began_at = time.perf_counter(), time.time()
        self.seconds: float | None = None
        self.models: dict[str, list[str]] = {}
        self.unusable: str | None = None
        self.swaps: dict[str, Swap] = {}
        self.ramp: RampShape | None = None
        self.in_flight: list[tuple[float, int]] = []
        self.running = 0
        self.tallies: defaultdict[str, Tally] = defaultdict(Tally)
        self.failures: Counter[str] = Counter()
        self.sent = 0
        self.late = Histogram()

    def prepare(self) -> None:
        """Publish what is to be swapped, ask for the models, and draw the requests.

        Raises:
            WorkloadError: if the server cannot be used with these options.
        """
        options, runner = self.options, self.environment.runner
        if not isinstance(runner, WorkerRunner):
            for name, paths in map(parse_swap, options.swap):
                self.swaps[name] = Swap(self, name, cycle(paths))
                if not self.swaps[name].publish():
                    raise WorkloadError(f"--swap {name}: {self.swaps[name].problem}")
        self.models = list_models(self.host, options)
        index = max(0, getattr(runner, "worker_index", 0))
        self.seed = options.seed + 1_000_003 * index
        self.extra_body = json.loads(options.extra_body)
        self.headers = bearer(options.api_key) | {"Accept-Encoding": "identity"}
        self.requests = workload.requests(
            self.models,
            popularity=workload.parse_popularity(options.popularity),
            prompt_tokens=workload.parse_lengths(options.prompt_tokens),
            output_tokens=workload.parse_lengths(options.output_tokens),
            mix=workload.parse_mix(options.mix) if options.mix else None,
            chat_share={"chat": 1.0, "completions": 0.0, "mix": 0.5}[options.endpoint],
            stream_share=options.stream_share,
            seed=self.seed,
        )

    def watch(self) -> None:
        """Note every second how many requests are under way, for ever."""
        while True:
            self.in_flight.append((round(time.perf_counter() - self.began, 1), self.running))
            gevent.sleep(1)

    def fire(self, request_type: str, model_class: str, value: float) -> None:
        """One value of a statistic of ours: milliseconds, or tokens a second."""
        events.request.fire(
            request_type=request_type,
            name=model_class,
            response_time=value,
            response_length=0,
            exception=None,
            context={},
        )

    def take(self) -> dict[str, Any]:
        """What has been tallied since the last time, for the master."""
        data = {
            "tallies": {name: tally.to_json() for name, tally in self.tallies.items()},
            "failures": dict(self.failures),
            "sent": self.sent,
            "late": self.late.to_json(),
        }
        self.tallies, self.failures = defaultdict(Tally), Counter()
        self.sent, self.late = 0, Histogram()
        return data

    def give(self, data: dict[str, Any]) -> None:
        """Add what a worker has tallied."""
        for name, tally in data["tallies"].items():
            self.tallies[name].merge(Tally.from_json(tally))
        self.failures.update(data["failures"])
        self.sent += data["sent"]
        self.late.merge(Histogram.from_json(data["late"]))

    def slo_met(self) -> bool | None:
        """Whether all requests attained the SLO, or with a ramp, any step; None if there is no SLO."""
        if self.objective is None:
            return None
        if self.ramp is not None:
            return workload.knee(self.ramp.steps, self.objective) is not None
        total = workload.added(self.tallies)
        return self.objective.attained(total.met, total.judged)

    def summary(self) -> dict[str, Any]:
        """All figures."""
        options = vars(self.options)
        keep = (
            "endpoint", "stream_share", "models", "popularity", "mix", "prompt_tokens", "output_tokens",
            "extra_body", "arrivals", "max_open", "ramp", "swap", "swap_every", "seed", "num_users",
            "spawn_rate", "run_time",
        )  # fmt: skip
        seconds = time.perf_counter() - self.began if self.seconds is None else self.seconds
        total = workload.added(self.tallies)
        slo = None
        if self.objective is not None:
            slo = {
                "ttft_ms": self.options.slo_ttft_ms,
                "inter_token_ms": self.options.slo_inter_token_ms,
                "seconds": self.options.slo_seconds,
                "share": self.objective.share,
                "attainment": total.attainment,
                "met": self.slo_met(),
            }
        return {
            "host": self.host,
            "began": self.began_at,
            "seconds": seconds,
            "locust": locust.__version__,
            "options": {name: options.get(name) for name in keep},
            "models": {name: len(models) for name, models in sorted(self.models.items())},
            "classes": {name: tally.summary(seconds) for name, tally in sorted(self.tallies.items())},
            "all": total.summary(seconds),
            "failures": dict(self.failures.most_common()),
            "open": None
            if workload.parse_arrivals(self.options.arrivals).closed
            else {"sent": self.sent, "late": self.late.count, "late_s": self.late.summary()},
            "in_flight": self.in_flight,
            "swaps": {name: swap.summary() for name, swap in self.swaps.items()},
            "ramp": None if self.ramp is None else self.ramp.summary(),
            "slo": slo,
        }


#: The test that is running, or ran last, in this process.
current: Run | None = None


class Swap:
    """An adapter that is published from several directories in turn."""

    def __init__(self, run: Run, name: str, paths: Iterator[str]) -> None:
        self.run, self.name, self.paths = run, name, paths
        self.done, self.problem = 0, ""
        self.failed = 0
        self.seconds = Histogram()

    def publish(self) -> bool:
        """Publish the next one; whether the server took it."""
        options, began = self.run.options, time.perf_counter()
        error: Exception | None = None
        try:
            answer = requests.put(
                f"{self.run.host}/v1/adapters/{self.name}",
                json={"path": next(self.paths)},
                headers=bearer(options.admin_key or options.api_key),
                timeout=options.request_timeout,
            )
            if answer.status_code != 200:
                error = RuntimeError(f"{answer.status_code} {answer.text[:300]}")
        except requests.RequestException as problem:
            error = problem
        took = time.perf_counter() - began
        events.request.fire(
            request_type="PUT",
            name=f"/v1/adapters/{self.name}",
            response_time=took * 1000,
            response_length=0,
            exception=error,
            context={},
        )
        if error is not None:
            self.failed += 1
            self.problem = str(error)
        else:
            self.done += 1
            self.seconds.add(took)
        return error is None

    def go_on(self) -> None:
        """Publish the next one every --swap-every seconds, for ever."""
        while True:
            gevent.sleep(self.run.options.swap_every)
            self.publish()

    def summary(self) -> dict[str, Any]:
        """Counts and seconds."""
        return {
            "done": self.done,
            "failed": self.failed,
            "problem": self.problem,
            "seconds": self.seconds.summary(),
        }


# ------------------------------------------------------------------------------------------------- requests


class BrokenAnswerError(Exception):
    """An answer that is an error, or is not complete; the message is counted in locust's table of failures."""


def ask(user: FastHttpUser, request: Request, due: float | None = None) -> float:
    """Send a request, read its answer to the end, and tally it.

    Args:
        user: whose client is used.
        request: what is asked.
        due: time.perf_counter() when it should have been sent; times count from then. None: now.

    Returns:
        seconds that the server asks to wait before the next request.
    """
    run = current
    began = time.perf_counter()
    due = began if due is None else due
    tally = run.tallies[request.model_class]
    wait = 0.0
    run.running += 1
    try:
        with user.client.post(
            request.path,
            json=request.body(run.extra_body),
            headers=run.headers,
            name=request.path + (" (stream)" if request.stream else ""),
            stream=request.stream,
            catch_response=True,
        ) as response:
            try:
                if response.status_code == 429:
                    wait = _retry_after(response)
                    response.request_meta["name"] += " (429)"
                    run.tallies[request.model_class].refused += 1
                    response.success()
                    return wait
                if response.status_code != 200:
                    raise BrokenAnswerError(_problem_of(response))
                read = read_stream if request.stream else read_whole
                first, last, usage, gaps = read(response, due)
                response.success()
            except (BrokenAnswerError, *FAILURE_EXCEPTIONS) as error:
                wait = 0.5 if response.status_code == 0 else 0.0
                text = str(error) or type(error).__name__
                run.tallies[request.model_class].failed += 1
                run.failures[text[:300]] += 1
                response.failure(text[:300])
                return wait
            finally:
                ended = time.perf_counter()
                response.request_meta["response_time"] = (ended - began) * 1000
    except gevent.GreenletExit:
        run.tallies[request.model_class].unfinished += 1
        raise
    finally:
        run.running -= 1
    tally = run.tallies[request.model_class]
    tokens = usage.get("completion_tokens") or len(gaps) + (first is not None)
    timing = Timing(ended - due, first, last, tokens)
    tally.add_answer(timing, run.objective or Objective())
    tally.prompt_tokens += usage.get("prompt_tokens") or 0
    for gap in gaps:
        tally.inter_token.add(gap)
        run.fire("inter-token", request.model_class, gap * 1000)
    if first is not None:
        run.fire("TTFT", request.model_class, first * 1000)
    run.fire("end-to-end", request.model_class, timing.seconds * 1000)
    run.fire("tokens/s", request.model_class, timing.tokens / timing.seconds)
    return 0.0


def _retry_after(response: Any) -> float:
    """Seconds of a Retry-After header, within reason."""
    try:
        return min(max(float(response.headers.get("retry-after", 1)), 0.1), 10.0)
    except (TypeError, ValueError):
        return 1.0


def _problem_of(response: Any) -> str:
    """Status and the server's message."""
    if response.status_code == 0:
        return str(response.error) or type(response.error).__name__
    try:
        error = json.loads(response.text)["error"]
        return f"{response.status_code} {error['message'] if isinstance(error, dict) else error}"
    except (ValueError, KeyError, TypeError):
        return f"{response.status_code} {(response.text or '')[:200]}"


Answer = tuple[float | None, float | None, dict[str, Any], list[float]]


def read_whole(response: Any, due: float) -> Answer:
    """An answer that comes all at once; only its usage is known."""
    try:
        body = json.loads(response.text)
    except (ValueError, TypeError) as error:
        raise BrokenAnswerError(f"the answer is not JSON: {error}") from error
    if not body.get("choices"):
        raise BrokenAnswerError(f"the answer has no choices: {json.dumps(body.get('error', body))[:200]}")
    return None, None, body.get("usage") or {}, []


def read_stream(response: Any, due: float) -> Answer:
    """Server-sent events: when the first and last text came (seconds from ``due``), usage, seconds between texts.

    Raises:
        BrokenAnswerError: for an error in the stream, or one that ends before [DONE].
    """
    first = last = None
    usage: dict[str, Any] = {}
    gaps: list[float] = []
    done = False
    while line := response.stream.readline(b"\n"):
        if not line.startswith(b"data:"):
            continue
        now = time.perf_counter() - due
        payload = line[5:].strip()
        if payload == b"[DONE]":
            done = True
            continue
        try:
            chunk = json.loads(payload)
        except ValueError as error:
            raise BrokenAnswerError(f"a chunk of the stream is not JSON: {error}") from error
        if error := chunk.get("error"):
            raise BrokenAnswerError(
                f"error in the stream: {error.get('message') if isinstance(error, dict) else error}"
            )
        usage = chunk.get("usage") or usage
        if has_text(chunk):
            if first is None or last is None:
                first = now
            else:
                gaps.append(now - last)
            last = now
    if not done:
        raise BrokenAnswerError("the stream ended without [DONE]")
    return first, last, usage, gaps


def has_text(chunk: dict[str, Any]) -> bool:
    """Whether a chunk brings something generated, rather than a role, an end or the usage."""
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta") or choice
        if any(delta.get(key) for key in ("content", "text", "reasoning", "reasoning_content", "tool_calls")):
            return True
    return False


class ModelUser(FastHttpUser):
    """What closed and open users share."""

    abstract = True

    def __init__(self, environment: Environment) -> None:
        if current is None or current.unusable:
            raise StopTest("no test has been prepared" if current is None else current.unusable)
        type(self).network_timeout = type(self).connection_timeout = current.options.request_timeout
        super().__init__(environment)


class ClosedUser(ModelUser):
    """Sends its next request when the last one has been answered."""

    pause = 0.0

    @task
    def ask_next(self) -> None:
        """One request."""
        self.pause = ask(self, next(current.requests))

    def wait_time(self) -> float:
        """Seconds the server asked for with status 429; nothing otherwise."""
        return self.pause


class OpenUser(ModelUser):
    """One dispatcher that sends requests when they are due, whatever is still running."""

    fixed_count = 1

    def __init__(self, environment: Environment) -> None:
        if current is not None:
            type(self).concurrency = current.options.max_open
        super().__init__(environment)

    def on_start(self) -> None:
        """Take the time: the first request is due now."""
        self.open = Pool(current.options.max_open)
        self.times = workload.parse_arrivals(current.options.arrivals).times(current.seed)
        self.next = next(self.times)
        self.began = time.perf_counter() - self.next

    def wait_time(self) -> float:
        """Seconds until the next request is due."""
        return max(0.0, self.began + self.next - time.perf_counter())

    @task
    def dispatch(self) -> None:
        """Send the request that is due, as soon as fewer than --max-open are under way."""
        due = self.began + self.next
        self.open.spawn(ask, self, next(current.requests), due)
        current.sent += 1
        if (behind := time.perf_counter() - due) > LATE:
            current.late.add(behind)
        self.next = next(self.times)

    def on_stop(self) -> None:
        """Give what is under way --stop-timeout to end."""
        self.open.join(timeout=self.environment.stop_timeout or 0)
        self.open.kill()


class RampShape(LoadTestShape):
    """Adds users until throughput stops growing, the SLO is missed or a limit is reached. Used with --ramp."""

    abstract = True  # locust would use it in any case
    settle = 0.25

    def __init__(self, environment: Environment) -> None:
        super().__init__()
        options = environment.parsed_options
        self.runner = environment.runner
        self.ramp = workload.parse_ramp(options.ramp)
        self.most = options.num_users or 100
        self.limit = options.run_time
        self.objective = objective_of(options)
        self.begin()

    def begin(self) -> None:
        """Start anew."""
        self.users = min(self.most, self.ramp.after(0) if self.ramp.users else 1)
        self.steps: list[workload.Step] = []
        self.stopped: str | None = None
        self.step_began = 0.0
        self.before: tuple[float, int, int, int] | None = None

    def reset_time(self) -> None:
        """Locust calls this when a test begins."""
        super().reset_time()
        self.begin()

    def tick(self) -> tuple[int, float] | None:
        """Users and how many to add a second; None ends the test. Called every second."""
        now = self.get_run_time()
        if self.limit and now >= self.limit:
            self.stopped = "the time was over"
        elif self.before is None:
            if now - self.step_began >= self.settle * self.ramp.seconds:
                self.before = (now, *self._counts())
        elif now - self.step_began >= self.ramp.seconds:
            self._end_step(now)
        return None if self.stopped else (self.users, float(max(1, min(100, self.users))))

    def _counts(self) -> tuple[int, int, int]:
        total = workload.added(current.tallies) if current is not None else Tally()
        return total.answered, total.met, total.judged

    def _end_step(self, now: float) -> None:
        then, *before = self.before
        answered, met, judged = (new - old for new, old in zip(self._counts(), before, strict=True))
        self.steps.append(workload.Step(self.users, answered / (now - then), met / judged if judged else None))
        log.info("ramp: %s", self.steps[-1])
        self.stopped = workload.why_ended(self.steps, self.objective)
        if self.stopped is None and self.users >= self.most:
            self.stopped = f"the most users were reached: {self.most}"
        self.users = min(self.most, self.ramp.after(self.users))
        self.step_began, self.before = now, None

    def summary(self) -> dict[str, Any]:
        """Steps, knee and why it ended."""
        found = workload.knee(self.steps, self.objective)
        return {
            "steps": [vars(step) for step in self.steps],
            "knee": None if found is None else vars(found),
            "ended": self.stopped,
        }


# --------------------------------------------------------------------------------------------------- events


@events.init.add_listener
def choose(environment: Environment, **_: Any) -> None:
    """Closed or open users; the ramp; statistics of ours apart from the HTTP requests."""
    options = environment.parsed_options
    closed = workload.parse_arrivals(options.arrivals).closed
    if options.ramp and not closed:
        log.error(
            "--ramp adds users, which only --arrivals closed has; to find the knee of a rate, raise the rate"
        )
        sys.exit(UNUSABLE)
    environment.user_classes = [ClosedUser if closed else OpenUser]
    if options.ramp and not isinstance(environment.runner, WorkerRunner):
        environment.shape_class = RampShape(environment)
    stats, log_request = environment.stats, environment.stats.log_request

    def log_apart(method: str, name: str, response_time: float, content_length: int) -> None:
        if method in TYPES:
            stats.entries[name, method].log(response_time, content_length)
        else:
            log_request(method, name, response_time, content_length)

    stats.log_request = log_apart


_background: list[gevent.Greenlet] = []


@events.test_start.add_listener
def start(environment: Environment, **_: Any) -> None:
    """Prepare a run; if that cannot be done, the users stop the test."""
    global current
    current = Run(environment)
    if isinstance(environment.shape_class, RampShape):
        current.ramp = environment.shape_class
    try:
        current.prepare()
    except WorkloadError as error:
        current.unusable = str(error)
        environment.process_exit_code = UNUSABLE
        return
    current.began, current.began_at = time.perf_counter(), time.time()
    counts = ", ".join(f"{len(models)} {name}" for name, models in sorted(current.models.items()))
    log.info("models: %s", counts)
    _background.extend(gevent.spawn(swap.go_on) for swap in current.swaps.values())
    if not isinstance(environment.runner, MasterRunner):
        _background.append(gevent.spawn(current.watch))


@events.test_stopping.add_listener
def stopping(**_: Any) -> None:
    """End the swaps while the last requests run."""
    gevent.killall(_background)
    _background.clear()


@events.test_stop.add_listener
def stopped(**_: Any) -> None:
    """Note how long the test took, the last requests included."""
    if current is not None and current.seconds is None:
        current.seconds = time.perf_counter() - current.began


@events.report_to_master.add_listener
def report(data: dict[str, Any], **_: Any) -> None:
    """In a worker: send what has been tallied."""
    if current is not None:
        data["loadtest"] = current.take() | {"unusable": current.unusable}


@events.worker_report.add_listener
def receive(data: dict[str, Any], **_: Any) -> None:
    """In the master: add what a worker has tallied."""
    if current is not None and "loadtest" in data:
        current.give(data["loadtest"])


@events.quitting.add_listener
def conclude(environment: Environment, **_: Any) -> None:
    """Write the summary; a missed SLO decides the exit status."""
    if current is None or isinstance(environment.runner, WorkerRunner):
        return
    if current.options.csv_prefix:  # locust writes these files once a second, and not once more at the end
        gevent.sleep(locust.stats.CSV_STATS_INTERVAL_SEC + 0.2)
    if current.options.summary and not current.unusable:
        path = current.options.summary
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        command = {"command": shlex.join(["locust", *_without_keys(sys.argv[1:])])}
        with open(path, "w", encoding="utf-8") as file:
            json.dump(command | current.summary(), file, indent=1)
            file.write("\n")
    if not current.unusable and current.slo_met() is False:
        environment.process_exit_code = SLO_MISSED


def _without_keys(arguments: list[str]) -> list[str]:
    """A command line that can be shown: no keys, and paths from here."""
    shown = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        name, equals, _ = argument.partition("=")
        if before in ("--api-key", "--admin-key"):
            argument = "..."
        elif equals and name in ("--api-key", "--admin-key"):
            argument = f"{name}=..."
        elif os.path.isabs(argument) and not os.path.relpath(argument).startswith(".."):
            argument = os.path.relpath(argument)
        shown.append(argument)
    return shown


@events.quit.add_listener
def say(**_: Any) -> None:
    """Print the essence below locust's tables."""
    if current is None or isinstance(current.environment.runner, WorkerRunner):
        return
    if current.unusable:
        print(f"\nThe test could not be run: {current.unusable}", file=sys.stderr)
        return
    summary = current.summary()
    print("\nclass       answered  failed  429  TTFT p50/p95 ms  inter-token p50/p95 ms  tokens/s  SLO")
    for name, figures in [*summary["classes"].items(), ("all", summary["all"])]:
        times = [
            "/".join("-" if figures[key][p] is None else f"{figures[key][p] * 1000:.0f}" for p in ("p50", "p95"))
            for key in ("ttft_s", "inter_token_s")
        ]
        share = "-" if summary["slo"] is None or figures["attainment"] is None else f"{figures['attainment']:.1%}"
        print(
            f"{name:10} {figures['answered']:9} {figures['failed']:7} {figures['refused']:4} {times[0]:>16} "
            f"{times[1]:>23} {figures['tokens_per_second'] or 0:9.1f}  {share}"
        )
    if summary["open"] and summary["open"]["late"]:
        print(
            f"{summary['open']['late']} of {summary['open']['sent']} requests were sent more than {LATE} s late: "
            "raise --max-open, or give locust more processors (--processes); times count from when they were due"
        )
    for name, swap in summary["swaps"].items():
        print(f"{name} was swapped {swap['done']} times, {swap['failed']} failed")
    if summary["ramp"]:
        found = summary["ramp"]["knee"]
        where = f"{found['users']} users, {found['requests_per_second']:.2f} requests/s" if found else "none"
        print(f"knee: {where}; the ramp ended because {summary['ramp']['ended']}")
    if summary["slo"]:
        print(
            f"SLO {'met' if summary['slo']['met'] else 'missed'}: wanted {summary['slo']['share']:.1%} of requests"
        )


if __name__ == "__main__":
    text = get_parser().format_help()
    print(text[text.index("Who asks for what") : text.index("Examples:")])
