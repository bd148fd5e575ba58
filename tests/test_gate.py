"""The gate: who may do what, how much, how many at once, and what is held meanwhile; over an app that echoes."""

from __future__ import annotations

import asyncio
import hmac
import json
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import httpx
import pytest
from prometheus_client import CollectorRegistry

pytest.importorskip("starlette", reason="the server's packages are not installed")
pytest.importorskip("msgspec", reason="the server's packages are not installed")
pytest.importorskip("prometheus_client", reason="the server's packages are not installed")

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute

from qaa_serve.adapters import AdapterError
from qaa_serve.registry import Catalogue, Entry, Revision
from qaa_serve.server.gate import Gate, Role, Turns, current_use, is_loopback, role_of
from qaa_serve.server.keys import KeyFileError, KeyRing, client_key, read_admin_keys, read_client_keys
from qaa_serve.server.metrics import ServerMetrics

DEADLINE_S = 60
CHAT = "/v1/chat/completions"
UNIX = {"client": None, "server": ("/run/qaa.sock", None), "host": "whatever"}
JSON = "application/json"
PASSED = (200, 307, 404)  # whatever the app says to it
FORM = "multipart/form-data; boundary=b"


class FakeEngine:
    """Loads whatever it is told to, unless `failing`."""

    def __init__(self):
        self.failing = False

    async def load(self, revision):
        if self.failing:
            raise AdapterError("no room")
        return revision.nbytes

    async def unload(self, revision):
        pass


class Behind:
    """What stands behind the gate: it echoes, and waits, streams or fails as a request's path says."""

    def __init__(self):
        self.go_on = asyncio.Event()
        self.entered = 0
        self.started = False
        everything = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD"]
        self.app = Starlette(
            routes=[
                Route("/v1/wait", self.wait, methods=everything),
                Route("/v1/stream", self.stream, methods=everything),
                Route("/v1/fail", self.fail, methods=everything),
                WebSocketRoute("/{path:path}", self.socket),
                Route("/{path:path}", self.echo, methods=everything),
            ],
            lifespan=self.lifespan,
        )

    @asynccontextmanager
    async def lifespan(self, app):
        self.started = True
        yield
        self.started = False

    async def echo(self, request: Request):
        use = current_use.get()
        self.entered += 1
        body = await request.body()
        return JSONResponse(
            {
                "path": request.url.path,
                "use": use is not None,
                "asked": use.asked if use else None,
                "revision": use.revision.revision if use and use.revision else None,
                "bytes": len(body),
                "body": body[:100].decode("latin-1"),
            }
        )

    async def wait(self, request: Request):
        self.entered += 1
        await self.go_on.wait()
        return await self.echo(request)

    async def stream(self, request: Request):
        async def parts():
            yield b"begun"
            await self.go_on.wait()
            yield b"ended"

        return StreamingResponse(parts())

    async def fail(self, request: Request):
        raise RuntimeError("as asked")

    async def socket(self, socket):
        await socket.accept()
        await socket.send_text(str(current_use.get().asked))
        await socket.close()


class Exchange:
    """One request by hand: its parts are chosen, it can go away, and what comes back is seen as it comes."""

    def __init__(
        self, gate, path=CHAT, body=None, *, method="POST", headers=None, host="localhost:8000", key=None,
        chunks=None, client=("127.0.0.1", 50000), server=("127.0.0.1", 8000), whole=True, kind="http",
    ):  # fmt: skip
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        headers = {"host": host, "content-type": JSON, **(headers or {})}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        if chunks is None:
            headers.setdefault("content-length", str(len(data)))
        self.gone = asyncio.Event()
        self.broken = False
        self.sent: list[dict] = []
        self._changed = asyncio.Event()
        self._chunks = [data] if chunks is None else list(chunks)
        self._whole = whole
        self._kind = kind
        scope = {
            "type": kind, "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "http", "path": path,
            "raw_path": path.encode(), "query_string": b"", "root_path": "", "client": client, "server": server,
            "headers": [(k.lower().encode(), v.encode("latin-1")) for k, v in headers.items()], "state": {},
        }  # fmt: skip
        if kind == "http":
            scope["method"] = method
        self.parts = (scope, self._receive, self._send)
        self.task = asyncio.ensure_future(gate(*self.parts))

    async def _receive(self):
        if self._kind == "websocket":
            self._kind = "connected"
            return {"type": "websocket.connect"}
        if self._chunks:
            part = self._chunks.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self._chunks) or not self._whole}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message):
        if self.broken:
            raise OSError("connection lost")
        self.sent.append(message)
        self._changed.set()

    async def until(self, number):
        """Wait for so many messages."""
        async with asyncio.timeout(DEADLINE_S):
            while len(self.sent) < number:
                self._changed.clear()
                await self._changed.wait()

    async def __call__(self):
        """Wait for the end; returns itself."""
        async with asyncio.timeout(DEADLINE_S):
            await self.task
        return self

    @property
    def status(self):
        return self.sent[0]["status"] if self.sent else None

    @property
    def headers(self):
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def json(self):
        return json.loads(b"".join(message.get("body", b"") for message in self.sent[1:]))


