"""vLLM's engine as the registry needs it, and as requests reach it."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Coroutine
from contextlib import AbstractContextManager, ExitStack, aclosing, asynccontextmanager, nullcontext
from functools import cached_property
from typing import Any

from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import GracefulHTTPError, VLLMClientError, VLLMNotFoundError, VLLMValidationError
from vllm.logger import init_logger
from vllm.lora.request import LoRARequest
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

from qaa_serve.registry import EngineRefusedError, Revision, public_form
from qaa_serve.server.account import EngineAccount
from qaa_serve.server.context import RequestContext, current_request
from qaa_serve.server.loads import Loads
from qaa_serve.server.stat_logger import StatLogger

logger = init_logger("vllm.qaa_serve.engine")  # vLLM's handlers hang on the name "vllm"

#: What vLLM mixes into its workers, for AdapterEngine to ask.
WORKER_EXTENSION = "vllm_qaa.worker.AdapterRPC"


class AdapterEngine(AsyncLLM):
    """vLLM's engine, to which no request is handed whose adapter it does not hold and which has no seat."""

    async def generate(
        self, prompt: Any, sampling_params: Any, *args: Any, lora_request: LoRARequest | None = None, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """As vLLM's; seats and adapter are held until the request has ended or its abort has been sent."""
        if self.vllm_config.speculative_config is not None and sampling_params.logprob_token_ids:
            # vLLM 0.32 returns them in rows of another width, and ends with a step in which others want logprobs.
            raise VLLMValidationError(
                "the server speculates (--speculative-config), and vLLM cannot give log-probabilities of certain "
                "tokens then: leave out logprob_token_ids and ask for logprobs",
                parameter="logprob_token_ids",
            )
        outputs = super().generate(prompt, sampling_params, *args, lora_request=lora_request, **kwargs)
        request = current_request.get()
        observation = None if request is None else request.observation
        sequence = None if observation is None else observation.sequence()
        async with _seated(request, sampling_params.n), _holding(request, lora_request):
            try:
                async with aclosing(outputs):
                    async for output in outputs:
                        if sequence is not None:
                            sequence.saw(output)
                        yield output
            except (VLLMClientError, GracefulHTTPError):
                raise
            except EngineGenerateError as error:
                if isinstance(error.__cause__, (OverflowError, UnicodeError)):
                    raise VLLMValidationError(
                        "the request has a number of more than 64 bits, or half a character (a lone surrogate): "
                        "the engine can be told neither"
                    ) from error
                logger.error("A request has failed, for this reason: %r", error.__cause__)  # vLLM tells nobody
                if observation is not None:
                    observation.failed = True
                raise
            except Exception:
                # A stream that has begun ends with an error in it, under status 200.
                if observation is not None:
                    observation.failed = True
                raise

    async def encode(
        self, *args: Any, lora_request: LoRARequest | None = None, **kwargs: Any
    ) -> AsyncGenerator[Any, None]:
        """As vLLM's; see `generate`."""
        outputs = super().encode(*args, lora_request=lora_request, **kwargs)
        request = current_request.get()
        async with _seated(request, 1), _holding(request, lora_request), aclosing(outputs):
            async for output in outputs:
                yield output

    @cached_property
    def _loads(self) -> Loads:
        def call(method: str, args: tuple[Any, ...]) -> Coroutine[Any, Any, list[Any]]:
            return self.collective_rpc(method, args=args)

        return Loads(call, self.output_processor.has_unfinished_requests)

    async def load(self, revision: Revision) -> int:
        """Have every worker read a revision, beside its steps, and then take it over between two of them.

        Returns:
            bytes of host memory it takes, over all workers.

        Raises:
            EngineRefusedError: if it cannot be loaded.
        """
        try:
            return await self._loads.load(request_for(revision))
        except EngineDeadError as error:
            raise EngineRefusedError("the engine has died") from error
        except Exception as error:
            try:
                await self.remove_lora(revision.int_id)  # one of several workers may have it
            except Exception:
                logger.exception("Removing %s after a failed load", revision.revision)
            raise error if isinstance(error, EngineRefusedError) else EngineRefusedError(str(error)) from error

    async def unload(self, revision: Revision) -> None:
        """Have every worker forget a revision."""
        try:
            await self.remove_lora(revision.int_id)
        except Exception as error:  # a dead engine holds nothing any more
            logger.warning("Unloading %s: %s", revision.revision, error)

    async def adapter_bytes(self) -> dict[int, tuple[int, int]]:
        """Bytes in host memory and in slots by adapter id, over all workers."""
        totals: dict[int, tuple[int, int]] = {}
        for worker in await self.collective_rpc("qaa_adapter_bytes"):
            for int_id, host, slot in worker:
                before = totals.get(int_id, (0, 0))
                totals[int_id] = (before[0] + host, before[1] + slot)
        return totals

    async def circuits_backend(self) -> tuple[str, dict[str, float]]:
        """The backend that the circuits run on, and the seconds of each that was timed for the choice."""
        (name, seconds), *_ = await self.collective_rpc("qaa_circuits_backend")  # all workers have the same
        return name, seconds

    async def account(self) -> EngineAccount:
        """What all workers say of their memory and circuits."""
        devices = {
            f"{self.vllm_config.device_config.device_type}:{rank}": sizes
            for rank, sizes in enumerate(await self.collective_rpc("qaa_memory"))
        }
        circuits: dict[str, tuple[list[float], list[int], float]] = {}
        for backend, bounds, counts, total_s in await self.collective_rpc("qaa_circuit_times"):
            _, before, before_s = circuits.get(backend, (bounds, [0] * len(counts), 0.0))
            circuits[backend] = (bounds, [a + b for a, b in zip(before, counts, strict=True)], before_s + total_s)
        return EngineAccount(await self.adapter_bytes(), devices, circuits)


@asynccontextmanager
async def _seated(request: RequestContext | None, sequences: int) -> AsyncIterator[None]:
    """Have the seats that a prompt's sequences need; the engine's own requests need none."""
    if request is None or request.ticket is None:
        yield
        return
    async with request.ticket.seats(sequences):
        yield


@asynccontextmanager
async def _holding(request: RequestContext | None, lora: LoRARequest | None) -> AsyncIterator[None]:
    """Hold an adapter: a step that needs one that is not loaded reads it, and ends the engine if it is gone."""
    if lora is None:
        yield
        return
    with ExitStack() as stack:
        try:
            if request is None or request.hold is None:
                raise KeyError(lora.lora_int_id)
            stack.enter_context(request.hold(lora.lora_int_id))
        except KeyError as error:
            raise VLLMNotFoundError(f"Adapter {public_form(lora.lora_name)} is no longer served.") from error
        yield


def request_for(revision: Revision) -> LoRARequest:
    """What vLLM knows a revision by: name, path and id are all its own."""
    return LoRARequest(lora_name=revision.engine_name, lora_int_id=revision.int_id, lora_path=str(revision.path))


@asynccontextmanager
async def running_engine(args: Any) -> AsyncIterator[AdapterEngine]:
    """The engine that vLLM's arguments describe; it is stopped at the end."""
    engine_args = AsyncEngineArgs.from_cli_args(args)
    config = engine_args.create_engine_config(usage_context=UsageContext.OPENAI_API_SERVER)
    with _naming_spans(config):
        engine = AdapterEngine.from_vllm_config(
            config,
            usage_context=UsageContext.OPENAI_API_SERVER,
            enable_log_requests=engine_args.enable_log_requests,
            aggregate_engine_logging=engine_args.aggregate_engine_logging,
            # Given one of any kind, vLLM keeps statistics even where it was told not to.
            stat_loggers=None if engine_args.disable_log_stats else [StatLogger],
            disable_log_stats=engine_args.disable_log_stats,
        )
    try:
        await engine.reset_mm_cache()
        yield engine
    finally:
        engine.shutdown(timeout=config.shutdown_timeout)


def _naming_spans(config: VllmConfig) -> AbstractContextManager[object]:
    if config.observability_config.otlp_traces_endpoint is None:
        return nullcontext()
    from qaa_serve.server.traces import spans_name_adapters  # vLLM can do without OpenTelemetry

    return spans_name_adapters(config.model_config.served_model_name)
