"""Thousands of odd requests to a server on this machine, in search of one that harms it.

    python loadtests/fuzz.py --url http://127.0.0.1:8000 --requests 2000 --seed 7

Every client route gets bodies that are drawn field by field from fuzz_tables.py: sensible values, extreme ones,
contradictions and wrong types, for the base model, every adapter, single revisions and models that do not exist.
Some clients leave in the middle of a stream or of their own body. Meanwhile and afterwards:

  - every request ends in time, and with JSON, or a stream with the event that ends streams of its kind;
  - no status is 5xx, in a stream neither, but for vLLM's own answers that KNOWN lists with their reasons;
  - the server is healthy and ready, and the greedy answers of all models are those from before.

Whatever breaks a rule is printed with a curl command that repeats it; the exit status is 1 then, and 2 if the
server cannot be tested at all. Request number i is a function of the seed and i: `--first i --requests 1` sends it
again. A server that dies is more often ended by two requests that meet: those under way are printed too.
"""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import json
import os
import random
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx
from fuzz_tables import HEADERS, JUNK, KNOWN, ROUTES, Route

#: What is asked of every model before, meanwhile and after.
GREEDY = {"prompt": "t4 t5 t6 t7 Hello", "max_tokens": 12, "temperature": 0, "ignore_eos": True}


@dataclass
class Sent:
    """A request: what is sent, and where its client leaves, if it does.

    Attributes:
        number: in the run.
        route: where it goes to.
        body: as it is sent.
        headers: besides those that say what the body is, and the key.
        leaves: "" or "body", "answer", "stream": in the middle of which the client closes the connection.
        after: how much of it is let pass: part of the body, seconds, or chunks of the stream.
    """

    number: int
    route: Route
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)
    leaves: str = ""
    after: float = 0.0

    def curl(self, url: str) -> str:
        """A command that sends it."""
        body = shlex.quote(self.body.decode())
        headers = {"Content-Type": "application/json", **self.headers}
        options = " ".join(f"-H {shlex.quote(f'{name}: {value}')}" for name, value in headers.items())
        return f"curl -sS {url}{self.route.path} {options} --data-raw {body}"


