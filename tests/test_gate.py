"""The way of a request through the gate, over an app that echoes: what is let through, held, counted, refused."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import suppress

import httpx
import pytest

pytest.importorskip("starlette", reason="the server's packages are not installed")
pytest.importorskip("msgspec", reason="the server's packages are not installed")
pytest.importorskip("prometheus_client", reason="the server's packages are not installed")

from catalogue_support import revision
from gate_support import CHAT, DEADLINE_S, FORM, JSON, Exchange, World, client, run

from qaa_serve.server.context import current_request
from qaa_serve.server.errors import RefusedError
from qaa_serve.server.request_log import RequestLog
from qaa_serve.server.rights import Role


def status_of(*args, world_options=None, **kwargs):
    """The status that one request gets."""
    statuses = []

    async def test(world):
        statuses.append((await world.ask(*args, **kwargs)).status)

    run(test, **(world_options or {}))
    return statuses[0]


# ---------------------------------------------------------------------------------------------------- rights


def test_how_the_server_is_can_be_seen_without_a_key():
    keys = {"clients": [client("c")]}
    for path in ("/health", "/ready", "/metrics", "/docs/oauth2-redirect"):
        assert status_of(path, method="GET", client=("10.0.0.9", 5), world_options=keys) == 200


def test_clients_routes_need_a_clients_key():
    async def test(world):
        for path in (CHAT, "/v1/models", "/tokenize", "/inference/v1/generate"):
            assert (await world.ask(path)).status == 401
            answer = await world.ask(path, key="wrong")
            assert answer.status == 401
            assert answer.headers["www-authenticate"] == "Bearer"
            assert answer.json["error"]["type"] == "AuthenticationError"
            assert "wrong" not in answer.error
            assert world.behind.entered == 0
            for key in ("first", "second"):
                assert (await world.ask(path, key=key)).json["key"] == key
            world.behind.entered = 0

    run(test, clients=[client("first"), client("second")])


def test_without_client_keys_clients_need_none():
    assert status_of(client=("10.0.0.9", 5)) == 200


def test_keys_work_over_a_real_http_client():
    async def test(world):
        transport = httpx.ASGITransport(world.gate, client=("10.0.0.9", 5))
        async with httpx.AsyncClient(transport=transport, base_url="http://far", timeout=DEADLINE_S) as http:
            right = {"Authorization": "Bearer first"}
            answer = await http.post(CHAT, json={"model": "one"}, headers=right)
            assert (answer.status_code, answer.json()["asked"]) == (200, "one")
            assert answer.json()["address"] == "10.0.0.9"
            assert (await http.post(CHAT, json={"model": "one"})).status_code == 401
            assert (await http.get("/v1/models", headers=right)).status_code == 200
            assert (await http.put("/v1/adapters/one", json={}, headers=right)).status_code == 403

    run(test, clients=[client("first")])


ADMIN_ROUTES = [
    "/v1/adapters", "/v1/adapters/one", "/v1/adapters/one/rollback", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/pause", "/sleep", "/update_weights", "/collective_rpc", "/server_info",
    "/scale_elastic_ep", "/abort_requests", "/inference/v1/abort_requests", "/reset_prefix_cache",
    "/start_profile", "/adapters", "/",
]  # fmt: skip

#: Paths that look like something else: never less than the route they could reach.
ODD_PATHS = [
    "//v1/adapters", "/v1/adapters/", "/v1/adapters//", "/v1/adapters/../chat/completions", "/V1/Adapters",
    "/V1/chat/completions", "/v1/adapters\n", "/v1/adapters/one\n", "/v1/adapters/a/b", "/v1/load_lora_adapter\n",
    "/v1/unload_lora_adapter\n", "/inference/v1/abort_requests\n", "v1/adapters", "", "/./v1/adapters",
    "http://localhost/v1/adapters", "/x/../v1/adapters", "/healthx", "/metricsx", "/docsx", "/pause/", "//pause",
    "/pause\n", "/v1adapters", "/\N{FULLWIDTH SOLIDUS}v1/adapters", "/v1\\adapters", "/\0v1/adapters",
]  # fmt: skip


@pytest.mark.parametrize("path", ADMIN_ROUTES + ODD_PATHS)
def test_admins_routes_need_an_admin_key(path):
    async def test(world):
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
            assert (await world.ask(path, method=method)).status == 401
            assert (await world.ask(path, method=method, key="wrong")).status == 401
            answer = await world.ask(path, method=method, key="client")
            assert answer.status == 403
            assert answer.json["error"]["type"] == "PermissionDeniedError"
        assert world.behind.entered == 0
        assert (await world.ask(path, key="admin", client=("10.0.0.9", 5))).status in (200, 307, 404)
        assert (await world.ask(path, headers={"x-api-key": "other"})).status in (200, 307, 404)

    run(test, clients=[client("client")], admins=["admin", "other"])


def test_no_path_makes_one_an_admin_without_an_admin_key_not_even_on_this_machine():
    async def test(world):
        unix = {"client": None, "server": ("/run/qaa.sock", None)}
        for parts in ({}, {"client": ("::1", 5)}, unix):
            assert (await world.ask("/v1/adapters", **parts)).status == 401
            assert (await world.ask("/pause", **parts)).status == 401

    run(test, admins=())


@pytest.mark.parametrize(
    ("root", "path", "role"),
    [
        ("/v1", "/v1/pause", Role.ADMIN),
        ("/v1", "/v1/adapters", Role.ADMIN),
        ("/v1", "/v1/v1/adapters", Role.ADMIN),
        ("/v1", "/v1/v1/models", Role.CLIENT),
        ("/v1", "/v1/health", Role.ANYONE),
        ("/v1", "/v1", Role.ADMIN),
        ("/metrics", "/metrics/pause", Role.ADMIN),
        ("/api", "/api/v1/models", Role.CLIENT),
        ("/api", "/v1/models", Role.CLIENT),
        ("/api", "/apiv1/models", Role.ADMIN),
        ("/api", "/api/v1/adapters", Role.ADMIN),
        ("/api", "/api/v1/adapters\n", Role.ADMIN),
    ],
)
def test_the_apps_root_path_is_taken_off_as_the_app_does(root, path, role):
    async def test(world):
        by_role = {Role.ANYONE: (200, 200, 200), Role.CLIENT: (401, 200, 401), Role.ADMIN: (401, 403, 200)}
        allowed = [(await world.ask(path, key=key)).status for key in (None, "client", "admin")]
        assert [200 if status in (307, 404) else status for status in allowed] == list(by_role[role])

    run(test, clients=[client("client")], root_path=root)


def test_a_route_that_is_not_there_is_said_so_to_everybody_before_any_key():
    async def test(world):
        answer = await world.ask("/no-such-route", method="GET")
        assert answer.status == 404
        assert answer.json["error"]["type"] == "NotFoundError"
        assert "/no-such-route" in answer.error
        assert "/openapi.json" in answer.error
        assert (await world.ask("/v1/no-such-route")).status == 401, "clients' keys come first"

    run(test, clients=[client("c")], has_route=lambda scope: False)


@pytest.mark.parametrize(
    ("roles", "found"),
    [((Role.ADMIN, Role.ANYONE), ("/pause", "/health")), ((Role.CLIENT, Role.ANYONE), (CHAT, "/health"))],
)
def test_a_listener_answers_for_its_roles_alone(roles, found):
    async def test(world):
        for path in (CHAT, "/pause", "/health"):
            answer = await world.ask(path, key="admin")
            assert answer.status == (200 if path in found else 404)

    run(test, roles=roles)


def test_preflights_pass_without_a_key_and_do_nothing():
    keys = {"clients": [client("c")]}
    assert status_of(method="OPTIONS", world_options=keys) == 200
    assert status_of(method="options", world_options=keys) == 401


def test_lifespan_messages_pass():
    async def main():
        world = World(clients=[client("c")])
        incoming, outgoing = asyncio.Queue(), asyncio.Queue()
        task = asyncio.create_task(world.gate({"type": "lifespan"}, incoming.get, outgoing.put))
        async with asyncio.timeout(DEADLINE_S):
            for event in ("startup", "shutdown"):
                await incoming.put({"type": f"lifespan.{event}"})
                assert (await outgoing.get())["type"] == f"lifespan.{event}.complete"
                assert world.behind.started == (event == "startup")
            await task

    asyncio.run(main())


def test_websockets_need_a_key_as_well():
    async def test(world):
        async def kinds(path, key):
            return [message["type"] for message in (await world.ask(path, key=key, kind="websocket")).sent]

        accepted = ["websocket.accept", "websocket.send", "websocket.close"]
        refused = ["websocket.close"]
        assert await kinds("/v1/realtime", None) == refused
        assert await kinds("/v1/realtime", "wrong") == refused
        assert await kinds("/v1/realtime", "client") == accepted
        # A socket's model is the base model, whatever it says later.
        assert await kinds("/v1/realtime", "adapters only") == refused
        assert await kinds("/other", "client") == refused
        assert await kinds("/other", "admin") == accepted
        world.drain.closed = True
        assert await kinds("/v1/realtime", "client") == refused

    run(test, clients=[client("client"), client("adapters only", ["one"])])


# ---------------------------------------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("models", "asked", "status"),
    [
        (None, "one", 200),
        (None, "base", 200),
        (["one"], "one", 200),
        (["one"], "two", 403),
        (["one"], "base", 403),
        (["one"], None, 403),
        (["one"], "", 403),
        (["one"], "one@aaaaaaaaaaaa", 200),
        (["one"], "two@aaaaaaaaaaaa", 403),
        (["one"], "two@one", 403),
        (["one"], "@one", 403),
        (["one"], "One", 403),
        (["one"], " one", 403),
        (["one"], "one\0", 403),
        (["one"], "/models/base", 403),
        (["o*", "t??"], "two", 200),
        (["t*"], "one", 403),
        (["*"], "base", 200),
        (["[!o]*"], "one", 403),
        (["base"], "base", 200),
        (["base"], "/models/base", 200),
        (["base"], None, 200),
        (["base"], "base@aaaaaaaaaaaa", 404),
        (["base"], "one", 403),
        (["no-such"], "no-such", 404),
        (["one"], "no-such", 403),
        ([], "one", 403),
    ],
)
def test_a_key_is_for_the_models_of_its_list(models, asked, status):
    async def test(world):
        body = {} if asked is None else {"model": asked}
        answer = await world.ask(CHAT, body, key="k")
        assert answer.status == status
        assert world.behind.entered == (status == 200)
        if status != 200:
            assert answer.json["error"]["param"] == "model"
            assert "bbbb" not in answer.error, "nothing about what there is"

    run(test, clients=[client("k", models)])


@pytest.mark.parametrize(
    ("asked", "held"),
    [
        ("one", "one@bbbbbbbbbbbb"),
        ("one@aaaaaaaaaaaa", "one@aaaaaaaaaaaa"),
        ("one@bbbbbbbbbbbb", "one@bbbbbbbbbbbb"),
        ("base", None),
    ],
)
def test_the_app_sees_what_was_asked_and_what_is_held(asked, held):
    async def test(world):
        answer = await world.ask(CHAT, {"model": asked, "messages": [{"model": "two"}]})
        assert (answer.json["asked"], answer.json["revision"]) == (asked, held)
        assert current_request.get() is None

    run(test)


@pytest.mark.parametrize(
    "asked", ["one@cccccccccccc", "one@", "one@bbb", "one@latest", "base@bbbbbbbbbbbb", "no-such", "\N{SNOWMAN}"]
)
def test_what_is_not_served_is_404_and_takes_no_turn(asked):
    async def test(world):
        world.turns._max_running = world.turns._max_waiting = 0  # whoever wants a turn is refused
        answer = await world.ask(CHAT, {"model": asked})
        assert (answer.status, answer.json["error"]["type"]) == (404, "NotFoundError")
        assert f"`{asked}` does not exist" in answer.error
        assert "GET /v1/models" in answer.error
        assert ("12 to 64 hex digits" in answer.error) is (asked in ("one@", "one@bbb", "one@latest"))
        assert world.counted() == [("unknown", "chat", "client_error")]

    run(test)


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        (b'{"model": "two", "model": "one"}', "one"),
        (b'{"model": "one", "model": null}', None),
        (b'{"mod\\u0065l": "one"}', "one"),
        (b' \n{"a": {"model": "two"}, "model": "one"} ', "one"),
        (b"", None),
    ],
)
def test_the_app_gets_the_body_that_was_checked(body, asked):
    async def test(world):
        answer = await world.ask(CHAT, body, key="all")
        assert answer.json["asked"] == asked
        assert answer.json["revision"] == ("one@bbbbbbbbbbbb" if asked else None)
        assert (answer.json["bytes"], answer.json["body"]) == (len(body), body[:100].decode("latin-1"))
        assert (await world.ask(CHAT, body, key="two only")).status == 403
        assert (await world.ask(CHAT, body, key="base only")).status == (403 if asked else 200)

    run(test, clients=[client("all"), client("two only", ["two"]), client("base only", ["base"])])


@pytest.mark.parametrize("body", [b'{"model": 5}', b"\xff\xfe", b"[1, 2]", b'{"model": "one"', b"null"])
def test_a_body_that_cannot_be_read_reaches_nothing(body):
    async def test(world):
        answer = await world.ask(CHAT, body)
        assert (answer.status, answer.json["error"]["type"]) == (400, "BadRequestError")
        assert world.behind.entered == 0
        assert world.counted() == [("unknown", "chat", "client_error")]

    run(test)


def test_a_form_that_is_none_is_400():
    async def test(world):
        answer = await world.ask("/v1/audio/transcriptions", b"--c\r\nmodel", headers={"content-type": FORM})
        assert (answer.status, world.behind.entered) == (400, 0)
        assert "not the form" in answer.error

    run(test)


def test_the_model_of_an_invocation_is_the_headers_as_the_app_takes_it():
    async def test(world):
        named = {"X-Amzn-SageMaker-Adapter-Identifier": "one"}
        for path in ("/invocations", "/invocations\n"):
            answer = await world.ask(path, {"model": "two"}, key="one only", headers=named)
            assert (answer.status, answer.json["revision"]) == (200, "one@bbbbbbbbbbbb")
            assert (await world.ask(path, {"model": "one"}, key="two only", headers=named)).status == 403
            # Without the header, vLLM answers for the base model.
            assert (await world.ask(path, {"model": "one"}, key="one only")).status == 403
            empty = {"X-Amzn-SageMaker-Adapter-Identifier": ""}
            assert (await world.ask(path, {"model": "one"}, key="one only", headers=empty)).status == 403
            assert (await world.ask(path, {"model": "one"}, key="base only")).json["asked"] is None
        assert (await world.ask(CHAT, {"model": "two"}, key="one only", headers=named)).status == 403

    run(test, clients=[client(f"{name} only", [name]) for name in ("one", "two", "base")])


def test_what_is_only_read_needs_no_model_and_no_turn():
    async def test(world):
        first = [world.start("/v1/wait", method="GET", key="k") for _ in range(5)]
        await world.waits(lambda: world.behind.entered == 5)
        assert world.turns.names() == []
        world.behind.go_on.set()
        for exchange in first:
            assert (await exchange()).json["asked"] is None

    run(test, clients=[client("k", ["one"])], running=1, waiting=0)


def test_a_response_is_cancelled_without_a_turn():
    async def test(world):
        running = world.start("/v1/wait", {"model": "base"})
        await world.waits(lambda: world.behind.entered == 1)
        assert (await world.ask(CHAT, {})).status == 429
        for path in ("/v1/responses/resp_1/cancel", "/v1/responses/resp_1/cancel\n"):
            answer = await world.ask(path, b"")
            assert (answer.status, answer.json["asked"]) == (200, None)
        world.behind.go_on.set()
        await running()

    run(test, running=1, waiting=0)


def test_a_request_leaves_nothing_to_the_next_one_of_its_task():
    async def test(world):
        exchange = world.start(CHAT, {"model": "one"})
        exchange.task.cancel()  # before it has begun
        await world.gate(*exchange.parts)
        assert exchange.json["revision"] == "one@bbbbbbbbbbbb"
        assert current_request.get() is None

    run(test)


def test_one_request_does_not_see_anothers_model():
    async def test(world):
        asked = ["one", "two", "base", "one@aaaaaaaaaaaa"]
        exchanges = [world.start("/v1/wait", {"model": name}) for name in asked]
        await world.waits(lambda: world.behind.entered == len(asked))
        world.behind.go_on.set()
        answers = [(await exchange()).json for exchange in exchanges]
        assert [answer["asked"] for answer in answers] == asked
        assert [answer["revision"] for answer in answers] == [
            "one@bbbbbbbbbbbb", "two@aaaaaaaaaaaa", None, "one@aaaaaaaaaaaa",
        ]  # fmt: skip

    run(test)


# ---------------------------------------------------------------------------------------------------- bodies


@pytest.mark.parametrize(("path", "key"), [(CHAT, None), ("/v1/adapters/one", "admin"), ("/pause", "admin")])
@pytest.mark.parametrize("method", ["POST", "PUT", "GET", "DELETE"])
def test_a_body_that_is_too_large_is_refused_by_its_length_or_as_it_comes(path, key, method):
    async def test(world):
        parts = {"method": method, "key": key}
        body = b'"' + b"x" * 998 + b'"' if path != CHAT or method != "POST" else b"{" + b" " * 998 + b"}"
        assert (await world.ask(path, body, **parts)).status == 200
        assert (await world.ask(path, chunks=[body[:500], body[500:]], **parts)).status == 200
        entered = world.behind.entered
        answer = await world.ask(path, b"", headers={"content-length": "1001"}, **parts)
        assert answer.status == 413
        assert answer.json["error"]["type"] == "RequestTooLargeError"
        endless = world.start(path, chunks=[b"x" * 500] * 1000, **parts)
        assert (await endless()).status == 413
        assert len(endless.unread) == 997, "no more was read"
        lying = {"content-length": "7"}
        assert (await world.ask(path, chunks=[b"x" * 1001], headers=lying, **parts)).status == 413
        odd = {"content-length": "many"}
        assert (await world.ask(path, chunks=[b"{}"], headers=odd, **parts)).status == 200
        assert world.behind.entered == entered + 1

    run(test)


def test_only_uploads_of_admins_may_be_larger():
    async def test(world):
        upload = {"path": "/v1/adapters/x", "method": "PUT", "key": "admin"}
        for kind in (FORM, "Multipart/Form-Data; boundary=b"):
            form = {"content-type": kind}
            assert (await world.ask(body=b"x" * 5000, headers=form, **upload)).status == 200
            assert (await world.ask(body=b"x" * 5001, headers=form, **upload)).status == 413
            assert (await world.ask(CHAT, b"x" * 1001, headers=form, key="client")).status == 413
            assert (await world.ask(CHAT, chunks=[b"x" * 1001], headers=form, key="client")).status == 413
        for kind in (JSON, "multipart/form-data-too", ""):
            large = {"body": b"x" * 1001, "headers": {"content-type": kind}}
            assert (await world.ask(**large, **upload)).status == 413
        assert (await world.ask("/v1/adapters/x", b"x" * 4000, method="PUT", headers={"content-type": FORM},
                                key="client")).status == 403  # fmt: skip

    run(test, clients=[client("client")])


def test_an_upload_is_not_read_further_than_its_limit():
    async def test(world):
        seen = 0

        async def app(scope, receive, send):
            nonlocal seen
            while True:
                seen += len((await receive())["body"])

        world.gate._app = app
        form = {"content-type": FORM}
        upload = world.start("/v1/adapters/x", chunks=[b"x" * 1000] * 100, method="PUT", headers=form, key="admin")
        assert (await upload()).status == 413
        assert seen == 5000

    run(test)


def test_half_a_body_holds_neither_a_seat_nor_the_drain():
    async def test(world):
        halves = [world.start(CHAT, chunks=[b'{"model": "one"'], whole=False) for _ in range(10)]
        await world.waits(lambda: world.bodies.held_bytes == 150)
        assert (world.turns.names(), world.drain.in_flight) == ([], 0)
        assert (await world.ask(CHAT, {"model": "one"})).status == 200
        assert await world.drain.close(0), "nothing is under way"
        for half in halves:
            half.gone.set()
            assert (await half()).sent == []
        assert world.counted() == [("one", "chat", "success"), *[("unknown", "chat", "aborted")] * 10]

    run(test, running=1, waiting=0)


def test_a_body_that_is_complete_only_when_the_server_ends_is_refused():
    async def test(world):
        arrived = asyncio.Event()

        async def receive():
            await arrived.wait()
            return {"type": "http.request", "body": b'{"model": "one"}'}

        exchange = Exchange(lambda scope, _, send: world.gate(scope, receive, send))
        await asyncio.sleep(0)
        world.drain.closed = True
        arrived.set()
        assert ((await exchange()).status, world.behind.entered) == (503, 0)

    run(test)


def test_a_client_that_leaves_while_it_sends_its_body_takes_nothing():
    async def test(world):
        for path, key in ((CHAT, None), ("/v1/adapters/one", "admin")):
            exchange = world.start(path, chunks=[b'{"model": '], whole=False, key=key)
            await world.waits(lambda: world.bodies.held_bytes == 10)
            exchange.gone.set()
            assert (await exchange()).sent == []
        assert world.behind.entered == 0

    run(test)


def test_a_body_counts_until_the_app_has_it():
    async def test(world):
        first = world.start("/v1/wait", {"model": "one"})
        await world.waits(lambda: world.behind.entered == 1)
        second = world.start(CHAT, {"model": "one"})
        await world.waits(lambda: world.turns.counts("one") == (1, 1))
        assert world.bodies.held_bytes == 2 * len(json.dumps({"model": "one"}))
        world.behind.go_on.set()
        await first()
        await second()
        assert world.bodies.held_bytes == 0

    run(test, running=1)


# ----------------------------------------------------------------------------------------------------- turns


def test_so_many_run_so_many_wait_and_the_next_is_told_to_come_back():
    async def test(world):
        exchanges = [world.start("/v1/wait", {"model": "one"}) for _ in range(4)]
        await world.waits(lambda: world.behind.entered == 2)
        assert world.turns.counts("one") == (2, 2)
        refused = await world.ask("/v1/wait", {"model": "one"})
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        assert refused.json["error"]["type"] == "RateLimitError"
        # A former revision is the same adapter; the base model and its other name are another.
        assert (await world.ask("/v1/wait", {"model": "one@aaaaaaaaaaaa"})).status == 429
        assert (await world.ask(CHAT, {"model": "two"})).status == 200
        assert (await world.ask(CHAT, {"model": "base"})).status == 200
        world.behind.go_on.set()
        for exchange in exchanges:
            assert (await exchange()).status == 200
        assert world.counted().count(("one", "other", "rejected")) == 2
        assert world.counted().count(("one", "other", "success")) == 4

    run(test)


def test_a_request_counts_by_its_prompts_and_its_answers_to_each():
    async def test(world):
        body = {"model": "one", "prompt": ["a", "b"], "n": 2}
        exchange = world.start("/v1/wait", body)
        await world.waits(lambda: world.behind.entered == 1)
        assert world.turns.counts("one") == (2, 2), "the first prompt's two, and the other's two wait"
        assert (await world.ask(CHAT, {"model": "one"})).status == 429
        world.behind.go_on.set()
        await exchange()
        assert (await world.ask(CHAT, {"model": "one", "n": 5})).status == 400

    run(test)


def test_several_keys_leave_room_for_each_other_and_one_key_has_all():
    async def test(world):
        body = {"model": "one"}
        exchanges = [world.start("/v1/wait", body, key="a") for _ in range(6)]
        await world.waits(lambda: world.turns.counts("one") == (3, 3))
        refused = await world.ask(CHAT, body, key="a")
        assert (refused.status, "your key has" in refused.error) == (429, True)
        exchanges += [world.start("/v1/wait", body, key="b")]
        await world.waits(lambda: world.turns.counts("one") == (4, 3))
        world.behind.go_on.set()
        assert [(await exchange()).status for exchange in exchanges] == [200] * 7
        world.keys.replace([client("a")], [])
        world.behind.go_on.clear()
        exchanges = [world.start("/v1/wait", body, key="a") for _ in range(8)]
        await world.waits(lambda: world.turns.counts("one") == (4, 4))
        world.behind.go_on.set()
        assert [(await exchange()).status for exchange in exchanges] == [200] * 8

    run(test, clients=[client("a"), client("b")], running=4, waiting=4)


def test_the_base_models_names_are_counted_together():
    async def test(world):
        bodies = ({"model": "base"}, {"model": "/models/base"}, {}, {"model": ""})
        exchanges = [world.start("/v1/wait", body) for body in bodies]
        await world.waits(lambda: world.turns.counts("base") == (1, 3))
        assert world.turns.names() == ["base"]
        world.behind.go_on.set()
        for exchange in exchanges:
            await exchange()

    run(test, running=1, waiting=3)


def test_who_waits_too_long_is_told_so():
    async def test(world):
        first = world.start("/v1/wait", {"model": "one"})
        await world.waits(lambda: world.behind.entered == 1)
        answer = await world.ask(CHAT, {"model": "one"})
        assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert "--max-queue-wait" in answer.error
        world.behind.go_on.set()
        await first()
        assert ("one", "chat", "rejected") in world.counted()

    run(test, running=1, max_wait_s=0.01)


@pytest.mark.parametrize("leaving", [0, 1, 2])
def test_a_client_that_leaves_the_queue_gives_its_place_to_nobody_else(leaving):
    async def test(world):
        running = world.start("/v1/wait", {"model": "one"})
        await world.waits(lambda: world.behind.entered == 1)
        waiting = [world.start("/v1/wait", {"model": "one"}) for _ in range(3)]
        await world.waits(lambda: world.turns.counts("one") == (1, 3))
        waiting[leaving].gone.set()
        assert (await waiting[leaving]()).sent == []
        assert (world.turns.counts("one"), world.behind.entered) == ((1, 2), 1)
        world.behind.go_on.set()
        for exchange in (running, *(w for w in waiting if w is not waiting[leaving])):
            assert (await exchange()).status == 200
        assert world.counted().count(("one", "other", "aborted")) == 1

    run(test, running=1, waiting=3)


@pytest.mark.parametrize("pauses", range(8))
@pytest.mark.parametrize("ending", ["cancel", "leave"])
def test_a_turn_that_comes_just_as_its_client_goes_is_not_lost(pauses, ending):
    async def test(world):
        async def others():
            for _ in range(pauses):
                await asyncio.sleep(0)
            world.behind.go_on.set()

        holder = world.start("/v1/wait", {"model": "one"})
        await world.waits(lambda: world.behind.entered == 1)
        exchanges = [world.start(CHAT, {"model": "one"}) for _ in range(3)]
        if pauses % 2:
            await world.waits(lambda: world.turns.counts("one") == (1, 3))
        releasing = asyncio.create_task(others())
        for _ in range(4):
            await asyncio.sleep(0)
        for exchange in exchanges[:2]:
            if ending == "cancel":
                exchange.task.cancel()
            else:
                exchange.gone.set()
        for exchange in exchanges[:2]:
            with suppress(asyncio.CancelledError):
                await exchange()
        assert (await exchanges[2]()).status == 200
        await asyncio.gather(holder(), releasing)

    run(test, running=1, waiting=3)


@pytest.mark.parametrize("first", range(8))
@pytest.mark.parametrize("second", range(4))
def test_a_request_that_is_cancelled_again_and_again_leaves_the_line_and_ends_as_cancelled(first, second):
    async def test(world):
        holder = world.start("/v1/wait", {"model": "one"})
        await world.waits(lambda: world.behind.entered == 1)
        exchange = world.start(CHAT, {"model": "one"})
        for _ in range(first):
            await asyncio.sleep(0)
        exchange.task.cancel()
        for _ in range(second):
            await asyncio.sleep(0)
        exchange.task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await exchange()
        await world.waits(lambda: world.turns.counts("one") == (1, 0))
        world.behind.go_on.set()
        await holder()
        assert world.behind.entered == 2, "the holder's, twice"

    run(test, running=1, waiting=1)


def test_a_cancellation_while_the_turn_comes_is_not_forgotten():
    async def test(world):
        for pauses in range(12):
            world.behind.go_on.clear()
            world.behind.entered = 0
            holder = world.start("/v1/wait", {"model": "one"})
            await world.waits(lambda: world.behind.entered == 1)
            exchange = world.start("/v1/stream", {"model": "one"})
            await world.waits(lambda: world.turns.counts("one") == (1, 1))
            world.behind.go_on.set()
            for _ in range(pauses):
                await asyncio.sleep(0)
            if not exchange.task.done():
                exchange.task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await exchange()
            await holder()
            await world.waits(world.is_still)

    run(test, running=1, waiting=1)


def test_nobody_but_the_app_listens_to_the_client_once_it_has_its_turn():
    async def test(world):
        listening = []

        async def app(scope, receive, send):
            listening.append(exchange.listening)
            await receive()
            await send({"type": "http.response.start", "status": 200})
            await send({"type": "http.response.body", "body": b"{}"})

        holder = world.start("/v1/wait", {"model": "one"})
        await world.waits(lambda: world.behind.entered == 1)
        world.gate._app = app
        exchange = world.start(CHAT, {"model": "one"})
        await world.waits(lambda: exchange.listening == 1)
        world.behind.go_on.set()
        await holder()
        assert (await exchange()).status == 200
        assert listening == [0]

    run(test, running=1, waiting=1)


@pytest.mark.parametrize("path", ["/v1/fail", "/v1/wait", CHAT])
def test_counts_return_to_nothing_however_a_request_ends(path):
    async def test(world):
        exchange = world.start(path, {"model": "one"})
        if path == "/v1/fail":
            with pytest.raises(RuntimeError, match="as asked"):
                await exchange()
            assert exchange.status == 500
            outcome = "server_error"
        elif path == "/v1/wait":
            await world.waits(lambda: world.behind.entered == 1)
            assert (world.turns.counts("one"), world.holds()) == ((1, 0), 1)
            exchange.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await exchange()
            outcome = "aborted"
        else:
            assert (await exchange()).status == 200
            outcome = "success"
        assert world.is_still()
        assert [labels[-1] for labels in world.counted()] == [outcome]

    run(test)


def test_many_requests_that_end_in_every_way_leave_nothing_behind():
    async def test(world):
        exchanges = []
        for number in range(200):
            path = ("/v1/wait", CHAT, "/v1/fail", "/v1/stream")[number % 4]
            model = ("one", "two", "base", "one@aaaaaaaaaaaa", "no-such")[number % 5]
            body = {"model": model, "n": number % 3, "prompt": ["x"] * (number % 4)}
            exchanges.append(world.start(path, body, key="ab"[number % 2]))
            if number % 3 == 0:
                await asyncio.sleep(0)
            if number % 7 == 0:
                exchanges[number // 2].gone.set()
            if number % 11 == 0:
                exchanges[number // 3].task.cancel()
        world.behind.go_on.set()
        ends = await asyncio.gather(*(exchange() for exchange in exchanges), return_exceptions=True)
        unexpected = [end for end in ends if not isinstance(end, Exchange | asyncio.CancelledError | RuntimeError)]
        assert unexpected == []
        never_began = sum(isinstance(end, asyncio.CancelledError) for end in ends)
        assert 200 - never_began <= len(world.counted()) <= 200

    run(test, running=3, waiting=20, clients=[client("a"), client("b")])


# ----------------------------------------------------------------------------------------- holds and streams


def test_an_adapter_is_held_until_the_stream_has_ended():
    async def test(world):
        exchange = world.start("/v1/stream", {"model": "one"})
        await exchange.until(2)
        assert (world.holds(), world.turns.counts("one")) == (1, (1, 0))
        world.behind.go_on.set()
        await exchange()
        assert [message.get("body") for message in exchange.sent] == [None, b"begun", b"ended", b""]
        assert world.is_still()
        assert world.counted() == [("one", "other", "success")]

    run(test)


def test_an_adapter_is_let_go_when_the_client_leaves_in_the_middle_of_a_stream():
    async def test(world):
        exchange = world.start("/v1/stream", {"model": "one"})
        await exchange.until(2)
        assert world.holds() == 1
        exchange.gone.set()
        await exchange()
        assert world.is_still()
        assert world.counted() == [("one", "other", "aborted")]

    run(test)


def test_a_stream_that_cannot_be_sent_on_lets_go():
    async def test(world):
        exchange = world.start("/v1/stream", {"model": "one"})
        await exchange.until(2)
        exchange.broken = True
        world.behind.go_on.set()
        with pytest.raises(OSError, match="connection lost"):
            await exchange()
        assert world.is_still()

    run(test)


def test_an_adapter_that_cannot_be_loaded_now_is_503_and_its_turn_goes_on():
    async def test(world):
        world.engine.failing = True
        for _ in range(5):
            answer = await world.ask(CHAT, {"model": "one"})
            assert (answer.status, answer.headers["retry-after"]) == (503, "1")
            assert "no room" in answer.error
            assert answer.json["error"]["type"] == "ServiceUnavailableError"
        world.engine.failing = False
        world.catalogue.cache.failures.forget(world.catalogue.entries["one"].current)  # as time does
        assert (await world.ask(CHAT, {"model": "one"})).status == 200

    run(test, running=1, waiting=0)


def test_an_adapter_that_goes_while_a_request_waits_is_404():
    async def test(world):
        first = world.start("/v1/wait", {"model": "one"})
        await world.waits(lambda: world.behind.entered == 1)
        second = world.start(CHAT, {"model": "one"})
        await world.waits(lambda: world.turns.counts("one") == (1, 1))
        gone = world.catalogue.entries.pop("one")
        world.behind.go_on.set()
        await first()
        assert (await second()).status == 404
        world.catalogue.entries["one"] = gone

    run(test, running=1, waiting=1)


def test_the_revision_is_the_one_of_when_the_turn_comes():
    async def test(world):
        first = world.start("/v1/wait", {"model": "one"})
        await world.waits(lambda: world.behind.entered == 1)
        second = world.start(CHAT, {"model": "one"})
        await world.waits(lambda: world.turns.counts("one") == (1, 1))
        world.catalogue.entries["one"].current = revision("one", "c")
        world.behind.go_on.set()
        assert (await first()).json["revision"] == "one@bbbbbbbbbbbb"
        assert (await second()).json["revision"] == "one@cccccccccccc"

    run(test, running=1, waiting=1)


# ------------------------------------------------------------------------------------------ loading, draining


def test_while_adapters_are_loaded_only_the_state_is_answered():
    async def test(world):
        world.catalogue.ready = False
        for path in (CHAT, "/v1/models", "/v1/adapters"):
            answer = await world.ask(path, key="k" if path != "/v1/adapters" else "admin")
            assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert (await world.ask(CHAT)).status == 401, "strangers learn nothing"
        assert (await world.ask("/ready", method="GET")).status == 200

    run(test, clients=[client("k")])


def test_draining_waits_for_streams_and_lets_nothing_new_in():
    async def test(world):
        exchange = world.start("/v1/stream", {"model": "one"})
        await exchange.until(2)
        draining = asyncio.create_task(world.drain.close(DEADLINE_S))
        await asyncio.sleep(0)
        for path in (CHAT, "/v1/models", "/v1/adapters"):
            answer = await world.ask(path, {"model": "one"}, key="admin")
            assert answer.status == 503
            assert "retry-after" in answer.headers
        assert (await world.ask("/health", method="GET")).status == 200
        assert not draining.done()
        world.behind.go_on.set()
        await exchange()
        assert await draining

    run(test)


def test_draining_ends_after_its_time_and_says_what_is_left():
    async def test(world):
        exchange = world.start("/v1/stream", {"model": "one"})
        await exchange.until(2)
        assert not await world.drain.close(0.01)
        assert world.drain.in_flight == 1
        world.behind.go_on.set()
        await exchange()
        assert await world.drain.close(0)

    run(test)


def test_who_waited_before_the_drain_is_served_still():
    async def test(world):
        exchanges = [world.start("/v1/wait", {"model": "one"}) for _ in range(3)]
        await world.waits(lambda: world.turns.counts("one") == (2, 1))
        draining = asyncio.create_task(world.drain.close(DEADLINE_S))
        await asyncio.sleep(0)
        world.behind.go_on.set()
        assert [(await exchange()).status for exchange in exchanges] == [200] * 3
        assert await draining

    run(test)


# ------------------------------------------------------------------------------------ ids, the log, odd things


def test_every_answer_names_its_request_whether_it_was_let_through_or_not():
    async def test(world):
        answers = [
            await world.ask(CHAT, {"model": "one"}, key="k"),
            await world.ask(CHAT, key="wrong"),
            await world.ask(CHAT, {"model": "no-such"}, key="k"),
            await world.ask(CHAT, b"x" * 2000, key="k"),
            await world.ask("/pause", key="k"),
            await world.ask("/health", method="GET"),
        ]
        ids = {answer.headers["x-request-id"] for answer in answers}
        assert [answer.status for answer in answers] == [200, 401, 404, 413, 403, 200]
        assert len(ids) == len(answers)
        assert all(ids)
        given = {"x-request-id": "mine"}
        assert (await world.ask(CHAT, {}, key="k", headers=given)).headers["x-request-id"] == "mine"
        assert (await world.ask(CHAT, headers=given)).headers["x-request-id"] == "mine"

    run(test, clients=[client("k")])


def test_the_app_gets_the_id_that_the_answer_has_and_may_give_another():
    async def test(world):
        seen, own = [], []

        async def app(scope, receive, send):
            seen.extend(value for name, value in scope["headers"] if name == b"x-request-id")
            await send({"type": "http.response.start", "status": 200, "headers": list(own)})
            await send({"type": "http.response.body", "body": b"{}"})

        world.gate._app = app
        answer = await world.ask(CHAT, {})
        assert [answer.headers["x-request-id"].encode()] == seen
        own.append((b"x-request-id", b"the app's"))
        assert (await world.ask(CHAT, {})).headers["x-request-id"] == "the app's"

    run(test)


def test_every_request_of_a_client_is_one_line_of_the_log(caplog):
    async def test(world):
        await world.ask(CHAT, {"model": "one"}, key="k", headers={"x-request-id": "id-1"})
        await world.ask("/v1/completions", {"model": "two"}, key="k")
        await world.ask(CHAT, {"model": "one"}, key="wrong")
        await world.ask("/v1/models", method="GET", key="k")
        await world.ask("/v1/adapters", key="admin")
        first, refused, stranger = [vars(record) for record in caplog.records if record.msg == "request"]
        assert first["request_id"] == "id-1"
        shown = ("endpoint", "key", "model", "adapter", "revision", "outcome", "status")
        assert [first[name] for name in shown] == [
            "chat", "k", "one", "one", "one@bbbbbbbbbbbb", "success", 200,
        ]  # fmt: skip
        assert [refused[name] for name in shown] == [
            "completions", "k", "two", None, None, "client_error", 403,
        ]  # fmt: skip
        assert [stranger[name] for name in shown] == ["chat", None, None, None, None, "client_error", 401]
        for line in (first, refused, stranger):
            assert line["seconds"] >= line["waited_seconds"] >= 0
            assert line["first_token_seconds"] is None
            assert line["generated_tokens"] == 0

    with caplog.at_level(logging.INFO):
        run(test, clients=[client("k", ["one"])], request_log=RequestLog(logging.getLogger("test")))


def test_an_error_in_a_stream_that_has_begun_counts_as_the_servers():
    async def test(world):
        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            current_request.get().observation.failed = True
            await send({"type": "http.response.body", "body": b"data: error"})

        world.gate._app = app
        assert (await world.ask(CHAT, {})).status == 200
        assert world.counted() == [("base", "chat", "server_error")]

    run(test)


@pytest.mark.parametrize(("status", "outcome"), [(200, "success"), (404, "client_error"), (500, "server_error")])
def test_what_the_app_answers_is_what_is_counted(status, outcome):
    async def test(world):
        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": status})
            await send({"type": "http.response.body", "body": b"{}"})

        world.gate._app = app
        assert (await world.ask(CHAT, {})).status == status
        assert world.counted() == [("base", "chat", outcome)]

    run(test)


def test_a_response_that_never_began_or_never_ended_is_aborted():
    async def test(world):
        for messages in ([], [{"type": "http.response.start", "status": 200, "headers": []}]):

            async def app(scope, receive, send, messages=messages):
                for message in messages:
                    await send(message)

            world.gate._app = app
            await world.ask(CHAT, {})
        assert world.counted() == [("base", "chat", "aborted")] * 2

    run(test)


def test_an_answer_to_a_client_that_has_left_is_aborted():
    async def test(world):
        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200})
            while (await receive())["type"] != "http.disconnect":
                pass
            await send({"type": "http.response.body", "body": b"{}"})

        world.gate._app = app
        exchange = world.start(CHAT, {})
        exchange.gone.set()
        await exchange()
        assert world.counted() == [("base", "chat", "aborted")]

    run(test)


def test_a_refusal_after_the_response_has_begun_sends_nothing_more():
    async def test(world):
        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await receive()

        world.gate._app = app
        upload = {"chunks": [b"x" * 4000] * 3, "headers": {"content-type": FORM}, "key": "admin"}
        exchange = world.start("/v1/adapters/x", **upload)
        assert [message["type"] for message in (await exchange()).sent] == ["http.response.start"]

    run(test)


def test_a_refusal_of_a_route_is_answered_as_one_of_the_gates():
    async def test(world):
        async def app(scope, receive, send):
            raise RefusedError(409, "not now", Retry_After="7")

        world.gate._app = app
        answer = await world.ask(CHAT, {})
        assert (answer.status, answer.error, answer.headers["retry-after"]) == (409, "not now", "7")
        assert answer.json["error"]["type"] == "ConflictError"

    run(test)
