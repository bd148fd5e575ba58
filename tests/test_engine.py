"""What the engine refuses before vLLM's sees it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

from vllm import SamplingParams
from vllm.exceptions import GenerationError, VLLMValidationError
from vllm.v1.engine.async_llm import AsyncLLM

from qaa_serve.server.context import current_request
from qaa_serve.server.engine import AdapterEngine


def test_log_probabilities_of_certain_tokens_are_refused_while_speculating():
    """In a step with another request for logprobs, vLLM 0.32's rejection sampler ends the engine."""
    engine = SimpleNamespace(vllm_config=SimpleNamespace(speculative_config=object()))
    parameters = SamplingParams(logprobs=1, logprob_token_ids=[5])
    with pytest.raises(VLLMValidationError, match="leave out logprob_token_ids"):
        asyncio.run(anext(AdapterEngine.generate(engine, "Hello", parameters, "request")))


def test_what_fails_in_the_engine_for_one_request_is_passed_on_and_counted(monkeypatch):
    """vLLM 0.32 wraps a GenerationError, 0.33 raises it as it is: the KV cache fails, the engine is paused."""

    async def fail(self, *args, **kwargs):
        raise GenerationError("no KV cache")
        yield

    monkeypatch.setattr(AsyncLLM, "generate", fail)
    engine = object.__new__(AdapterEngine)
    engine.vllm_config = SimpleNamespace(speculative_config=None)
    observation = SimpleNamespace(failed=False, sequence=lambda: None)
    token = current_request.set(SimpleNamespace(observation=observation, ticket=None))
    with pytest.raises(GenerationError, match="no KV cache"):
        asyncio.run(anext(engine.generate("Hello", SamplingParams(), "request")))
    current_request.reset(token)
    assert observation.failed
