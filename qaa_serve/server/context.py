"""What is known of the request that a task answers, for the routes and the engine behind the gate."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass

from qaa_serve.registry import Revision
from qaa_serve.server.keys import Key
from qaa_serve.server.metrics import Observation
from qaa_serve.server.turns import Ticket


@dataclass
class RequestContext:
    """One request, from the gate to the engine.

    Attributes:
        key: the key it came with; None if none is needed.
        address: where it came from, as `rights.address_of` says it.
        asked: the model it names, as name, name@revision or alias; None if it names none.
        revision: the adapter's revision that is held for it; None for the base model.
        ticket: its place among the requests for its model; None if it needs none.
        observation: what times it; None if it names no model that is served.
        hold: holds a revision in the engine by its id, until the context it returns is left; KeyError if the
            engine does not have it.
        alias: whether what it names is an alias.
    """

    key: Key | None
    address: str
    asked: str | None = None
    revision: Revision | None = None
    ticket: Ticket | None = None
    observation: Observation | None = None
    hold: Callable[[int], AbstractContextManager[Revision]] | None = None
    alias: bool = False

    def may_use(self, model: str) -> bool:
        """Whether the client may use a model."""
        return self.key is None or self.key.allows(model)


#: The request that this task answers; None outside of requests.
current_request: ContextVar[RequestContext | None] = ContextVar("current_request", default=None)
