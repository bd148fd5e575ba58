"""Whether requests are taken."""

from __future__ import annotations

from typing import Literal, TypeAlias

from fastapi import APIRouter
from pydantic import BaseModel, Field
from starlette.responses import JSONResponse

from qaa_serve.registry import Catalogue
from qaa_serve.server.drain import Drain
from qaa_serve.server.engine import AdapterEngine
from qaa_serve.server.monitor import EngineMonitor

Status: TypeAlias = Literal["ready", "loading", "draining", "engine dead", "engine stalled"]


class ReadinessInfo(BaseModel):
    """The answer of /ready."""

    status: Status
    catalogue: str = Field(description="fingerprint of what is served: equal on replicas that serve the same")
    adapters: int = Field(description="adapters that the source has")
    unchecked: int = Field(
        description="those of them that nobody has asked for or checked yet, not in the fingerprint"
    )


class Readiness:
    """Asks those who know."""

    def __init__(self, engine: AdapterEngine, monitor: EngineMonitor, drain: Drain, catalogue: Catalogue):
        self._engine = engine
        self._monitor = monitor
        self._drain = drain
        self._catalogue = catalogue

    def status(self) -> Status:
        """What the server is doing."""
        if self._monitor.stalled.is_set():
            return "engine stalled"  # and is ended for it
        if self._engine.errored:
            return "engine dead"
        if self._drain.closed:
            return "draining"
        return "ready" if self._catalogue.ready else "loading"

    def info(self) -> ReadinessInfo:
        """The answer of /ready."""
        return ReadinessInfo(
            status=self.status(),
            catalogue=self._catalogue.fingerprint(),
            adapters=len(self._catalogue.entries),
            unchecked=self._catalogue.counts["known"],
        )


def make_readiness_router(readiness: Readiness) -> APIRouter:
    """GET /ready."""
    router = APIRouter()

    @router.get("/ready", tags=["adapters"], responses={503: {"model": ReadinessInfo}})
    async def ready() -> JSONResponse:
        """Whether requests are taken: the engine is up and works, and the source has been listed."""
        info = readiness.info()
        return JSONResponse(info.model_dump(), 200 if info.status == "ready" else 503)

    return router