def revision(name, digest="a"):
    return Revision(name, digest * 64, Path("/nowhere") / name, "QAA", 4, 10, "base", {})


class World:
    """A gate, what is behind it, and the catalogue: `one` has a former revision, `two` has none."""

    def __init__(self, *, clients=(), admins=(), running=2, waiting=2, body=1000, upload=5000, root_path=None):
        self.behind = Behind()
        self.engine = FakeEngine()
        self.catalogue = Catalogue(None, self.engine, cache_bytes=100, logger=None)
        self.catalogue.entries = {
            "one": Entry("one", current=revision("one", "b"), kept=[revision("one", "a")]),
            "two": Entry("two", current=revision("two")),
        }
        self.catalogue.ready = True
        self.turns = Turns(running, waiting)
        buckets = {f"{kind}_buckets": (1.0,) for kind in ("latency", "first_token", "inter_token")}
        metrics = ServerMetrics(CollectorRegistry(), **buckets)
        app = self.behind.app
        if root_path is not None:
            app = Rooted(app, root_path)
        self.gate = Gate(
            app, catalogue=self.catalogue, keys=KeyRing(clients, admins), turns=self.turns, metrics=metrics,
            base_names=["base", "/models/base"], max_body_bytes=body, max_upload_bytes=upload,
        )  # fmt: skip

    def start(self, *args, **kwargs):
        return Exchange(self.gate, *args, **kwargs)

    async def ask(self, *args, **kwargs):
        return await self.start(*args, **kwargs)()

    async def waits(self, condition):
        """Let the others run until a condition holds."""
        async with asyncio.timeout(DEADLINE_S):
            while not condition():
                await asyncio.sleep(0)

    def holds(self, name="one"):
        resident = self.catalogue.cache.find(self.catalogue.entries[name].current)
        return 0 if resident is None else resident.holds

    def is_still(self):
        """Whether nothing is counted, waited for or held any more."""
        loose = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        counts = dict(self.turns.running) == {} and self.turns._waiting == {} and self.gate.in_flight == 0
        return counts and self.holds("one") == self.holds("two") == 0 and not loose


class Rooted:
    """An app with a root path of its own, as FastAPI has it."""

    def __init__(self, app, root_path):
        self.app = app
        self.root_path = root_path

    async def __call__(self, scope, receive, send):
        await self.app({**scope, "root_path": self.root_path}, receive, send)


def run(test, **options):
    """Run a test in a world of its own, which must be still again at its end."""

    async def main():
        world = World(**options)
        await test(world)
        await world.waits(world.is_still)

    asyncio.run(main())


def status_of(*args, world_options=None, **kwargs):
    """The status that one request gets."""
    statuses = []

    async def test(world):
        statuses.append((await world.ask(*args, **kwargs)).status)

    run(test, **(world_options or {}))
    return statuses[0]


# ---------------------------------------------------------------------------------------------------- rights


@pytest.mark.parametrize(
    "path",
    ["/health", "/ready", "/ping", "/version", "/metrics", "/metrics/", "/docs", "/docs/oauth2-redirect", "/redoc",
     "/openapi.json", "/load", "/static/swagger.js"],
)  # fmt: skip
def test_how_the_server_is_can_be_seen_without_a_key(path):
    keys = {"clients": [client_key("c")], "admins": ["a"]}
    assert role_of(path) is Role.ANYONE
    assert status_of(path, method="GET", client=("10.0.0.9", 5), world_options=keys) == 200


@pytest.mark.parametrize(
    "path",
    [CHAT, "/v1/completions", "/v1/models", "/v1/responses/abc", "/v1/embeddings", "/v2/embed", "/tokenize",
     "/detokenize", "/invocations", "/score", "/rerank", "/classify", "/pooling", "/cohere/v2/chat",
     "/inference/v1/generate"],
)  # fmt: skip
def test_clients_routes_need_a_clients_key(path):
    async def test(world):
        assert (await world.ask(path)).status == 401
        answer = await world.ask(path, key="wrong")
        assert answer.status == 401
        assert answer.headers["www-authenticate"] == "Bearer"
        assert answer.json["error"]["type"] == "AuthenticationError"
        assert "wrong" not in answer.json["error"]["message"]
        assert world.behind.entered == 0
        for key in ("first", "second"):
            assert (await world.ask(path, key=key)).status == 200
        assert (await world.ask(path, headers={"x-api-key": "first"})).status == 200
        assert (await world.ask(path, headers={"x-api-key": "wrong"})).status == 401
        assert (await world.ask(path, headers={"authorization": "bearer  first "})).status == 200
        assert (await world.ask(path, headers={"authorization": "first"})).status == 401
        assert (await world.ask(path, headers={"authorization": "Bearer"})).status == 401
        # The admin's key is for admins: who watches its use need not look at what clients do.
        assert (await world.ask(path, key="admin")).status == 401

    run(test, clients=[client_key("first"), client_key("second")], admins=["admin"])


