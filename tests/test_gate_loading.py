"""What a client is told of an adapter that cannot be loaded now, or that it has not named clearly."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path
from typing import Any

import catalogue_support
import httpx
import pytest
from prometheus_client import CollectorRegistry
from registry_support import FakeEngine

from qaa_serve.registry import Catalogue, Revision
from qaa_serve.server.bodies import Bodies
from qaa_serve.server.drain import Drain
from qaa_serve.server.gate import Gate
from qaa_serve.server.keys import KeyRing
from qaa_serve.server.metrics import ServerMetrics
from qaa_serve.server.rights import Rights, WrongKeys
from qaa_serve.server.turns import Turns


def revision(digit: str) -> Revision:
    return Revision("one", "0" * 12 + digit * 52, Path("/nowhere"), "QAA", 4, 10, "base", {})


async def behind(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200})
    await send({"type": "http.response.body", "body": b"{}"})


def make_gate(catalogue: Catalogue) -> Gate:
    buckets = {f"{kind}_buckets": (1.0,) for kind in ("latency", "first_token", "inter_token")}
    return Gate(
        behind,
        rights=Rights(KeyRing((), ()), WrongKeys(lambda role: None, logging.getLogger("test"))),
        bodies=Bodies(max_bytes=1000, max_held_bytes=10_000, timeout_s=5),
        turns=Turns(100, 100, max_wait_s=5),
        catalogue=catalogue,
        metrics=ServerMetrics(CollectorRegistry(), max_adapters=5, max_keys=5, **buckets),
        drain=Drain(),
        base_names=["base"],
        max_upload_bytes=1000,
        has_route=lambda scope: True,
    )


def make_catalogue(**settings: Any) -> tuple[Catalogue, FakeEngine]:
    engine = FakeEngine(reads=False)
    catalogue = catalogue_support.make_catalogue(engine, **settings)
    catalogue_support.add(catalogue, revision("1"), [revision("2")])
    return catalogue, engine


async def ask(gate: Gate, model: str) -> httpx.Response:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(gate), base_url="http://server") as client:
        return await client.post("/v1/chat/completions", json={"model": model})


def test_a_crowd_for_what_is_broken_is_told_when_to_come_back() -> None:
    async def run() -> None:
        catalogue, engine = make_catalogue()
        gate = make_gate(catalogue)
        engine.refuses = lambda revision: True
        answers = await asyncio.gather(*(ask(gate, "one") for _ in range(50)))
        assert {(a.status_code, a.headers["retry-after"]) for a in answers} == {(503, "1")}
        assert "the engine refuses it" in answers[0].json()["error"]["message"]
        assert len(engine.loads) == 1

    asyncio.run(run())


def test_the_pause_grows_and_a_long_load_is_503() -> None:
    async def run() -> None:
        catalogue, engine = make_catalogue(load_timeout_s=0.02)
        gate = make_gate(catalogue)
        engine.hang(revision("1"))
        told = []
        for _ in range(3):
            answer = await ask(gate, "one")
            told.append((answer.status_code, int(answer.headers["retry-after"])))
            assert "not loaded it within 0.02 s" in json.loads(answer.content)["error"]["message"]
            failure = catalogue.cache.failures._failures[revision("1")]
            catalogue.cache.failures.note(revision("1"), failure.error)
        assert told == [(503, 1), (503, 2), (503, 4)]
        engine.gates[revision("1")].set()

    asyncio.run(run())


@pytest.mark.parametrize(("digits", "status"), [("0" * 12, 404), (f"{'0' * 12}1", 200), (f"{'0' * 12}3", 404)])
def test_digits_that_may_be_two_revisions_are_refused_with_both(digits: str, status: int) -> None:
    async def run() -> None:
        catalogue, _ = make_catalogue()
        answer = await ask(make_gate(catalogue), f"one@{digits}")
        assert answer.status_code == status
        both = all(revision(digit).engine_name in answer.text for digit in "12")
        assert both == (digits == "0" * 12)

    asyncio.run(run())
