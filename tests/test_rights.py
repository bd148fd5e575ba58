"""Who may call which route, and what happens to who guesses keys."""

from __future__ import annotations

import asyncio
import logging

import pytest

pytest.importorskip("starlette", reason="the server's packages are not installed")

from starlette.routing import compile_path

from qaa_serve.server import rights as module
from qaa_serve.server.errors import RefusedError
from qaa_serve.server.keys import KeyRing, make_key
from qaa_serve.server.rights import Rights, Role, WrongKeys, address_of, role_of

DEADLINE_S = 60


@pytest.mark.parametrize(
    "path",
    ["/health", "/ready", "/ping", "/version", "/metrics", "/metrics/", "/docs", "/docs/oauth2-redirect", "/redoc",
     "/openapi.json", "/load", "/static/swagger.js"],
)  # fmt: skip
def test_how_the_server_is_is_for_anyone(path):
    assert role_of(path) is Role.ANYONE


@pytest.mark.parametrize(
    "path",
    ["/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/one", "/v1/responses/abc",
     "/v1/responses/abc/cancel", "/v1/embeddings", "/v1", "/v2/embed", "/tokenize", "/detokenize",
     "/invocations", "/score", "/rerank", "/classify", "/pooling", "/cohere/v2/chat",
     "/inference/v1/generate", "/generative_scoring"],
)  # fmt: skip
def test_what_clients_call_is_for_clients(path):
    assert role_of(path) is Role.CLIENT


@pytest.mark.parametrize(
    "path",
    ["/v1/adapters", "/v1/adapters/", "/v1/adapters/one", "/v1/adapters/one/rollback", "/v1/audit",
     "/v1/load_lora_adapter", "/v1/unload_lora_adapter", "/inference/v1/abort_requests", "/pause", "/sleep",
     "/collective_rpc", "/server_info", "/", "", "//v1/adapters", "//v1/models", "v1/models", "/V1/models",
     "/v1adapters", "/v10/models", "/healthx", "/health-too", "/metricsx", "/docsx", "/tokenizers",
     "/tokenizer_info", "/scores", "/x/v1/models", "http://localhost/v1/models", "/v1\\adapters",
     "/%761/models", "/health\n", "/\0v1/adapters"],
)  # fmt: skip
def test_all_else_is_for_admins(path):
    assert role_of(path) is Role.ADMIN


@pytest.mark.parametrize("path", ["/v1//adapters", "/v1/./adapters", "/v1/chat/../adapters", "/v1/Adapters",
                                  "/v1/adapters;x", "/v1/adapters\r", "/v1/load_lora_adapter "])  # fmt: skip
def test_paths_that_count_as_clients_reach_no_admins_route(path):
    assert role_of(path) is Role.CLIENT
    for route in ("/v1/adapters", "/v1/adapters/{name}", "/v1/adapters/{name}/rollback", "/v1/load_lora_adapter"):
        assert compile_path(route)[0].match(path) is None


# --------------------------------------------------------------------------------------------- right and wrong