def test_without_client_keys_clients_need_none():
    assert status_of(client=("10.0.0.9", 5)) == 200


def test_keys_work_over_a_real_http_client():
    async def test(world):
        transport = httpx.ASGITransport(world.gate, client=("10.0.0.9", 5))
        async with httpx.AsyncClient(transport=transport, base_url="http://far", timeout=DEADLINE_S) as client:
            right = {"Authorization": "Bearer first"}
            answer = await client.post(CHAT, json={"model": "one"}, headers=right)
            assert (answer.status_code, answer.json()["asked"]) == (200, "one")
            assert (await client.post(CHAT, json={"model": "one"})).status_code == 401
            assert (await client.get("/v1/models", headers=right)).status_code == 200
            assert (await client.put("/v1/adapters/one", json={}, headers=right)).status_code == 403

    run(test, clients=[client_key("first")])


def test_every_key_is_compared_in_constant_time(monkeypatch):
    compared = []

    def compare(a, b):
        compared.append((a, b))
        return hmac_compare(a, b)

    hmac_compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", compare)
    ring = KeyRing([client_key(str(n)) for n in range(5)], [str(n) for n in range(7)])
    for key in ("0", "4", "none", "", None):
        compared.clear()
        ring.client(key)
        assert len(compared) == 5
        compared.clear()
        ring.is_admin(key)
        assert len(compared) == 7
    assert all(len(a) == len(b) == 32 for a, b in compared), "digests, not the keys"


@pytest.mark.parametrize("key", [None, "", "wrong", "sk-é", "\udcff", "x" * 100_000])
def test_what_is_no_key_is_nobodys(key):
    ring = KeyRing([client_key("c")], ["a"])
    assert ring.client(key) is None
    assert not ring.is_admin(key)


def test_a_ring_never_shows_a_key():
    ring = KeyRing([client_key("top-secret")], ["also-secret"])
    assert "secret" not in repr(vars(ring)) + repr(ring) + repr(client_key("top-secret"))


ADMIN_ROUTES = [
    "/v1/adapters", "/v1/adapters/one", "/v1/adapters/one/rollback", "/v1/load_lora_adapter",
    "/v1/unload_lora_adapter", "/pause", "/sleep", "/update_weights", "/collective_rpc", "/server_info",
    "/scale_elastic_ep", "/abort_requests", "/inference/v1/abort_requests", "/reset_prefix_cache",
    "/start_profile", "/adapters", "/no-such-route", "/",
]  # fmt: skip

#: Paths that look like something else: never less than the route they could reach.
ODD_PATHS = [
    "//v1/adapters", "/v1/adapters/", "/v1/adapters//", "/v1/adapters/../chat/completions", "/V1/Adapters",
    "/V1/chat/completions", "/v1/adapters\n", "/v1/adapters/one\n", "/v1/adapters/a/b", "/v1/adapters;x",
    "v1/adapters", "", "http://localhost/v1/adapters", "/./v1/adapters", "/x/../v1/adapters", "/health/../pause",
    "/health/", "/health\n", "/healthx", "/metricsx", "/docsx", "/pause/", "//pause", "/pause\n", "/v1",
    "/v1adapters", "/\N{FULLWIDTH SOLIDUS}v1/adapters", "/v1\\adapters", "/\0v1/adapters",
]  # fmt: skip


@pytest.mark.parametrize("path", ADMIN_ROUTES + ODD_PATHS)
def test_admins_routes_need_the_admin_key(path):
    async def test(world):
        for method in ("GET", "POST", "PUT", "DELETE", "PATCH"):
            assert (await world.ask(path, method=method)).status == 401
            assert (await world.ask(path, method=method, key="wrong")).status == 401
            answer = await world.ask(path, method=method, key="client")
            assert answer.status == 403
            assert answer.json["error"]["type"] == "PermissionDeniedError"
        assert world.behind.entered == 0
        answer = await world.ask(path, key="admin", client=("10.0.0.9", 5), host="far")
        assert answer.status in PASSED
        assert (await world.ask(path, headers={"x-api-key": "other"})).status in PASSED

    run(test, clients=[client_key("client")], admins=["admin", "other"])


