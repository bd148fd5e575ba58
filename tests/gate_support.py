"""A gate over an app that echoes, and requests by hand whose every message is chosen and seen."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager, nullcontext

from catalogue_support import add, make_catalogue, revision
from prometheus_client import CollectorRegistry
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route, WebSocketRoute

from qaa_serve.adapters import AdapterError
from qaa_serve.server.bodies import Bodies
from qaa_serve.server.context import current_request
from qaa_serve.server.drain import Drain
from qaa_serve.server.gate import Gate
from qaa_serve.server.keys import KeyRing, make_key
from qaa_serve.server.metrics import ServerMetrics
from qaa_serve.server.rights import Rights, Role
from qaa_serve.server.turns import Turns

DEADLINE_S = 60
CHAT = "/v1/chat/completions"
JSON = "application/json"
FORM = "multipart/form-data; boundary=b"
EVERY_METHOD = ["GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD"]


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
        self.app = Starlette(
            routes=[
                Route("/v1/wait", self.wait, methods=EVERY_METHOD),
                Route("/v1/stream", self.stream, methods=EVERY_METHOD),
                Route("/v1/fail", self.fail, methods=EVERY_METHOD),
                WebSocketRoute("/{path:path}", self.socket),
                Route("/{path:path}", self.echo, methods=EVERY_METHOD),
            ],
            lifespan=self.lifespan,
        )

    @asynccontextmanager
    async def lifespan(self, app):
        self.started = True
        yield
        self.started = False

    async def echo(self, request: Request):
        known = current_request.get()
        self.entered += 1
        body = await request.body()
        return JSONResponse(
            {
                "path": request.url.path,
                "known": known is not None,
                "key": known.key.name if known and known.key else None,
                "address": known.address if known else None,
                "asked": known.asked if known else None,
                "revision": known.revision.revision if known and known.revision else None,
                "bytes": len(body),
                "body": body[:100].decode("latin-1"),
            }
        )

    async def wait(self, request: Request):
        """As the engine does: with a seat."""
        self.entered += 1
        ticket = current_request.get().ticket
        async with nullcontext() if ticket is None else ticket.seats(1):
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
        await socket.send_text(str(current_request.get().asked))
        await socket.close()


class Exchange:
    """One request by hand: its parts are chosen, it can go away, and what comes back is seen as it comes."""

    def __init__(
        self, gate, path=CHAT, body=None, *, method="POST", headers=None, key=None, chunks=None,
        client=("127.0.0.1", 50000), server=("127.0.0.1", 8000), whole=True, kind="http",
    ):  # fmt: skip
        data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        headers = {"host": "localhost:8000", "content-type": JSON, **(headers or {})}
        if key is not None:
            headers["authorization"] = f"Bearer {key}"
        if chunks is None:
            headers.setdefault("content-length", str(len(data)))
        self.gone = asyncio.Event()
        self.broken = False
        self.sent: list[dict] = []
        self.listening = 0  # who waits for it to go away
        self.unread = [data] if chunks is None else list(chunks)
        self._changed = asyncio.Event()
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
        if self.unread:
            part = self.unread.pop(0)
            return {"type": "http.request", "body": part, "more_body": bool(self.unread) or not self._whole}
        self.listening += 1
        try:
            await self.gone.wait()
        finally:
            self.listening -= 1
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
        return {name.decode(): value.decode("latin-1") for name, value in self.sent[0]["headers"]}

    @property
    def json(self):
        return json.loads(b"".join(message.get("body", b"") for message in self.sent[1:]))

    @property
    def error(self):
        """The message of a refusal."""
        return self.json["error"]["message"]


def make_metrics(registry):
    buckets = {f"{kind}_buckets": (1.0,) for kind in ("latency", "first_token", "inter_token")}
    return ServerMetrics(registry, **buckets)


class WrongKeys:
    """Takes note of wrong keys and lets nobody wait; test_rights.py has the real one."""

    def __init__(self):
        self.noted = []

    async def seen(self, role, address):
        self.noted.append((role, address))


class World:
    """A gate, what is behind it, and the catalogue: `one` has a former revision, `two` has none."""

    def __init__(
        self, *, clients=(), admins=("admin",), running=2, waiting=2, max_wait_s=DEADLINE_S, body=1000,
        upload=5000, held=1 << 20, timeout_s=DEADLINE_S, root_path=None, **settings,
    ):  # fmt: skip
        self.behind = Behind()
        self.engine = FakeEngine()
        self.catalogue = make_catalogue(self.engine)
        add(self.catalogue, revision("one", "b"), [revision("one", "a")])
        add(self.catalogue, revision("two"))
        self.turns = Turns(running, waiting, max_wait_s=max_wait_s)
        self.bodies = Bodies(max_bytes=body, max_held_bytes=held, timeout_s=timeout_s)
        self.drain = Drain()
        self.keys = KeyRing(clients, [make_key(key, key) for key in admins])
        self.wrong_keys = WrongKeys()
        self.registry = CollectorRegistry()
        self.metrics = make_metrics(self.registry)
        app = self.behind.app
        if root_path is not None:
            app = Rooted(app, root_path)
        self.gate = Gate(
            app, rights=Rights(self.keys, self.wrong_keys), bodies=self.bodies, turns=self.turns,
            catalogue=self.catalogue, metrics=self.metrics, drain=self.drain, base_names=["base", "/models/base"],
            max_upload_bytes=upload, **{"has_route": lambda scope: True, "roles": Role, **settings},
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

    def counted(self):
        """(adapter, endpoint, outcome) of every request that was counted, sorted."""
        samples = (s for family in self.registry.collect() for s in family.samples)
        return sorted(
            tuple(sample.labels.values())
            for sample in samples
            if sample.name == "qaa_requests_total"
            for _ in range(int(sample.value))
        )

    def is_still(self):
        """Whether nothing is counted, waited for or held any more."""
        loose = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        counts = self.turns._lines == {} and self.drain.in_flight == self.bodies.held_bytes == 0
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


def client(key, models=None):
    """A client's key, named as it is."""
    return make_key(key, key.replace(" ", "-"), models)
