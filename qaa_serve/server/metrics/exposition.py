"""GET /metrics: written in a thread of its own, once for all who ask within a second.

A page for hundreds of adapters is tens of thousands of lines. Python runs one thread at a time, so a thread that
writes them at a stretch keeps the event loop waiting too, 5 ms each time the loop wants its turn. Hence the writer
rests after every fraction of a millisecond, and while it writes, Python asks it to give way sooner than usual.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
import zlib
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

from fastapi import APIRouter, FastAPI, Request
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.openmetrics import exposition as openmetrics_exposition
from prometheus_client.samples import Sample
from starlette.responses import Response, StreamingResponse

from qaa_serve.server.metrics.written import Written

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
TEXT = "text/plain; version=0.0.4; charset=utf-8"

#: How long is written at a stretch, and how long the writer then rests, so that who waits gets its turn.
SLICE_S, REST_S = 0.0003, 0.0001

#: How soon Python asks the writer to give way where one step is longer, a collector's for one; usually 5 ms.
SWITCH_S = 0.0005

#: Bytes that are sent at once, and that are compressed at once: each time, the threads change places.
PIECE_BYTES, PACKED_BYTES = 1 << 16, 1 << 19


@dataclass(frozen=True)
class Form:
    """How a page is written: there are four ways, whatever headers come."""

    openmetrics: bool
    gzip: bool

    @classmethod
    def of(cls, request: Request) -> Form:
        """What a request accepts: OpenMetrics 1 if it names it, text otherwise."""
        accept = ",".join(request.headers.getlist("accept"))
        encodings = ",".join(request.headers.getlist("accept-encoding"))
        return cls(
            any(
                kind == "application/openmetrics-text" and re.match(r"1\b", fields.get("version", "1"))
                for kind, fields in _accepted(accept)
            ),
            any(coding == "gzip" for coding, _ in _accepted(encodings)),
        )

    @property
    def headers(self) -> dict[str, str]:
        """Of the response, but its length."""
        kind = {"content-type": OPENMETRICS if self.openmetrics else TEXT, "vary": "accept, accept-encoding"}
        return {**kind, "content-encoding": "gzip"} if self.gzip else kind


def _accepted(header: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The values of an Accept header with their fields, without those of weight 0."""
    for entry in header.lower().split(","):
        value, *fields = (part.strip() for part in entry.split(";"))
        named = dict(field.split("=", 1) for field in fields if "=" in field)
        if not re.fullmatch(r"0(\.0*)?", named.get("q", "1").strip()):
            yield value, named


class Exposition:
    """What Prometheus reads."""

    def __init__(self, registry: CollectorRegistry, max_age_s: float = 1.0):
        """Write a registry's metrics.

        Args:
            registry: whose.
            max_age_s: how long a page is given to others who ask; its memory is free again afterwards.
        """
        self._registry = registry
        self._max_age_s = max_age_s
        self._foreign = _Foreign()
        self._pages: dict[Form, asyncio.Future[list[bytes]]] = {}
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="qaa-metrics")

    def router(self) -> APIRouter:
        """The route."""
        router = APIRouter()

        @router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
        async def metrics(request: Request) -> Response:
            """All metrics, as Prometheus reads them."""
            form = Form.of(request)
            pieces = await self.page(form)
            length = sum(map(len, pieces))
            return StreamingResponse(_each(pieces), headers={**form.headers, "content-length": str(length)})

        return router

    async def page(self, form: Form) -> list[bytes]:
        """The metrics now, or as they were a moment ago; who asks while a page is written waits for that."""
        page = self._pages.get(form)
        if page is None:
            loop = asyncio.get_running_loop()
            page = loop.run_in_executor(self._writer, self._write, form)
            self._pages[form] = page
            page.add_done_callback(lambda done: self._keep(loop, form, done))
        return await asyncio.shield(page)  # a client that goes away leaves the page to the others

    def _keep(self, loop: asyncio.AbstractEventLoop, form: Form, page: asyncio.Future[list[bytes]]) -> None:
        if page.cancelled() or page.exception() is not None:
            del self._pages[form]
        else:
            loop.call_later(self._max_age_s, self._pages.pop, form)

    def _write(self, form: Form) -> list[bytes]:
        with _giving_way_soon():
            return list(_pieces(_resting(self._lines(form.openmetrics)), form.gzip))

    def _lines(self, openmetrics: bool) -> Iterator[bytes]:
        """A page in small parts."""
        for metric in self._registry.collect():
            if isinstance(metric, Written):
                yield metric.head(openmetrics)
                yield from metric.lines()
            else:
                yield self._foreign.lines(metric, openmetrics)
        if openmetrics:
            yield b"# EOF\n"


async def _each(pieces: list[bytes]) -> AsyncIterator[bytes]:
    for piece in pieces:
        yield piece
        await asyncio.sleep(0)  # to send does not wait while the socket takes more


class _Foreign:
    """Families that do not write themselves: prometheus_client does, if they have changed since it did last."""

    def __init__(self) -> None:
        self._written: dict[tuple[str, bool], tuple[list[Sample], bytes]] = {}

    def lines(self, metric: Metric, openmetrics: bool) -> bytes:
        """A family's lines."""
        samples, lines = self._written.get((metric.name, openmetrics), ([], b""))
        if not lines or samples != metric.samples:
            lines = _openmetrics(_Alone(metric)) if openmetrics else generate_latest(_Alone(metric))
            self._written[metric.name, openmetrics] = metric.samples, lines
        return lines


def _openmetrics(registry: CollectorRegistry) -> bytes:
    # Left to itself, prometheus_client turns `vllm:` into `vllm_` here.
    lines: bytes = openmetrics_exposition.generate_latest(registry, escaping=openmetrics_exposition.ALLOWUTF8)
    return lines.removesuffix(b"# EOF\n")


class _Alone(CollectorRegistry):
    """A registry of one family that was collected already."""

    def __init__(self, metric: Metric):
        super().__init__()
        self._metric = metric

    def collect(self) -> list[Metric]:
        return [self._metric]


def _resting(texts: Iterator[bytes]) -> Iterator[bytes]:
    """The same, with a rest after every slice."""
    begun = time.perf_counter()
    for text in texts:
        yield text
        if time.perf_counter() - begun > SLICE_S:
            time.sleep(REST_S)
            begun = time.perf_counter()


def _pieces(texts: Iterator[bytes], gzip: bool) -> Iterator[bytes]:
    """Texts in pieces to send; compressed, which others can run beside."""
    # The fastest level: a page's lines are so alike that the others save little.
    packer = zlib.compressobj(1, wbits=31) if gzip else None
    for piece in _joined(texts, PACKED_BYTES if gzip else PIECE_BYTES):
        if packer is None:
            yield piece
        elif packed := packer.compress(piece):
            yield packed
    if packer is not None:
        yield packer.flush()


def _joined(texts: Iterator[bytes], least: int) -> Iterator[bytes]:
    parts: list[bytes] = []
    size = 0
    for text in texts:
        parts.append(text)
        size += len(text)
        if size >= least:
            yield b"".join(parts)
            parts, size = [], 0
    yield b"".join(parts)


@contextmanager
def _giving_way_soon() -> Iterator[None]:
    usual = sys.getswitchinterval()
    sys.setswitchinterval(min(SWITCH_S, usual))
    try:
        yield
    finally:
        sys.setswitchinterval(usual)


def remove_routes(app: FastAPI, *paths: str) -> None:
    """Take vLLM's own routes of these paths out of its app."""
    app.router.routes[:] = [route for route in app.router.routes if getattr(route, "path", None) not in paths]