@pytest.mark.parametrize("path", ["/v1//adapters", "/v1/./adapters", "/v1/chat/../adapters", "/v1/Adapters"])
def test_paths_that_count_as_clients_reach_no_admins_route(path):
    from starlette.routing import compile_path

    assert role_of(path) is Role.CLIENT
    for route in ("/v1/adapters", "/v1/adapters/{name}", "/v1/adapters/{name}/rollback", "/v1/load_lora_adapter"):
        assert compile_path(route)[0].match(path) is None


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
    ],
)
def test_the_apps_root_path_is_taken_off_as_the_app_does(root, path, role):
    async def test(world):
        by_role = {Role.ANYONE: (200, 200, 200), Role.CLIENT: (401, 200, 401), Role.ADMIN: (401, 403, 200)}
        by_role[role] = tuple(307 if not path.removeprefix(root) and s == 200 else s for s in by_role[role])
        statuses = [(await world.ask(path, key=key)).status for key in (None, "client", "admin")]
        assert tuple(statuses) == by_role[role]

    run(test, clients=[client_key("client")], admins=["admin"], root_path=root)


@pytest.mark.parametrize(
    ("request_", "allowed"),
    [
        ({}, True),
        ({"client": ("::1", 5)}, True),
        ({"client": ("127.8.8.8", 5)}, True),
        ({"client": ("::ffff:127.0.0.1", 5)}, True),
        ({"host": "127.0.0.1:8000"}, True),
        ({"host": "[::1]:8000"}, True),
        ({"host": "[::1]"}, True),
        ({"host": "localhost"}, True),
        ({"headers": {"origin": "http://localhost:8000"}}, True),
        (UNIX, True),
        ({**UNIX, "server": ("", None)}, True),
        ({"client": ("10.0.0.9", 5)}, False),
        ({"client": ("::ffff:10.0.0.9", 5)}, False),
        ({"client": ("localhost.evil.example", 5)}, False),
        # A connection that its client has reset has no client either; that does not make it a unix socket.
        ({"client": None}, False),
        ({"client": None, "server": None}, False),
        ({"client": None, "server": ("10.0.0.1", 8000)}, False),
        ({"host": "evil.example"}, False),
        ({"host": "evil.example:8000"}, False),
        ({"host": "127.0.0.1.evil.example"}, False),
        ({"host": "localhost:8000.evil.example"}, False),
        ({"host": "evil.example:127.0.0.1"}, False),
        ({"host": "localhost@evil.example"}, False),
        ({"host": ""}, False),
        ({"host": "0.0.0.0:8000"}, False),
        ({"headers": {"origin": "http://evil.example"}}, False),
        ({"headers": {"origin": "null"}}, False),
        ({"headers": {"origin": "http://localhost:3000"}}, False),
        ({"headers": {"origin": "http://localhost:8000.evil.example"}}, False),
        ({"headers": {"x-forwarded-for": "127.0.0.1"}}, False),
        ({"headers": {"X-Forwarded-For": ""}}, False),
        ({"headers": {"forwarded": "for=127.0.0.1"}}, False),
        ({"headers": {"x-real-ip": "127.0.0.1"}}, False),
        ({"headers": {"x-forwarded-host": "localhost"}}, False),
        ({"headers": {"via": "1.1 proxy"}}, False),
        ({**UNIX, "headers": {"x-forwarded-for": "10.0.0.9"}}, False),
        ({**UNIX, "headers": {"origin": "http://evil.example"}}, False),
    ],
)
def test_without_an_admin_key_only_programs_on_this_machine_are_admins(request_, allowed):
    for keys in ({}, {"clients": [client_key("client")]}):
        for path in ("/v1/adapters", "/pause"):
            assert status_of(path, world_options=keys, **request_) == (200 if allowed else 403)


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False), ("", False),
     ("10.0.0.1", False), ("::ffff:127.0.0.1", True), ("127.0.0.1:80", False), ("localhost.", False)],
)  # fmt: skip
def test_what_stands_for_this_machine(host, expected):
    assert is_loopback(host) == expected


def test_preflights_pass_without_a_key_and_do_nothing():
    keys = {"clients": [client_key("c")], "admins": ["a"]}
    assert status_of(method="OPTIONS", world_options=keys) == 200
    assert status_of(method="options", world_options=keys) == 401


