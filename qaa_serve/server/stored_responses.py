"""Responses that vLLM keeps for later (VLLM_ENABLE_RESPONSES_API_STORE): each is its own client's."""

from __future__ import annotations

from typing import Any

from qaa_serve.server.context import current_request


class OwnedResponses(dict[str, Any]):
    """vLLM's table of responses by id, in which a client finds only those that its key has made.

    Another's is not there: to see, to cancel, to continue (`previous_response_id`), or to write over.
    """

    def __init__(self) -> None:
        super().__init__()
        self._owners: dict[str, bytes | None] = {}

    def __setitem__(self, response_id: str, response: Any) -> None:
        if not self._is_mine(response_id):
            raise ValueError(f"there is a response {response_id!r} already: leave request_id out")
        self._owners.setdefault(response_id, _key_of_request())
        super().__setitem__(response_id, response)

    def get(self, response_id: str, default: Any = None) -> Any:
        """A response of this request's client."""
        return super().get(response_id, default) if self._is_mine(response_id) else default

    def _is_mine(self, response_id: str) -> bool:
        return self._owners.get(response_id, _key_of_request()) == _key_of_request()


def _key_of_request() -> bytes | None:
    request = current_request.get()
    return None if request is None or request.key is None else request.key.digest
