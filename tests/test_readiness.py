"""GET /ready: what the server is doing, and the status code that a load balancer goes by."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("fastapi", reason="the server's packages are not installed")

from fastapi import FastAPI
from fastapi.testclient import TestClient

from qaa_serve.server.readiness import Readiness, make_readiness_router


@pytest.mark.parametrize(
    ("stalled", "errored", "closed", "listed", "said"),
    [
        (False, False, False, True, "ready"),
        (False, False, False, False, "loading"),
        (False, False, True, True, "draining"),
        (False, True, True, True, "engine dead"),
        (True, True, True, True, "engine stalled"),
    ],
)
def test_what_the_server_does_and_that_only_ready_is_200(stalled, errored, closed, listed, said):
    monitor = SimpleNamespace(stalled=asyncio.Event())
    if stalled:
        monitor.stalled.set()
    catalogue = SimpleNamespace(
        ready=listed, fingerprint=lambda: "f" * 12, entries={"a": None, "b": None}, counts={"known": 1}
    )
    app = FastAPI()
    readiness = Readiness(SimpleNamespace(errored=errored), monitor, SimpleNamespace(closed=closed), catalogue)
    app.include_router(make_readiness_router(readiness))
    answer = TestClient(app).get("/ready")
    assert answer.status_code == (200 if said == "ready" else 503)
    assert answer.json() == {"status": said, "catalogue": "f" * 12, "adapters": 2, "unchecked": 1}