def draw(number: int, seed: int, models: Sequence[str]) -> Sent:
    """Request `number` of a run."""
    rng = random.Random(f"{seed}:{number}")
    route = rng.choices(ROUTES, [route.share for route in ROUTES])[0]
    odd = rng.random() < 0.25
    chosen = rng.sample(sorted(route.others), min(len(route.others), rng.choice([0, 1, 1, 2, 2, 3, 5, 8])))
    body: dict[str, Any] = {"model": rng.choice(models)}
    for name, values in [*route.needed.items(), *((name, route.others[name]) for name in chosen)]:
        body[name] = rng.choice(values if odd or rng.random() < 0.05 else values[: (len(values) + 1) // 2])
    if route.ends and rng.random() < 0.4:
        body["stream"] = True
    if rng.random() < 0.06:
        body[rng.choice([*body])] = rng.choice(JUNK)
    text = json.dumps(body)
    if rng.random() < 0.03:
        text = rng.choice([text[: len(text) // 2], "", "[]", "null", '"x"', "[" * 20_000, text + text])
    sent = Sent(number, route, text.encode(), rng.choice(HEADERS) if rng.random() < 0.08 else {})
    if rng.random() < 0.12:
        sent.leaves = rng.choice(["body", "answer", "stream"])
        sent.after = {
            "body": rng.random(),
            "answer": rng.choice([0, 0.01, 0.1, 0.4]),
            "stream": rng.choice([1, 2, 5]),
        }[sent.leaves]
    return sent


@dataclass
class Run:
    """What is sent, to whom, and what has come back."""

    url: str
    client: httpx.AsyncClient
    headers: dict[str, str]
    limit_s: float
    served: set[str] = field(default_factory=set)
    under_way: dict[int, Sent] = field(default_factory=dict)
    statuses: dict[str, Counter[str]] = field(default_factory=dict)
    seconds: list[tuple[float, int]] = field(default_factory=list)
    excused: Counter[str] = field(default_factory=Counter)
    findings: list[str] = field(default_factory=list)
    gone: bool = False

    async def send(self, sent: Sent) -> None:
        """Send a request and judge what comes back."""
        self.under_way[sent.number] = sent
        begun = time.monotonic()
        try:
            status = await asyncio.wait_for(self._exchange(sent), self.limit_s)
        except TimeoutError:
            status = "none"
            self.found(sent, f"no end after {self.limit_s:g} s")
        except (httpx.TransportError, OSError) as error:
            status = "none"
            self.found(sent, f"the connection broke: {error!r}")
            self.gone |= isinstance(error, (httpx.ConnectError, ConnectionRefusedError))
        finally:
            del self.under_way[sent.number]
        self.seconds.append((time.monotonic() - begun, sent.number))
        self.statuses.setdefault(sent.route.path, Counter())[status] += 1

    async def _exchange(self, sent: Sent) -> str:
        if sent.leaves == "body":
            await self._half_a_body(sent)
            return "left"
        headers = {**self.headers, "Content-Type": "application/json", **sent.headers}
        if sent.leaves == "answer":
            with suppress(TimeoutError):
                async with asyncio.timeout(sent.after):
                    await self.client.post(sent.route.path, content=sent.body, headers=headers)
            return "left"
        chunks: list[bytes] = []
        async with self.client.stream("POST", sent.route.path, content=sent.body, headers=headers) as response:
            async for chunk in response.aiter_bytes():
                chunks.append(chunk)
                if sent.leaves == "stream" and len(chunks) >= sent.after:
                    return "left"
        self._judge(sent, response, b"".join(chunks).decode(errors="replace"))
        return str(response.status_code)

    async def _half_a_body(self, sent: Sent) -> None:
        where = urlsplit(self.url)
        _, writer = await asyncio.open_connection(where.hostname, where.port)
        with suppress(ConnectionError):
            head = [f"POST {sent.route.path} HTTP/1.1", f"Host: {where.netloc}", "Content-Type: application/json"]
            head += [f"{name}: {value}" for name, value in self.headers.items()]
            head += [f"Content-Length: {len(sent.body) + 1}", "", ""]
            writer.write("\r\n".join(head).encode() + sent.body[: int(len(sent.body) * sent.after)])
            await writer.drain()
            await asyncio.sleep(0.02)
        writer.close()

    def _judge(self, sent: Sent, response: httpx.Response, text: str) -> None:
        status = response.status_code
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            events = [line for line in text.splitlines() if line]
            if not sent.route.ends or not any(line.startswith(sent.route.ends) for line in events[-2:]):
                self.found(sent, f"the stream does not end as it should: {events[-2:]}")
            for code, message in filter(None, map(_error_in, events)):
                if code >= 500:
                    self.found(sent, f"status {code} in a stream: {message}")
            return
        try:
            body = json.loads(text) if text else None
        except ValueError:
            self.found(sent, f"status {status} with a body that is no JSON: {text[:200]!r}")
            return
        if status >= 500:
            self.found(sent, f"status {status}: {json.dumps(body)}")
        if status == 404 and "does not exist" in text and self._exists(sent):
            self.found(sent, f"a model that is served does not exist: {text}")

    def _exists(self, sent: Sent) -> bool:
        """Whether a request's model is served; odd headers may name another."""
        if sent.headers:
            return False
        with suppress(ValueError, RecursionError, AttributeError, TypeError):
            return json.loads(sent.body).get("model") in self.served
        return False

    def found(self, sent: Sent | None, what: str) -> None:
        """Keep a finding, and print it, unless it is known."""
        lines = [f"FINDING  {what[:500]}"]
        if sent is not None:
            asked = f"{sent.route.path} {sent.body.decode()}"
            for known in KNOWN:
                if known.what in what and all(words in asked for words in known.asked):
                    self.excused[known.reason] += 1
                    return
            command = sent.curl(self.url)
            if len(command) > 2000:
                command = f"{command[:2000]} ... (in full: --first {sent.number} --requests 1)"
            left = ", whose client left" if sent.leaves else ""
            lines.append(f"  request {sent.number}{left}: {command}")
            if beside := sorted(set(self.under_way) - {sent.number}):
                lines.append(f"  under way beside it: {', '.join(map(str, beside))}")
        self.findings.append("\n".join(lines))
        print(self.findings[-1], flush=True)

    async def greedy(self, models: Iterable[str]) -> dict[str, Any]:
        """What each model says to GREEDY; None where it does not answer."""
        answers: dict[str, Any] = {}
        for model in models:
            try:
                response = await self.client.post(
                    "/v1/completions", json={**GREEDY, "model": model}, headers=self.headers, timeout=self.limit_s
                )
                answers[model] = response.json()["choices"][0]["text"]
            except (httpx.TransportError, ValueError, KeyError):
                answers[model] = None
        return answers

    async def check(self, expected: Mapping[str, Any], when: str) -> None:
        """Compare the models' greedy answers with those from before."""
        for model, answer in (await self.greedy(expected)).items():
            if answer != expected[model]:
                self.found(None, f"{when}, {model} says {answer!r}, and said {expected[model]!r} before")

    async def check_health(self) -> None:
        """The server is up, and its engine."""
        for path in ("/health", "/ready"):
            try:
                status: Any = (await self.client.get(path, timeout=self.limit_s)).status_code
            except httpx.TransportError as error:
                status = repr(error)
            if status != 200:
                self.found(None, f"{path} says {status}")


def _error_in(event: str) -> tuple[int, str] | None:
    """(status, message) of an event that is an error; None of any other."""
    with suppress(ValueError, AttributeError):
        error = json.loads(event.removeprefix("data: ")).get("error")
        if error:
            code = error.get("code") if isinstance(error, dict) else None
            return code if isinstance(code, int) else 500, json.dumps(error)
    return None


async def fuzz(
    url: str, numbers: range, seed: int, concurrency: int, key: str, limit_s: float, check_every: int
) -> Run:
    """Send requests and return what came of it.

    Raises:
        SystemExit: with 2 if the server does not serve.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    # A connection for each: one that is kept may be closed by the server just when it is used again.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=limits, trust_env=False) as client:
        run = Run(url, client, headers, limit_s)
        try:
            cards = (await client.get("/v1/models", headers=headers, timeout=limit_s)).json()["data"]
        except (httpx.TransportError, ValueError, KeyError) as error:
            print(
                f"{url}/v1/models does not answer: {error!r}. Is the server up, and --key right?", file=sys.stderr
            )
            raise SystemExit(2) from error
        names = [card["id"] for card in cards]
        revisions = [card["root"] for card in cards if card.get("parent")]
        expected = await run.greedy([*names, *revisions])
        run.served = set(expected)
        models = [*names * 3, *revisions, "nobody", f"{names[-1]}@{'0' * 12}"]
        queue = iter(numbers)
        begun = time.monotonic()

        async def work() -> None:
            for number in queue:
                if run.gone:
                    return
                await run.send(draw(number, seed, models))
                done = number - numbers.start + 1
                if check_every and done % check_every == 0:
                    name = names[done // check_every % len(names)]
                    await run.check({name: expected[name]}, f"after {number}")
                if done % 200 == 0:
                    print(
                        f"{done} of {len(numbers)} in {time.monotonic() - begun:.0f} s",
                        file=sys.stderr,
                        flush=True,
                    )

        await asyncio.gather(*(work() for _ in range(concurrency)))
        if run.gone:
            run.found(None, "the server is gone")
        else:
            await run.check_health()
            await run.check(expected, "afterwards")
        return run


def summary(run: Run) -> str:
    """Statuses by route, what was excused, and how many findings there are."""
    lines = ["", f"{'route':<30} statuses"]
    for path, statuses in sorted(run.statuses.items()):
        lines.append(
            f"{path:<30} " + ", ".join(f"{count} x {status}" for status, count in sorted(statuses.items()))
        )
    slowest = ", ".join(f"{number} ({seconds:.1f} s)" for seconds, number in sorted(run.seconds, reverse=True)[:5])
    lines.append(f"slowest: {slowest}")
    lines += [f"{count} x known: {reason}" for reason, count in run.excused.items()]
    return "\n".join([*lines, f"{len(run.findings)} findings"])


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    with suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--url", default="http://127.0.0.1:8000", help="of the server, on this machine (%(default)s)")
    add("--requests", type=int, default=1000, help="how many (%(default)s)")
    add("--first", type=int, default=0, metavar="I", help="number of the first one (%(default)s)")
    add("--seed", type=int, default=0, help="what the requests are drawn from (%(default)s)")
    add("--concurrency", type=int, default=12, help="how many at once (%(default)s)")
    add("--key", default=os.environ.get("OPENAI_API_KEY", ""), help="a client's key (OPENAI_API_KEY)")
    add("--limit", type=float, default=60, metavar="S", help="seconds until a request hangs (%(default)s)")
    add(
        "--check-every", type=int, default=0, metavar="N",
        help="ask for a greedy answer after every N requests too (never). In 16-bit numbers a server may round "
        "otherwise among other requests: this is for servers in float32",
    )  # fmt: skip
    args = parser.parse_args(arguments)
    if not _is_loopback(args.url):
        parser.error(f"--url {args.url}: this program tries to break servers, so it talks to this machine alone")
    numbers = range(args.first, args.first + args.requests)
    run = asyncio.run(fuzz(args.url, numbers, args.seed, args.concurrency, args.key, args.limit, args.check_every))
    print(summary(run))
    return 1 if run.findings else 0


if __name__ == "__main__":
    sys.exit(main())