def test_lifespan_messages_pass():
    async def main():
        world = World(clients=[client_key("c")], admins=["a"])
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
        world.gate.draining = True
        assert await kinds("/v1/realtime", "client") == refused

    run(test, clients=[client_key("client"), client_key("adapters only", ["one"])], admins=["admin"])


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
        (["base"], "base@aaaaaaaaaaaa", 200),
        (["base"], "one", 403),
        (["no-such"], "no-such", 200),
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
        if status == 403:
            assert answer.json["error"]["type"] == "PermissionDeniedError"
            assert "bbbb" not in answer.json["error"]["message"], "nothing about what there is"

    run(test, clients=[client_key("k", models)])


@pytest.mark.parametrize(
    ("asked", "held"),
    [
        ("one", "one@bbbbbbbbbbbb"),
        ("one@aaaaaaaaaaaa", "one@aaaaaaaaaaaa"),
        ("one@bbbbbbbbbbbb", "one@bbbbbbbbbbbb"),
        ("one@cccccccccccc", None),
        ("one@", None),
        ("base", None),
        ("base@bbbbbbbbbbbb", None),
        ("no-such", None),
    ],
)
def test_the_app_sees_what_was_asked_and_what_is_held(asked, held):
    async def test(world):
        answer = await world.ask(CHAT, {"model": asked, "messages": [1, {"model": "two"}]})
        assert (answer.json["asked"], answer.json["revision"]) == (asked, held)
        assert current_use.get() is None

    run(test)


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        (b'{"model": "two", "model": "one"}', "one"),
        (b'{"model": "one", "model": null}', None),
        (b'{"mod\\u0065l": "one"}', "one"),
        (b' \n{"a": {"model": "two"}, "model": "one"} ', "one"),
        (b'{"model": 5}', None),
        (b'{"model": ["one"]}', None),
        (b'{"model": "one"', None),
        (b'{"model": "\xff"}', None),
        (b'{"model": "\\ud800"}', None),
        (b"\xff\xfe", None),
        ('{"model": "one"}'.encode("utf-16"), None),
        (b"[1, 2]", None),
        (b"null", None),
        (b"", None),
        (b'{"a": ' + b"[" * 100_000, None),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b', "model": "one"}', None),
    ],
)
def test_a_body_that_names_no_model_is_the_base_models(body, asked):
    async def test(world):
        # What the app makes of it is its own affair, but it gets nothing except for what was checked.
        answer = await world.ask(CHAT, body, key="all")
        assert answer.json["asked"] == asked
        assert answer.json["revision"] == ("one@bbbbbbbbbbbb" if asked else None)
        assert (answer.json["bytes"], answer.json["body"]) == (len(body), body[:100].decode("latin-1"))
        assert (await world.ask(CHAT, body, key="two only")).status == 403
        assert (await world.ask(CHAT, body, key="base only")).status == (403 if asked else 200)

    clients = [client_key("all"), client_key("two only", ["two"]), client_key("base only", ["base"])]
    run(test, clients=clients, body=1 << 20)


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

    names = ("one", "two", "base")
    run(test, clients=[client_key(f"{name} only", [name]) for name in names])


def test_what_is_only_read_needs_no_model_and_no_turn():
    async def test(world):
        first = [world.start("/v1/wait", method="GET", key="k") for _ in range(5)]
        await world.waits(lambda: world.behind.entered == 5)
        assert not world.turns.running
        world.behind.go_on.set()
        for exchange in first:
            assert (await exchange()).json["asked"] is None

    run(test, clients=[client_key("k", ["one"])], running=1, waiting=0)


def test_a_request_leaves_nothing_to_the_next_one_of_its_task():
    async def test(world):
        exchange = world.start(CHAT, {"model": "one"})
        exchange.task.cancel()  # before it has begun
        await world.gate(*exchange.parts)
        assert exchange.json["revision"] == "one@bbbbbbbbbbbb"
        assert current_use.get() is None

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


@pytest.mark.parametrize("path", [CHAT, "/v1/adapters/one", "/pause"])
@pytest.mark.parametrize("method", ["POST", "PUT", "GET", "DELETE"])
@pytest.mark.parametrize("kind", [JSON, "text/plain", ""])
def test_a_body_that_is_too_large_is_refused_by_its_length_or_as_it_comes(path, method, kind):
    async def test(world):
        headers = {"content-type": kind}
        assert (await world.ask(path, b"x" * 1000, method=method, headers=headers)).status == 200
        chunks = [b"x" * 500, b"x" * 500]
        assert (await world.ask(path, chunks=chunks, method=method, headers=headers)).status == 200
        entered = world.behind.entered
        answer = await world.ask(path, b"", method=method, headers={**headers, "content-length": "1001"})
        assert answer.status == 413
        assert answer.json["error"]["type"] == "RequestTooLargeError"
        endless = world.start(path, chunks=[b"x" * 500] * 1000, method=method, headers=headers)
        assert (await endless()).status == 413
        assert len(endless._chunks) == 997, "no more was read"
        lying = {**headers, "content-length": "7"}
        assert (await world.ask(path, chunks=[b"x" * 1001], method=method, headers=lying)).status == 413
        odd = {**headers, "content-length": "many"}
        assert (await world.ask(path, chunks=[b"x"], method=method, headers=odd)).status == 200
        assert world.behind.entered == entered + 1

    run(test)


