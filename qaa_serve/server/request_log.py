"""One line of the log for every request of a client."""

from __future__ import annotations

from logging import Logger
from typing import Any

from qaa_serve.server.context import RequestContext
from qaa_serve.server.metrics import TOKEN_KINDS, Observation, Outcome


class RequestLog:
    """Writes the lines; with --log-format json each is an object."""

    def __init__(self, logger: Logger):
        self._log = logger

    def write(
        self, request: RequestContext, seen: Observation, request_id: str, status: int | None, outcome: Outcome
    ) -> None:
        """A request has ended."""
        self._log.info("request", extra=fields_of(request, seen, request_id, status, outcome))


def fields_of(
    request: RequestContext, seen: Observation, request_id: str, status: int | None, outcome: Outcome
) -> dict[str, Any]:
    """What a line says; times in seconds."""
    revision = request.revision
    return {
        "request_id": request_id,
        "endpoint": seen.labels[1],
        "key": None if request.key is None else request.key.name,
        "model": request.asked,
        "adapter": None if revision is None else revision.name,
        "revision": None if revision is None else revision.revision,
        "outcome": outcome,
        "status": status,
        **{f"{kind}_tokens": seen.tokens[kind] for kind in TOKEN_KINDS},
        "seconds": round(seen.seconds, 6),
        "waited_seconds": round(seen.turn_s, 6),
        "first_token_seconds": None if seen.first_token_s is None else round(seen.first_token_s, 6),
    }
