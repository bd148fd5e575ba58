"""Responses that vLLM keeps for later (VLLM_ENABLE_RESPONSES_API_STORE): each is its own client's, for a while."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

from qaa_serve.server.context import current_request

#: Responses that are kept, of all clients together; vLLM itself forgets none.
MAX_KEPT = 1000


class KeptResponses:
    """Whose each response is, and which are the oldest, for all of vLLM's tables of them."""

    def __init__(self, limit: int = MAX_KEPT):
        """Start with none.

        Args:
            limit: responses that are kept; of one that is no more nothing is left in any table.
        """
        self._limit = limit
        self._owners: OrderedDict[str, bytes | None] = OrderedDict()  # the oldest first
        self._tables: list[OwnedResponses] = []

    def table(self) -> OwnedResponses:
        """Another table of responses by id."""
        self._tables.append(OwnedResponses(self))
        return self._tables[-1]

    def is_mine(self, response_id: str) -> bool:
        """Whether there is no such response, or the one there is was made by this request's client."""
        return self._owners.get(response_id, _key_of_request()) == _key_of_request()

    def note(self, response_id: str) -> None:
        """This request's client has written a response; the oldest makes room."""
        self._owners[response_id] = _key_of_request()
        self._owners.move_to_end(response_id)
        if len(self._owners) > self._limit:
            oldest, _ = self._owners.popitem(last=False)
            for table in self._tables:
                table.pop(oldest, None)


class OwnedResponses(dict[str, Any]):
    """A table of vLLM's by a response's id, in which a client finds only those that its key has made.

    Another's is not there: to see, to cancel, to continue (`previous_response_id`), or to write over.
    """

    def __init__(self, kept: KeptResponses):
        super().__init__()
        self._kept = kept

    def __setitem__(self, response_id: str, response: Any) -> None:
        if not self._kept.is_mine(response_id):
            raise ValueError(f"there is a response {response_id!r} already: leave request_id out")
        self._kept.note(response_id)
        super().__setitem__(response_id, response)

    def get(self, response_id: str, default: Any = None) -> Any:
        """A response of this request's client."""
        return super().get(response_id, default) if self._kept.is_mine(response_id) else default


def _key_of_request() -> bytes | None:
    request = current_request.get()
    return None if request is None or request.key is None else request.key.digest