def test_only_uploads_of_admins_may_be_larger():
    async def test(world):
        for kind in (FORM, "Multipart/Form-Data; boundary=b"):
            form = {"content-type": kind}
            assert (await world.ask("/v1/adapters/x", b"x" * 5000, method="PUT", headers=form)).status == 200
            assert (await world.ask("/v1/adapters/x", b"x" * 5001, method="PUT", headers=form)).status == 413
            assert (await world.ask(CHAT, b"x" * 1001, headers=form)).status == 413
            assert (await world.ask(CHAT, chunks=[b"x" * 1001], headers=form)).status == 413
        assert (await world.ask("/v1/adapters/x", b"x" * 1001, method="PUT")).status == 413
        assert (await world.ask("/v1/adapters/x", b"x" * 4000, method="PUT", headers={"content-type": FORM},
                                key="client", client=("10.0.0.9", 5))).status == 403  # fmt: skip

    run(test)


def test_an_upload_is_not_read_further_than_its_limit():
    async def main():
        world = World()
        seen = 0

        async def app(scope, receive, send):
            nonlocal seen
            while True:
                seen += len((await receive())["body"])

        world.gate._app = app
        form = {"content-type": FORM}
        upload = world.start("/v1/adapters/x", chunks=[b"x" * 1000] * 100, method="PUT", headers=form)
        assert (await upload()).status == 413
        assert seen == 5000

    asyncio.run(main())


def test_a_client_that_leaves_while_it_sends_its_body_takes_nothing():
    async def test(world):
        for path in (CHAT, "/v1/adapters/one"):
            exchange = world.start(path, chunks=[b'{"model": '], whole=False)
            await world.waits(lambda: world.gate.in_flight == 1)
            exchange.gone.set()
            assert (await exchange()).sent == []
        assert world.behind.entered == 0

    run(test)


# ----------------------------------------------------------------------------------------------------- turns


def test_so_many_run_so_many_wait_and_the_next_is_told_to_come_back():
    async def test(world):
        exchanges = [world.start("/v1/wait", {"model": "one"}) for _ in range(4)]
        await world.waits(lambda: world.turns.waiting("one") == 2)
        assert (world.turns.running["one"], world.behind.entered) == (2, 2)
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

    run(test)


def test_the_base_models_names_are_counted_together():
    async def test(world):
        bodies = ({"model": "base"}, {"model": "/models/base"}, {}, {"model": ""})
        exchanges = [world.start("/v1/wait", body) for body in bodies]
        await world.waits(lambda: world.turns.waiting("base") == 3)
        assert dict(world.turns.running) == {"base": 1}
        world.behind.go_on.set()
        for exchange in exchanges:
            await exchange()

    run(test, running=1, waiting=3)


def test_who_waits_is_served_in_the_order_of_coming():
    async def test(world):
        order = []
        gates = [asyncio.Event() for _ in range(6)]

        async def take(number):
            async with world.turns.turn("one"):
                order.append(number)
                await gates[number].wait()

        tasks = []
        for number in range(6):
            tasks.append(asyncio.create_task(take(number)))
            await asyncio.sleep(0)
        for number in range(6):
            await world.waits(lambda number=number: order == list(range(number + 1)))
            assert world.turns.running["one"] == 1
            gates[number].set()
        await asyncio.gather(*tasks)

    run(test, running=1, waiting=5)


@pytest.mark.parametrize("leaving", [0, 1, 2])
def test_a_client_that_leaves_the_queue_gives_its_place_to_nobody_else(leaving):
    async def test(world):
        running = world.start("/v1/wait", {"model": "one"})
        await world.waits(lambda: world.behind.entered == 1)
        waiting = [world.start("/v1/wait", {"model": "one"}) for _ in range(3)]
        await world.waits(lambda: world.turns.waiting("one") == 3)
        waiting[leaving].gone.set()
        assert (await waiting[leaving]()).sent == []
        assert (world.turns.waiting("one"), world.turns.running["one"], world.behind.entered) == (2, 1, 1)
        world.behind.go_on.set()
        for exchange in (running, *(w for w in waiting if w is not waiting[leaving])):
            assert (await exchange()).status == 200

    run(test, running=1, waiting=3)


