"""A stand-in of the server's API for the console: many adapters, and faults when they are asked for."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator

import uvicorn
from server_process import ADMIN_KEY, free_port
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

CLIENT_KEY = "client-of-the-tests"
REJECTION = {"reason": "<b>torn</b> & cut"}


class StandIn:
    """Answers as the server does, with adapters `a-00000`, ...; a client's key is for every hundredth of them."""

    def __init__(self, adapters: int):
        self.names = [f"a-{number:05}" for number in range(adapters)]
        self.bodies: list[dict] = []
        self.port = free_port()
        self.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Listen; after a stop, at the same port."""
        routes = [
            Route("/metrics", self._metrics),
            Route("/v1/models", self._models),
            Route("/v1/adapters", self._adapters),
            Route("/v1/aliases", lambda request: JSONResponse({"object": "list", "data": []})),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        config = uvicorn.Config(Starlette(routes=routes), port=self.port, log_level="warning")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        """Be gone."""
        self._server.should_exit = True
        self._thread.join(10)

    async def _metrics(self, request: Request) -> Response:
        return PlainTextResponse(
            "# TYPE qaa_requests_total counter\n"
            'qaa_requests_total{adapter="a-00001",endpoint="chat",outcome="success"} 5\n'
            'qaa_requests_total{adapter="a-00100",endpoint="chat",outcome="success"} 7\n'
        )

    async def _models(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {CLIENT_KEY}":
            return _refused(401, "an API key is needed")
        return JSONResponse({"object": "list", "data": [{"id": name} for name in self.names[::100]]})

    async def _adapters(self, request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {ADMIN_KEY}":
            return _refused(401, "an admin key is needed, and this is none")
        query = request.query_params
        found = [name for name in self.names if query.get("q", "") in name and name > query.get("after", "")]
        limit = int(query["limit"])  # without one, all would be sent
        data = [
            {"id": name, "state": "served", "kind": "QAA", "revision": f"{name}@{'0' * 12}", "running": 0,
             "waiting": 0, "bytes": {"store": 1000, "host": 0, "slot": 0},
             "rejection": REJECTION if name == "a-00003" else None}
            for name in found[:limit]
        ]  # fmt: skip
        return JSONResponse({"data": data, "has_more": len(found) > limit, "total": len(self.names)})

    async def _chat(self, request: Request) -> Response:
        self.bodies.append(json.loads(await request.body()))

        async def events() -> AsyncIterator[str]:
            yield _event({"choices": [{"delta": {"content": "It begins"}}]})
            if "for ever" in self.bodies[-1]["messages"][-1]["content"]:
                try:
                    await asyncio.Event().wait()  # starlette cancels it when the client goes
                finally:
                    self.bodies.append({"gone": True})
            yield _event({"error": {"message": "the engine is gone"}})

        return StreamingResponse(events(), media_type="text/event-stream")


def _event(content: dict) -> str:
    return f"data: {json.dumps(content)}\n\n"


def _refused(status: int, message: str) -> Response:
    return JSONResponse({"error": {"message": message}}, status_code=status)


if __name__ == "__main__":
    stand_in = StandIn(10_000)
    print(stand_in.url, flush=True)
    threading.Event().wait()
