"""The names that clients use, on top of vLLM's list of served models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList, ModelPermission
from vllm.lora.request import LoRARequest

from qaa_serve.registry import Catalogue, Revision
from qaa_serve.server.engine import request_for
from qaa_serve.server.gate import Use, current_use


class HeldAdapter(Mapping[str, LoRARequest]):
    """The one adapter that a request asked for and that is held for it, as vLLM's handlers look it up.

    No other name is found here: what the gate checked and holds is all that a request can reach.
    """

    def __getitem__(self, name: str) -> LoRARequest:
        use = current_use.get()
        if use is None or use.revision is None or use.asked != name:
            raise KeyError(name)
        return request_for(use.revision)

    def __iter__(self) -> Iterator[str]:
        use = current_use.get()
        return iter([] if use is None or use.revision is None or use.asked is None else [use.asked])

    def __len__(self) -> int:
        return len(list(iter(self)))


class ServedModels(OpenAIServingModels):
    """vLLM's served models: the base model, and the adapters of the catalogue under their public names."""

    catalogue: Catalogue | None = None  # set once the engine is up

    @property
    def lora_requests(self) -> Mapping[str, LoRARequest]:
        """What vLLM's handlers look a request's model up in."""
        return HeldAdapter()

    @lora_requests.setter
    def lora_requests(self, requests: Mapping[str, LoRARequest]) -> None:
        pass  # vLLM's own starts empty, and stays so

    @property
    def base_model_paths(self) -> list[BaseModelPath]:
        """The base model, then the adapters: vLLM lists them to a client that asks for an unknown model."""
        adapters = [BaseModelPath(name=r.name, model_path=str(r.path)) for r in self._adapters()]
        return [self._base_paths[0], *adapters]

    @base_model_paths.setter
    def base_model_paths(self, paths: list[BaseModelPath]) -> None:
        self._base_paths = paths

    @property
    def base_names(self) -> list[str]:
        """The base model's names."""
        return [path.name for path in self._base_paths]

    def is_base_model(self, model_name: str) -> bool:
        """Whether a name is the base model's and the request may use it."""
        use = current_use.get() or Use(None, None)
        may = use.asked in (None, model_name) and use.may_use(self.base_names[0])
        return may and model_name in self.base_names

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        """The name a client gets back: the one it asked for."""
        use = current_use.get()
        if lora_request is None or use is None or use.asked is None:
            return self._base_paths[0].name
        return use.asked

    async def show_available_models(self) -> ModelList:
        """The base model and every adapter that the client may use, with its revision as root."""
        models: ModelList = await self.registry.show_available_models()
        use = current_use.get() or Use(None, None)
        models.data = [card for card in models.data if use.may_use(card.id)]
        for revision in self._adapters():
            models.data.append(
                ModelCard(
                    id=revision.name,
                    root=revision.revision,
                    parent=self._base_paths[0].name,
                    permission=[ModelPermission()],
                )
            )
        return models

    def _adapters(self) -> list[Revision]:
        use = current_use.get() or Use(None, None)
        entries = self.catalogue.entries.values() if self.catalogue is not None else ()
        return [entry.current for entry in entries if entry.current is not None and use.may_use(entry.name)]

    async def load_lora_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Not here: the catalogue publishes (qaa_serve.server.admin)."""
        raise NotImplementedError

    async def unload_lora_adapter(self, *args: Any, **kwargs: Any) -> Any:
        """Not here: the catalogue publishes (qaa_serve.server.admin)."""
        raise NotImplementedError