@pytest.mark.parametrize("pauses", range(8))
@pytest.mark.parametrize("ending", ["cancel", "leave"])
def test_a_turn_that_comes_just_as_its_client_goes_is_not_lost(pauses, ending):
    async def test(world):
        async def take():
            async with world.turns.turn("one"):
                await world.behind.go_on.wait()

        async def others():
            for _ in range(pauses):
                await asyncio.sleep(0)
            world.behind.go_on.set()

        holder = asyncio.create_task(take())
        await asyncio.sleep(0)
        exchanges = [world.start(CHAT, {"model": "one"}) for _ in range(3)]
        if pauses % 2:
            await world.waits(lambda: world.turns.waiting("one") == 3)
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
        await asyncio.gather(holder, releasing)

    run(test, running=1, waiting=3)


def test_a_turn_passes_over_those_that_were_cancelled_and_they_end_as_cancelled():
    async def test(world):
        async def take():
            async with world.turns.turn("one"):
                pass

        holding = world.turns.turn("one")
        await holding.__aenter__()
        waiting = asyncio.create_task(take())
        await world.waits(lambda: world.turns.waiting("one") == 1)
        # Within one step of the loop: the one that waits has not noticed yet when the turn ends.
        waiting.cancel()
        await holding.__aexit__(None, None, None)
        with pytest.raises(asyncio.CancelledError):
            await waiting

    run(test, running=1, waiting=1)


def test_a_request_that_is_cancelled_while_it_lines_up_leaves_the_line():
    async def test(world):
        for pauses in range(6):
            holding = world.turns.turn("one")
            await holding.__aenter__()
            exchange = world.start(CHAT, {"model": "one"})
            for _ in range(pauses):
                await asyncio.sleep(0)
            exchange.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await exchange()
            assert world.turns.waiting("one") == 0
            await holding.__aexit__(None, None, None)
            await world.waits(world.is_still)
        assert world.behind.entered == 0

    run(test, running=1, waiting=1)


@pytest.mark.parametrize("path", ["/v1/fail", "/v1/wait", CHAT])
def test_counts_return_to_nothing_however_a_request_ends(path):
    async def test(world):
        exchange = world.start(path, {"model": "one"})
        if path == "/v1/fail":
            with pytest.raises(RuntimeError, match="as asked"):
                await exchange()
            assert exchange.status == 500
        elif path == "/v1/wait":
            await world.waits(lambda: world.behind.entered == 1)
            assert (world.turns.running["one"], world.holds()) == (1, 1)
            exchange.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await exchange()
        else:
            assert (await exchange()).status == 200
        assert world.is_still()

    run(test)


def test_many_requests_that_end_in_every_way_leave_nothing_behind():
    async def test(world):
        exchanges = []
        for number in range(200):
            path = ("/v1/wait", CHAT, "/v1/fail", "/v1/stream")[number % 4]
            model = ("one", "two", "base", "one@aaaaaaaaaaaa", "no-such")[number % 5]
            exchanges.append(world.start(path, {"model": model}))
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

    run(test, running=3, waiting=20)


# ----------------------------------------------------------------------------------------- holds and streams


def test_an_adapter_is_held_until_the_stream_has_ended():
    async def test(world):
        exchange = world.start("/v1/stream", {"model": "one"})
        await exchange.until(2)
        assert (world.holds(), world.turns.running["one"]) == (1, 1)
        world.behind.go_on.set()
        await exchange()
        assert [message.get("body") for message in exchange.sent] == [None, b"begun", b"ended", b""]
        assert world.is_still()

    run(test)


def test_an_adapter_is_let_go_when_the_client_leaves_in_the_middle_of_a_stream():
    async def test(world):
        exchange = world.start("/v1/stream", {"model": "one"})
        await exchange.until(2)
        assert world.holds() == 1
        exchange.gone.set()
        await exchange()
        assert world.is_still()

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
            assert (answer.status, answer.headers["retry-after"]) == (503, "5")
            assert "no room" in answer.json["error"]["message"]
            assert answer.json["error"]["type"] == "ServiceUnavailableError"
        world.engine.failing = False
        assert (await world.ask(CHAT, {"model": "one"})).status == 200

    run(test, running=1, waiting=0)


def test_an_adapter_that_goes_while_a_request_waits_is_not_held():
    async def test(world):
        first = world.start("/v1/wait", {"model": "one"})
        await world.waits(lambda: world.behind.entered == 1)
        second = world.start(CHAT, {"model": "one"})
        await world.waits(lambda: world.turns.waiting("one") == 1)
        gone = world.catalogue.entries.pop("one")
        world.behind.go_on.set()
        await first()
        assert (await second()).json["revision"] is None
        world.catalogue.entries["one"] = gone

    run(test, running=1, waiting=1)


