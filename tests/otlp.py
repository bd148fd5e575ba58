"""A collector of OpenTelemetry traces, as a server of the protocol's own gRPC service on 127.0.0.1."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2_grpc import (
    TraceServiceServicer,
    add_TraceServiceServicer_to_server,
)


class Collector(TraceServiceServicer):
    """Keeps the spans it is sent."""

    def __init__(self):
        self._spans: list[Any] = []
        self._come = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(2))
        add_TraceServiceServicer_to_server(self, self._server)
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(self, request, context):  # noqa: N802
        with self._come:
            for resource in request.resource_spans:
                self._spans += [span for scope in resource.scope_spans for span in scope.spans]
            self._come.notify_all()
        return ExportTraceServiceResponse()

    def of_trace(self, trace_id: str, count: int, limit_s: float = 30) -> list[dict[str, Any]]:
        """Wait for so many spans of one trace; the attributes of all that have come by then."""

        def found() -> list[Any]:
            return [span for span in self._spans if span.trace_id.hex() == trace_id]

        with self._come:
            self._come.wait_for(lambda: len(found()) >= count, limit_s)
            return [{a.key: _value(a.value) for a in span.attributes} for span in found()]

    def stop(self) -> None:
        self._server.stop(None).wait()


def _value(value: Any) -> Any:
    return getattr(value, value.WhichOneof("value"))
