"""The names that clients use, on top of vLLM's list of served models."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from fastapi import APIRouter, Response
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList
from vllm.lora.request import LoRARequest

from qaa_serve.registry import Catalogue, UnavailableError, UnknownAdapterError
from qaa_serve.server.context import RequestContext, current_request
from qaa_serve.server.engine import request_for
from qaa_serve.server.errors import RefusedError

#: Outside of requests nobody asks; vLLM looks at the models while it sets up its app.
_NOBODY = RequestContext(None, "local")


class HeldAdapter(Mapping[str, LoRARequest]):
    """The one adapter that a request asked for and that is held for it, as vLLM's handlers look it up.

    No other name is found here: what the gate checked and holds is all that a request can reach.
    """

    def __getitem__(self, name: str) -> LoRARequest:
        request = current_request.get()
        if request is None or request.revision is None or request.asked != name:
            raise KeyError(name)
        return request_for(request.revision)

    def __iter__(self) -> Iterator[str]:
        request = current_request.get() or _NOBODY
        return iter([] if request.revision is None or request.asked is None else [request.asked])

    def __len__(self) -> int:
        return len(list(iter(self)))


class ServedModels(OpenAIServingModels):
    """vLLM's served models: the base model, and the adapters of the catalogue under their public names."""

    def __init__(
        self,
        catalogue: Catalogue,
        engine_client: EngineClient,
        base_model_paths: list[BaseModelPath],
        **options: Any,
    ):
        """As vLLM's, with a catalogue.

        Args:
            catalogue: the adapters.
            engine_client: the engine.
            base_model_paths: the base model's names. Where it lies on this machine's disk is nobody's business.
            options: of vLLM's.
        """
        names = [BaseModelPath(name=path.name, model_path=path.name) for path in base_model_paths]
        super().__init__(engine_client, names, **options)
        self._catalogue = catalogue
        self._started = int(time.time())
        self._cards: dict[str, bytes] = {}  # JSON of each adapter
        self._page: bytes | None = None  # the whole list, as of
        self._generation = -1  # of the catalogue
        self._writing = asyncio.Lock()

    @property
    def lora_requests(self) -> Mapping[str, LoRARequest]:
        """What vLLM's handlers look a request's model up in."""
        return HeldAdapter()

    @lora_requests.setter
    def lora_requests(self, requests: Mapping[str, LoRARequest]) -> None:
        pass  # vLLM's own starts empty, and stays so

    def is_base_model(self, model_name: str) -> bool:
        """Whether a name is the base model's and the request may use it."""
        request = current_request.get() or _NOBODY
        may = request.asked in (None, model_name) and request.may_use(self.base_model_paths[0].name)
        return may and any(path.name == model_name for path in self.base_model_paths)

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        """The name a client gets back: the one it asked for."""
        request = current_request.get()
        if lora_request is None or request is None or request.asked is None:
            return self.base_model_paths[0].name
        return request.asked

    async def show_available_models(self) -> ModelList:
        """The base model alone; all that a client may use is `list_models`."""
        return ModelList(data=[self._base_card(path.name) for path in self.base_model_paths])

    async def list_models(self) -> bytes:
        """The answer of GET /v1/models: the base model, and every adapter and alias that the client may use.

        What takes long is done in threads. The part of each adapter is kept until the adapter changes, and the
        whole until any does.
        """
        request = current_request.get() or _NOBODY
        may_use = None if request.key is None or request.key.models is None else request.key.allows
        async with self._writing:
            if self._generation != self._catalogue.generation:
                self._generation, self._page = self._catalogue.generation, None
                await asyncio.to_thread(self._update, self._catalogue.take_touched())
            if may_use is not None:
                base = [_json(self._base_card(path.name)) for path in self._base_paths_for(request)]
                return await asyncio.to_thread(self._write, base, may_use)
            if self._page is None:
                base = [_json(self._base_card(path.name)) for path in self.base_model_paths]
                self._page = await asyncio.to_thread(self._write, base, None)
            return self._page

    def _update(self, touched: Iterable[str]) -> None:
        """Write anew the parts of adapters that have changed."""
        # Every card is the same but for three fields, and there may be a hundred thousand.
        before, between, middle, after = re.split(b'"(?:ID|ROOT)"|1234567890', _json(self._card_of("ID", "ROOT")))
        for name in [name for name in self._cards if name not in self._catalogue.entries]:
            del self._cards[name]
        for name in touched:
            entry = self._catalogue.entries.get(name)
            if entry is None or entry.state == "rejected":
                self._cards.pop(name, None)
                continue
            root = name if entry.current is None else entry.current.revision
            created = int(entry.published or self._started)
            self._cards[name] = b'%s"%s"%s%d%s"%s"%s' % (
                before, name.encode(), between, created, middle, root.encode(), after
            )  # fmt: skip

    def _write(self, base: list[bytes], may_use: Callable[[str], bool] | None) -> bytes:
        aliases = [name for name in self._catalogue.settings.aliases if may_use is None or may_use(name)]
        cards = self._cards
        chosen = list(cards.values()) if may_use is None else [cards[name] for name in cards if may_use(name)]
        return b'{"object":"list","data":[%s]}' % b",".join(
            [*base, *chosen, *(_json(self._card_of(name, name, self._started)) for name in aliases)]
        )

    async def show_model(self, name: str) -> ModelCard:
        """One of them, or a kept revision of an adapter.

        Raises:
            RefusedError: with 404 if there is none of that name that the client may use, with 503 if it cannot be
                read now.
        """
        request = current_request.get() or _NOBODY
        if name in (path.name for path in self._base_paths_for(request)):
            return self._base_card(name)
        if not request.may_use(name):
            raise _no_model(name)
        if name in self._catalogue.settings.aliases:
            return self._card_of(name, name, self._started)
        try:
            revision = await self._catalogue.find(name)
        except UnknownAdapterError as error:
            raise _no_model(name) from error
        except UnavailableError as error:
            raise RefusedError(503, str(error), Retry_After="5") from error
        published = self._catalogue.entries[revision.name].published
        return self._card_of(name, revision.revision, int(published or self._started))

    def _base_paths_for(self, request: RequestContext) -> list[BaseModelPath]:
        return self.base_model_paths if request.may_use(self.base_model_paths[0].name) else []

    def _base_card(self, name: str) -> ModelCard:
        return ModelCard(
            id=name,
            created=self._started,
            root=self.base_model_paths[0].name,
            max_model_len=self.model_config.max_model_len,
        )

    def _card_of(self, name: str, root: str, created: int = 1234567890) -> ModelCard:
        return ModelCard(id=name, created=created, root=root, parent=self.base_model_paths[0].name)

    async def load_lora_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Not here: the catalogue publishes (qaa_serve.server.admin)."""
        raise NotImplementedError

    async def unload_lora_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Not here: the catalogue publishes (qaa_serve.server.admin)."""
        raise NotImplementedError


def _json(card: ModelCard) -> bytes:
    return card.model_dump_json().encode()


def _no_model(name: str) -> RefusedError:
    return RefusedError(404, f"The model `{name}` does not exist.", param="model")


def make_models_router(models: ServedModels) -> APIRouter:
    """What can be asked for."""
    router = APIRouter()

    @router.get("/v1/models", tags=["models"], response_model=ModelList)
    async def list_models() -> Response:
        """The base model, and every adapter and alias that the client may use."""
        return Response(await models.list_models(), media_type="application/json")

    @router.get("/v1/models/{model:path}", tags=["models"])
    async def retrieve_model(model: str) -> ModelCard:
        """One model: the base, an adapter, an alias, or `name@revision`."""
        return await models.show_model(model)

    return router