def test_the_revision_is_the_one_of_when_the_turn_comes():
    async def test(world):
        first = world.start("/v1/wait", {"model": "one"})
        await world.waits(lambda: world.behind.entered == 1)
        second = world.start(CHAT, {"model": "one"})
        await world.waits(lambda: world.turns.waiting("one") == 1)
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
            answer = await world.ask(path, key="k" if path != "/v1/adapters" else "a")
            assert (answer.status, answer.headers["retry-after"]) == (503, "5")
        assert (await world.ask(CHAT)).status == 401, "strangers learn nothing"
        assert (await world.ask("/ready", method="GET")).status == 200

    run(test, clients=[client_key("k")], admins=["a"])


def test_draining_waits_for_streams_and_lets_nothing_new_in():
    async def test(world):
        exchange = world.start("/v1/stream", {"model": "one"})
        await exchange.until(2)
        draining = asyncio.create_task(world.gate.drain(DEADLINE_S))
        await asyncio.sleep(0)
        for path in (CHAT, "/v1/models", "/v1/adapters"):
            answer = await world.ask(path, {"model": "one"})
            assert (answer.status, answer.headers["connection"]) == (503, "close")
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
        assert not await world.gate.drain(0.01)
        assert world.gate.in_flight == 1
        world.behind.go_on.set()
        await exchange()
        assert await world.gate.drain(0)

    run(test)


def test_who_waited_before_the_drain_is_served_still():
    async def test(world):
        exchanges = [world.start("/v1/wait", {"model": "one"}) for _ in range(3)]
        await world.waits(lambda: world.turns.waiting("one") == 2)
        draining = asyncio.create_task(world.gate.drain(DEADLINE_S))
        await asyncio.sleep(0)
        world.behind.go_on.set()
        assert [(await exchange()).status for exchange in exchanges] == [200] * 3
        assert await draining

    run(test, running=1)


# ------------------------------------------------------------------------------------------------- key files


def test_a_file_of_client_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text(
        "# clients\n\n  first   # all models\nsec#ond  one  team-*\t two # and no more\n"
        "third #one\n\tfourth\tone#1\r\n#fifth one\n"
    )
    ring = KeyRing(read_client_keys(file))
    models = {key: ring.client(key).models for key in ("first", "sec#ond", "third", "fourth")}
    assert models == {"first": None, "sec#ond": ("one", "team-*", "two"), "third": None, "fourth": ("one#1",)}
    for key in ("#", "fifth", "#fifth", "sec", "one", ""):
        assert ring.client(key) is None
    second = ring.client("sec#ond")
    assert second.allows("team-a")
    assert second.allows("two@aaaaaaaaaaaa")
    assert not second.allows("three")


def test_a_file_with_a_byte_order_mark_begins_with_its_first_key(tmp_path):
    file = tmp_path / "keys"
    file.write_bytes(b"\xef\xbb\xbffirst\r\nsecond\r\n")
    assert KeyRing(read_client_keys(file)).client("first") is not None
    assert read_admin_keys(file) == ["first", "second"]


def test_a_file_of_admin_keys(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# admins\nfirst # mine\nsec#ond\n")
    assert read_admin_keys(file) == ["first", "sec#ond"]


@pytest.mark.parametrize("read", [read_client_keys, read_admin_keys])
@pytest.mark.parametrize("content", [None, b"", b"\n \n# secret\n", b"secret\xff\n", b"secret second-secret\n"])
def test_what_is_wrong_with_a_file_of_keys_is_said_without_a_key(tmp_path, read, content):
    file = tmp_path / "keys"
    if content is not None:
        file.write_bytes(content)
    if read is read_client_keys and content == b"secret second-secret\n":
        assert len(read(file)) == 1
        return
    with pytest.raises(KeyFileError) as caught:
        read(file)
    assert str(file) in str(caught.value)
    assert "secret" not in str(caught.value)


def test_a_directory_is_no_file_of_keys(tmp_path):
    with pytest.raises(KeyFileError, match="IsADirectoryError"):
        read_client_keys(tmp_path)


# ------------------------------------------------------------------------------------------------- odd things


def test_a_refusal_after_the_response_has_begun_sends_nothing_more():
    async def main():
        world = World()

        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            while True:
                await receive()

        world.gate._app = app
        exchange = world.start("/v1/adapters/x", chunks=[b"x" * 4000] * 3, headers={"content-type": FORM})
        assert [message["type"] for message in (await exchange()).sent] == ["http.response.start"]

    asyncio.run(main())
