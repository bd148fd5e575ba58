"""The names that clients use, on top of vLLM's list of served models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.protocol import ModelCard, ModelList, ModelPermission
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest

from qaa_serve.adapters import AdapterError, LinearWidths, check_fit, digest_of, load_adapter
from qaa_serve.registry import Rejection, Revision

logger = init_logger("vllm.qaa_serve")  # vLLM's handlers hang on the name "vllm"


class ServedModels(OpenAIServingModels):
    """vLLM's served models, where an adapter's public name stands for its newest revision.

    ``lora_requests`` maps public names to requests whose name, path and id are the revision's; vLLM's handlers
    look a request's ``model`` up there. What clients get back is the public name.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.revisions: dict[str, Revision] = {}
        self.rejections: dict[str, Rejection] = {}
        self._public_names: dict[str, str] = {}  # revision -> public name

    @property
    def base_model_paths(self) -> list[BaseModelPath]:
        """The base model first, then the adapters: vLLM lists them to a client that asks for an unknown model."""
        adapters = [
            BaseModelPath(name=name, model_path=request.lora_path) for name, request in self.lora_requests.items()
        ]
        return [self._base_paths[0], *adapters]

    @base_model_paths.setter
    def base_model_paths(self, paths: list[BaseModelPath]) -> None:
        self._base_paths = paths
        self.lora_requests: dict[str, LoRARequest] = {}

    def model_name(self, lora_request: LoRARequest | None = None) -> str:
        """The name a client knows a request's model by."""
        if lora_request is None:
            return self._base_paths[0].name
        return self._public_names.get(lora_request.lora_name, lora_request.lora_name)

    async def show_available_models(self) -> ModelList:
        """The base model and every adapter under its public name, with its revision's directory as root."""
        models = await self.registry.show_available_models()
        for name, request in self.lora_requests.items():
            models.data.append(
                ModelCard(
                    id=name,
                    root=request.lora_path,
                    parent=self._base_paths[0].name,
                    permission=[ModelPermission()],
                )
            )
        return models

    async def publish(self, revision: Revision, base: LinearWidths | None) -> None:
        """Load a revision into the engine, then let its name stand for it.

        Args:
            revision: what to serve.
            base: the base model's linear layers, for a check that needs no engine; None leaves it to the engine.

        Raises:
            AdapterError: if it cannot be served; nothing has changed then.
        """
        if self.is_base_model(revision.name):
            raise AdapterError(f"{revision.name!r} is the base model's name: rename the adapter's directory")
        for name, other in self.revisions.items():
            if other.int_id == revision.int_id and other.revision != revision.revision:
                raise AdapterError(
                    f"its id {revision.int_id} is that of {name!r} by chance: rename the adapter, or save it "
                    "again with any change to its config"
                )
        if base is not None and revision.kind == "QAA":
            adapter = load_adapter(revision.path)
            check_fit(adapter.config, adapter.modules, base)
        request = LoRARequest(
            lora_name=revision.revision,
            lora_int_id=revision.int_id,
            lora_path=str(revision.path),
            base_model_name=self._base_paths[0].name,
        )
        try:
            await self.engine_client.add_lora(request)
        except Exception as error:
            # The engine's process sends any failure as a plain exception with this prefix; it goes on serving.
            raise AdapterError(str(error).removeprefix("Call to add_lora method failed: ")) from error
        if digest_of(revision.path) != revision.digest:
            await self.engine_client.remove_lora(revision.int_id)
            raise AdapterError("its files changed while it was loaded: start again when they are complete")
        self._public_names[revision.revision] = revision.name
        self.revisions[revision.name] = revision
        self.lora_requests[revision.name] = request

    async def publish_all(
        self, revisions: list[Revision], rejections: list[Rejection], base: LinearWidths | None
    ) -> None:
        """Publish what can be served; what cannot is logged with its reason and kept for the API."""
        for rejection in rejections:
            self._reject(rejection)
        for revision in revisions:
            try:
                await self.publish(revision, base)
            except AdapterError as error:
                self._reject(Rejection(revision.name, revision.path, str(error)))
            else:
                logger.info(
                    "Serving %s adapter %s as %r (rank %d, %d bytes)",
                    revision.kind,
                    revision.revision,
                    revision.name,
                    revision.rank,
                    revision.nbytes,
                )

    def _reject(self, rejection: Rejection) -> None:
        self.rejections[rejection.name] = rejection
        logger.error("Not serving adapter %r (%s): %s", rejection.name, rejection.path, rejection.reason)

    def describe(self) -> Mapping[str, Any]:
        """What GET /v1/adapters answers."""
        served = [
            {
                "id": revision.name,
                "object": "adapter",
                "state": "served",
                "revision": revision.revision,
                "kind": revision.kind,
                "rank": revision.rank,
                "bytes": revision.nbytes,
                "details": revision.details,
                "reason": None,
            }
            for revision in self.revisions.values()
        ]
        rejected = [
            {"id": rejection.name, "object": "adapter", "state": "rejected", "reason": rejection.reason}
            for rejection in self.rejections.values()
        ]
        return {"object": "list", "data": [*served, *rejected]}