class Guarded:
    """Rights over a client's key and an admin's, and what became of the wrong ones."""

    def __init__(self, *, clients=("client",), admins=("admin",)):
        self.counted = []
        self.now = 1000.0
        ring = KeyRing([make_key(key, key) for key in clients], [make_key(key, key) for key in admins])
        wrong = WrongKeys(self.counted.append, logging.getLogger("test"), now=lambda: self.now)
        self.wrong = wrong
        self.rights = Rights(ring, wrong)

    async def ask(self, role, address="10.0.0.9", **headers):
        """The key's name, or the refusal."""
        raw = [(name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items()]
        try:
            key = await self.rights.check(role, {"type": "http", "headers": raw, "client": (address, 5)})
        except RefusedError as refusal:
            return refusal
        return None if key is None else key.name


@pytest.fixture
def waits(monkeypatch):
    """Waits of those who are answered later; they pass at once."""
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    monkeypatch.setattr(module.asyncio, "sleep", sleep)
    return waits


def check(test, **options):
    async def main():
        async with asyncio.timeout(DEADLINE_S):
            await test(Guarded(**options))

    asyncio.run(main())


@pytest.mark.parametrize(
    ("headers", "name"),
    [
        ({"authorization": "Bearer client"}, "client"),
        ({"authorization": "bearer  client "}, "client"),
        ({"x_api_key": "client"}, "client"),
        ({"authorization": "Basic xyz", "x_api_key": "client"}, "client"),
        ({"authorization": "Bearer wrong", "x_api_key": "client"}, None),
        ({"authorization": "Bearer wrong"}, None),
        ({"authorization": "Bearer Client"}, None),
        ({"authorization": "client"}, None),
        ({"authorization": "Bearer"}, None),
        ({"authorization": "Bearer "}, None),
        ({"authorization": "Bearer admin"}, None),
        ({"authorization": "Bearer \xe9"}, None),
        ({"x_api_key": ""}, None),
        ({}, None),
    ],
)
def test_a_clients_route_takes_a_clients_key(headers, name, waits):
    async def test(guarded):
        found = await guarded.ask(Role.CLIENT, **headers)
        if name is None:
            assert (found.status, found.headers) == (401, {"WWW-Authenticate": "Bearer"})
            assert "an API key is needed" in found.message
            assert "Authorization: Bearer <key>" in found.message
        else:
            assert found == name

    check(test)


def test_an_admins_route_takes_an_admins_key(waits):
    async def test(guarded):
        assert await guarded.ask(Role.ADMIN, authorization="Bearer admin") == "admin"
        assert await guarded.ask(Role.ADMIN, x_api_key="admin") == "admin"
        refusal = await guarded.ask(Role.ADMIN, authorization="Bearer client")
        assert (refusal.status, guarded.counted) == (403, []), "a right key in the wrong place is no guess"
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer "}):
            refusal = await guarded.ask(Role.ADMIN, **headers)
            assert refusal.status == 401
            assert "an admin key is needed" in refusal.message

    check(test)


def test_without_keys_clients_are_let_in_and_admins_are_not(waits):
    async def test(guarded):
        assert await guarded.ask(Role.CLIENT) is None
        assert await guarded.ask(Role.CLIENT, authorization="Bearer whatever") is None
        assert await guarded.ask(Role.ANYONE) is None
        for headers in ({}, {"authorization": "Bearer "}, {"authorization": "Bearer x"}):
            assert (await guarded.ask(Role.ADMIN, **headers)).status == 401

    check(test, clients=(), admins=())


def test_a_refusal_says_whether_there_was_a_key_and_never_which(waits):
    async def test(guarded):
        assert "this is" not in (await guarded.ask(Role.CLIENT)).message
        refusal = await guarded.ask(Role.CLIENT, authorization="Bearer guess")
        assert "needed, and this is none:" in refusal.message
        assert "guess" not in refusal.message
        assert "this is an admin's" in (await guarded.ask(Role.CLIENT, authorization="Bearer admin")).message

    check(test)


# ----------------------------------------------------------------------------------------------------- guesses


def test_wrong_keys_are_counted_by_role_and_missing_ones_are_not(waits):
    async def test(guarded):
        await guarded.ask(Role.CLIENT, authorization="Bearer wrong")
        await guarded.ask(Role.ADMIN, authorization="Bearer wrong")
        await guarded.ask(Role.ADMIN, x_api_key="wrong")
        for headers in ({}, {"authorization": "Bearer "}, {"authorization": "Basic x"}, {"x_api_key": ""}):
            await guarded.ask(Role.CLIENT, **headers)
        assert guarded.counted == ["client", "admin", "admin"]
        assert len(waits) == 3

    check(test)


def test_who_guesses_waits_longer_with_each_and_others_do_not(waits):
    async def test(guarded):
        for _ in range(12):
            await guarded.ask(Role.CLIENT, authorization="Bearer wrong")
        assert waits == sorted(waits)
        assert waits[1] == 2 * waits[0]
        assert waits[-1] == waits[-2] == module._LONGEST_WAIT_S
        await guarded.ask(Role.CLIENT, address="10.0.0.8", authorization="Bearer wrong")
        assert waits[-1] == waits[0]
        guarded.now += module._FORGET_S + 1
        await guarded.ask(Role.CLIENT, authorization="Bearer wrong")
        assert waits[-1] == waits[0], "it is forgotten after a while"

    check(test)


def test_a_right_key_never_waits_even_where_guesses_come_from(waits):
    async def test(guarded):
        for _ in range(5):
            await guarded.ask(Role.CLIENT, authorization="Bearer wrong")
        waits.clear()
        assert await guarded.ask(Role.CLIENT, authorization="Bearer client") == "client"
        assert await guarded.ask(Role.ADMIN, authorization="Bearer admin") == "admin"
        assert (await guarded.ask(Role.ADMIN, authorization="Bearer client")).status == 403
        assert waits == []

    check(test)


def test_a_wrong_key_is_answered_only_after_its_wait(monkeypatch):
    async def test(guarded):
        answered = asyncio.ensure_future(guarded.ask(Role.CLIENT, authorization="Bearer wrong"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not answered.done()
        answered.cancel()
        await asyncio.gather(answered, return_exceptions=True)
        assert guarded.wrong._waiting == 0

    monkeypatch.setattr(module, "_FIRST_WAIT_S", DEADLINE_S)
    monkeypatch.setattr(module, "_LONGEST_WAIT_S", DEADLINE_S)
    check(test)


def test_the_log_has_one_line_a_minute_and_address_and_no_key(waits, caplog):
    async def test(guarded):
        for _ in range(10):
            await guarded.ask(Role.CLIENT, authorization="Bearer guess")
            await guarded.ask(Role.ADMIN, address="10.0.0.8", authorization="Bearer guess")
            guarded.now += 5
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 2
        assert "client routes from 10.0.0.9 (1 so far)" in lines[0]
        assert "admin routes from 10.0.0.8" in lines[1]
        guarded.now += 10
        await guarded.ask(Role.CLIENT, authorization="Bearer guess")
        assert "(11 so far)" in caplog.records[-1].getMessage()
        assert "guess" not in caplog.text

    check(test)


def test_what_is_remembered_of_guesses_is_bounded(waits, monkeypatch):
    monkeypatch.setattr(module, "_MAX_ADDRESSES", 3)

    async def test(guarded):
        for number in range(10):
            await guarded.ask(Role.CLIENT, address=f"10.0.0.{number}", authorization="Bearer wrong")
            await guarded.ask(Role.CLIENT, address="10.0.1.1", authorization="Bearer wrong")
        assert len(guarded.wrong._by_address) == 3
        assert waits[-1] == module._LONGEST_WAIT_S, "who goes on is not forgotten for others"
        for _ in range(2):
            await guarded.ask(Role.CLIENT, address="10.0.2.2", authorization="Bearer wrong")
        assert waits[-1] == 2 * waits[-2], "nor who is new"

    check(test)


def test_answers_that_wait_are_bounded(monkeypatch):
    monkeypatch.setattr(module, "_MAX_WAITING", 2)
    monkeypatch.setattr(module, "_FIRST_WAIT_S", DEADLINE_S)
    monkeypatch.setattr(module, "_LONGEST_WAIT_S", DEADLINE_S)

    async def test(guarded):
        waiting = [asyncio.ensure_future(guarded.ask(Role.CLIENT, x_api_key="wrong")) for _ in range(2)]
        await asyncio.sleep(0)
        assert (await guarded.ask(Role.CLIENT, x_api_key="wrong")).status == 401
        assert not any(task.done() for task in waiting)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert guarded.wrong._waiting == 0

    check(test)


@pytest.mark.parametrize(
    ("scope", "address"),
    [
        ({"client": ("10.0.0.9", 5), "server": ("10.0.0.1", 80)}, "10.0.0.9"),
        ({"client": ("::1", 5)}, "::1"),
        ({"client": None, "server": ("/run/qaa.sock", None)}, "local"),
        ({"client": None, "server": ("10.0.0.1", 80)}, "unknown"),
        ({"client": None, "server": None}, "unknown"),
        ({}, "unknown"),
    ],
)
def test_where_a_request_came_from(scope, address):
    assert address_of(scope) == address
